// The launches of a planned forward call. forward_rows.cu and forward_columns.cu compile their traversal's kernels,
// once for each storage type.
#pragma once

#include "apply.cuh"
#include "fused_forward_columns.cuh"
#include "fused_forward_rows.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "register_forward.cuh"

namespace fastnorm::cuda {

template <class T, Traversal kTraversal>
struct Forward {
  using A = Accum<T>;
  static constexpr bool kRows = kTraversal == Traversal::kRows;

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

  template <int W, bool kSmooth>
  int apply() const {
    const LaunchConfig config = config_of(plan.grid, 0, stream);
    if constexpr (kRows) {
      return launch(apply_rows<T, W, kSmooth>, config, tensors, after_reduce(rows()));
    } else {
      return launch(apply_columns<T, W, kSmooth>, config, tensors, after_reduce(columns()));
    }
  }

  template <int W>
  int reduce() const {
    const LaunchConfig config = config_of(plan.grid, plan.grid.shared_bytes, stream);
    auto* partials = static_cast<Welford<A>*>(workspace);
    if constexpr (kRows) {
      return launch(reduce_rows<T, W>, config, tensors.x, partials, rows());
    } else {
      return launch(reduce_columns<T, W>, config, tensors.x, partials, columns());
    }
  }

  int fold() const {
    FoldForwardArgs<A> f{};
    f.partials = static_cast<const Welford<A>*>(workspace);
    f.sets = g.sets();
    f.pieces = plan.grid.pieces;
    f.groups = g.sets() / g.outer();
    f.columns = kRows ? 1 : g.set_channels();
    f.x = args.x;
    f.dtype = dtype;
    f.set_stride = kRows ? rows().set_stride : g.set_channels();
    f.outer_stride = g.numel() / g.outer();
    f.stats = tensors.stats;
    f.running = tensors.running;
    f.eps = args.eps;
    return launch_fold_forward(f, stream);
  }

  template <int W, bool kSmooth>
  int fused() const {
    const LaunchConfig config = fused_config(plan.grid, false, stream);
    if constexpr (kRows && W * sizeof(T) == 16) {
      if (plan.grid.place() == Place::kRegisters) {
        return launch(register_forward<T, kSmooth>, config, tensors, register_rows_shape(g, plan.grid, dtype));
      }
    }
    const FusedShape shape = fused_shape(plan.grid, dtype, workspace);
    if constexpr (kRows) {
      return launch(fused_forward_rows<T, W, kSmooth>, config, tensors, rows(), shape);
    } else {
      if constexpr (W > 1) {
        if (plan.grid.rereads()) {
          return launch(fused_forward_columns<T, W, kSmooth, true>, config, tensors, columns(), shape);
        }
      }
      return launch(fused_forward_columns<T, W, kSmooth, false>, config, tensors, columns(), shape);
    }
  }

  template <int W, bool kSmooth>
  int run() const {
    switch (plan.strategy) {
      case Strategy::kApply: return apply<W, kSmooth>();
      case Strategy::kFused:
        if constexpr (kFuses<T>) return fused<W, kSmooth>();
        return kNoSuchKernel;
      default:
        if (const int error = reduce<W>()) return error;
        if (const int error = fold()) return error;
        return args.y == nullptr ? 0 : apply<W, kSmooth>();
    }
  }
};

template <class T, Traversal kTraversal>
int run_forward(const ForwardArgs& args, const ForwardPlan& plan, void* workspace, void* stream) {
  const Forward<T, kTraversal> call{args, plan, workspace, stream};
  return dispatch_kernel<T, kTraversal>(plan.grid.pack, args.activation, [&](auto pack, auto smooth) {
    return call.template run<decltype(pack)::value, decltype(smooth)::value>();
  });
}

}  // namespace fastnorm::cuda
