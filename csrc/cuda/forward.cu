// The forward kernels of one storage type. The build compiles this file once for each type, as FASTNORM_DTYPE.
#include "apply.cuh"
#include "fused_forward_columns.cuh"
#include "fused_forward_rows.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace fastnorm::cuda {

namespace {

using T = FASTNORM_DTYPE;
using A = Accum<T>;

// float64 has packs of one element and is not fused.
constexpr bool kFuses = !std::is_same<T, double>::value;

struct Forward {
  const ForwardArgs& args;
  const ForwardPlan& plan;
  void* workspace;
  void* stream;
  const ForwardTensors<T> tensors{args};
  const Geometry& g = args.geometry;
  const DType dtype = args.dtype;

  RowsShape rows() const { return rows_shape(g, g, plan.grid, dtype, true); }
  ColumnsShape columns() const { return columns_shape(g, plan.grid, dtype); }
  // Apply begins with what reduce read last, which L2 still has.
  template <class Shape>
  Shape after_reduce(Shape shape) const {
    shape.backwards = plan.strategy == Strategy::kSplit;
    return shape;
  }
  bool is_rows() const { return plan.grid.traversal == Traversal::kRows; }

  template <int W, bool kSmooth>
  int apply() const {
    const LaunchConfig config = config_of(plan.grid, 0, stream);
    if (is_rows()) return launch(apply_rows<T, W, kSmooth>, config, tensors, after_reduce(rows()));
    if constexpr (kColumnsPack<T, W>) {
      return launch(apply_columns<T, W, kSmooth>, config, tensors, after_reduce(columns()));
    }
    return kNoSuchKernel;
  }

  template <int W>
  int reduce() const {
    const LaunchConfig config = config_of(plan.grid, plan.grid.shared_bytes, stream);
    auto* partials = static_cast<Welford<A>*>(workspace);
    if (is_rows()) return launch(reduce_rows<T, W>, config, tensors.x, partials, rows());
    if constexpr (kColumnsPack<T, W>) return launch(reduce_columns<T, W>, config, tensors.x, partials, columns());
    return kNoSuchKernel;
  }

  int fold() const {
    FoldForwardArgs<A> f{};
    f.partials = static_cast<const Welford<A>*>(workspace);
    f.sets = g.sets();
    f.pieces = plan.grid.pieces;
    f.groups = g.sets() / g.outer();
    f.columns = is_rows() ? 1 : g.set_channels();
    f.x = args.x;
    f.dtype = dtype;
    f.set_stride = is_rows() ? rows().set_stride : g.set_channels();
    f.outer_stride = g.numel() / g.outer();
    f.stats = tensors.stats;
    f.running = tensors.running;
    f.eps = args.eps;
    return launch_fold_forward(f, stream);
  }

  template <int W, bool kSmooth>
  int fused() const {
    if constexpr (kFuses) {
      const LaunchConfig config = fused_config(plan.grid, false, stream);
      const FusedShape shape = fused_shape(plan.grid, dtype, workspace);
      if (is_rows()) return launch(fused_forward_rows<T, W, kSmooth>, config, tensors, rows(), shape);
      if constexpr (kColumnsPack<T, W>) {
        return launch(fused_forward_columns<T, W, kSmooth>, config, tensors, columns(), shape);
      }
    }
    return kNoSuchKernel;
  }

  template <int W, bool kSmooth>
  int run() const {
    switch (plan.strategy) {
      case Strategy::kApply: return apply<W, kSmooth>();
      case Strategy::kFused: return fused<W, kSmooth>();
      default:
        if (const int error = reduce<W>()) return error;
        if (const int error = fold()) return error;
        return args.y == nullptr ? 0 : apply<W, kSmooth>();
    }
  }
};

}  // namespace

template <>
int forward_of<T>(const ForwardArgs& args, const ForwardPlan& plan, void* workspace, void* stream) {
  const Forward call{args, plan, workspace, stream};
  return dispatch_kernel<T>(plan.grid.pack, args.activation, [&](auto pack, auto smooth) {
    return call.template run<decltype(pack)::value, decltype(smooth)::value>();
  });
}

}  // namespace fastnorm::cuda
