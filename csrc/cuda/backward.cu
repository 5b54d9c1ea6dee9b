// The backward kernels of one storage type: compiled once for each, as FASTNORM_DTYPE.
#include "apply_backward.cuh"
#include "fused_backward.cuh"
#include "launch.cuh"
#include "reduce_backward.cuh"

namespace fastnorm::cuda {

namespace {

using T = FASTNORM_DTYPE;
using A = Accum<T>;

struct Backward {
  const BackwardArgs& args;
  const BackwardPlan& plan;
  unsigned char* workspace;
  void* stream;
  const BackwardTensors<T> tensors{args};
  const Geometry& g = args.geometry;
  const DType dtype = args.dtype;
  const bool rows = g.traversal() == Traversal::kRows;

  GradSums<A>* sums() const { return plan.sums_bytes > 0 ? reinterpret_cast<GradSums<A>*>(workspace) : nullptr; }
  GradSums<A>* params() const {
    return plan.params_bytes > 0 ? reinterpret_cast<GradSums<A>*>(workspace + plan.sums_bytes) : nullptr;
  }
  SetTerms<A>* terms() const {
    if (plan.terms_bytes == 0) return nullptr;
    return reinterpret_cast<SetTerms<A>*>(workspace + plan.sums_bytes + plan.params_bytes);
  }
  RowsShape rows_of(const Geometry& cells, const Grid& grid) const { return rows_shape(cells, g, grid, dtype, false); }

  template <int W, bool kSmooth>
  int reduce() const {
    if (plan.reduce.items == 0) return 0;
    const LaunchConfig config = config_of(plan.reduce, plan.reduce.shared_bytes, stream);
    if (rows) {
      return launch(reduce_backward_rows<T, W, kSmooth>, config, tensors, sums(), rows_of(plan.cells, plan.reduce));
    }
    if constexpr (kColumnsPack<T, W>) {
      return launch(reduce_backward_columns<T, W, kSmooth>, config, tensors, sums(),
                    columns_shape(g, plan.reduce, dtype));
    }
    return kNoSuchKernel;
  }

  template <int W, bool kSmooth>
  int apply() const {
    if (plan.apply.items == 0) return 0;
    const LaunchConfig config = config_of(plan.apply, 0, stream);
    const SetTerms<A>* const set_terms = terms();
    if (rows) {
      return launch(apply_backward_rows<T, W, kSmooth>, config, tensors, set_terms, rows_of(g, plan.apply));
    }
    if constexpr (kColumnsPack<T, W>) {
      return launch(apply_backward_columns<T, W, kSmooth>, config, tensors, set_terms,
                    columns_shape(g, plan.apply, dtype));
    }
    return kNoSuchKernel;
  }

  template <int W, bool kSmooth>
  int reduce_params_apart() const {
    if (plan.param_sums != ParamSums::kApart) return 0;
    const LaunchConfig config = config_of(plan.params, plan.params.shared_bytes, stream);
    constexpr int kPack = kColumnsPack<T, W> ? W : 1;
    if (plan.params.pack != kPack) return kNoSuchKernel;
    return launch(reduce_params<T, kPack, kSmooth>, config, tensors, params(), columns_shape(g, plan.params, dtype));
  }

  FusedBackward<A> fused_shape() const {
    FusedBackward<A> f{};
    const int64_t staged = rows ? g.set_size() : plan.reduce.tile * g.positions();
    f.stream_bytes = static_cast<int>(align16(staged * sizeof(T)));
    if (rows) f.team_bytes = static_cast<int>(plan.reduce.team_bytes);
    f.unit_threads = plan.units.threads;
    f.segments = static_cast<int>(plan.units.segments);
    f.unit_length = static_cast<int>(plan.units.length);
    f.cells = static_cast<int>(g.set_channels());
    f.cell_packs = static_cast<int>(plan.reduce.piece_runs * plan.reduce.piece_length / f.cells);
    f.sums = sums();
    if (plan.param_sums == ParamSums::kAlong) f.gathered = params();
    if (plan.param_sums == ParamSums::kShared && g.kind == Kind::kBatch) f.dweight = args.dweight, f.dbias = args.dbias;
    return f;
  }

  template <int W, bool kSmooth>
  int fused() const {
    if constexpr (!std::is_same<T, double>::value) {  // float64 goes by the plain path
      const LaunchConfig config = config_of(plan.reduce, plan.reduce.shared_bytes, stream);
      if (rows) {
        return launch(fused_backward_rows<T, W, kSmooth>, config, tensors, fused_shape(), rows_of(g, plan.reduce));
      }
      if constexpr (kColumnsPack<T, W>) {
        return launch(fused_backward_columns<T, W, kSmooth>, config, tensors, fused_shape(),
                      columns_shape(g, plan.reduce, dtype));
      }
    }
    return kNoSuchKernel;
  }

  int fold() const {
    FoldBackwardArgs<A> f{};
    const bool fused = plan.strategy == Strategy::kFused;
    f.sums = sums();
    f.stats = tensors.stats;
    f.sets = g.sets();
    f.pieces = plan.reduce.pieces;
    f.groups = g.sets() / g.outer();
    f.columns = g.per_element() ? 1 : g.set_channels();
    f.set_size = g.set_size();
    f.weight = args.weight;
    f.weighted = g.per_element();
    f.terms = reinterpret_cast<A*>(terms());
    f.channels = g.C;
    f.set_channels = g.set_channels();
    f.dweight = args.dweight;
    f.dbias = args.dbias;
    if (plan.param_sums == ParamSums::kShared) {
      f.param_sums = sums();
      f.param_outer = g.outer();
      f.param_pieces = fused ? 1 : plan.reduce.pieces;
    } else if (plan.param_sums != ParamSums::kNone) {
      f.param_sums = params();
      f.param_outer = 1;
      f.param_pieces = plan.param_sums == ParamSums::kAlong ? plan.reduce.blocks : plan.params.pieces;
      f.scaled = true;
    }
    return launch_fold_backward(f, stream);
  }

  template <int W, bool kSmooth>
  int run() const {
    const bool fused_first = plan.strategy == Strategy::kFused;
    int error = fused_first ? fused<W, kSmooth>() : reduce<W, kSmooth>();
    if (!error) error = reduce_params_apart<W, kSmooth>();
    if (!error) error = fold();
    if (!error) error = apply<W, kSmooth>();
    return error;
  }
};

}  // namespace

template <>
int backward_of<T>(const BackwardArgs& args, const BackwardPlan& plan, void* workspace, void* stream) {
  const Backward call{args, plan, static_cast<unsigned char*>(workspace), stream};
  return dispatch_kernel<T>(plan.apply.pack, args.activation, [&](auto pack, auto smooth) {
    return call.template run<decltype(pack)::value, decltype(smooth)::value>();
  });
}

}  // namespace fastnorm::cuda
