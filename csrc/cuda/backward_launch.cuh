// The launches of a planned backward call. backward_rows.cu and backward_columns.cu compile their traversal's kernels,
// once for each storage type.
#pragma once

#include <algorithm>

#include "apply_backward.cuh"
#include "fused_backward_columns.cuh"
#include "fused_backward_rows.cuh"
#include "launch.cuh"
#include "reduce_backward.cuh"
#include "register_backward.cuh"

namespace fastnorm::cuda {

template <class T, Traversal kTraversal>
struct Backward {
  using A = Accum<T>;
  static constexpr bool kRows = kTraversal == Traversal::kRows;

  const BackwardArgs& args;
  const BackwardPlan& plan;
  unsigned char* workspace;
  void* stream;
  const BackwardTensors<T> tensors{args};
  const Geometry& g = args.geometry;
  const DType dtype = args.dtype;

  // The parts of the workspace, null where they are empty.
  template <class V>
  V* part(int64_t begin, int64_t bytes) const {
    return bytes > 0 ? reinterpret_cast<V*>(workspace + begin) : nullptr;
  }
  GradSums<A>* sums() const { return part<GradSums<A>>(0, plan.sums_bytes); }
  GradSums<A>* params() const { return part<GradSums<A>>(plan.sums_bytes, plan.params_bytes); }
  SetTerms<A>* terms() const {
    return part<SetTerms<A>>(plan.sums_bytes + plan.params_bytes, plan.terms_bytes + given_terms_bytes(args));
  }
  void* gang_partials() const {
    return part<void>(plan.sums_bytes + plan.params_bytes + plan.terms_bytes, plan.gang_bytes);
  }

  RowsShape rows_of(const Geometry& cells, const Grid& grid) const { return rows_shape(cells, g, grid, dtype, false); }
  template <class Shape>
  Shape after_reduce(Shape shape) const {
    shape.backwards = plan.strategy == Strategy::kSplit;
    return shape;
  }

  // One launch: some blocks go down the rows, and where `along` is set others go along them.
  template <int W, bool kSmooth>
  int reduce_elements_of(bool along) const {
    constexpr int kPack = kColumnsPack<T, W> ? W : 1;
    if (plan.params.pack != kPack) return kNoSuchKernel;
    LaunchConfig config = config_of(plan.params, plan.params.shared_bytes, stream);
    RowsShape along_rows{};
    if (along) {
      config.blocks += plan.reduce.blocks;
      config.shared_bytes = std::max(config.shared_bytes, plan.reduce.shared_bytes);
      along_rows = rows_of(plan.cells, plan.reduce);
    }
    return launch(reduce_elements<T, W, kPack, kSmooth>, config, tensors, sums(), along_rows,
                  along ? plan.reduce.blocks : 0, params(), columns_shape(g, plan.params, dtype));
  }

  template <int W, bool kSmooth>
  int reduce() const {
    if constexpr (kRows) {
      if (plan.param_sums == ParamSums::kOwnLaunch) return reduce_elements_of<W, kSmooth>(plan.reduce.items > 0);
    }
    if (plan.reduce.items == 0) return 0;
    const LaunchConfig config = config_of(plan.reduce, plan.reduce.shared_bytes, stream);
    if constexpr (kRows) {
      return launch(reduce_backward_rows<T, W, kSmooth>, config, tensors, sums(), rows_of(plan.cells, plan.reduce));
    } else {
      return launch(reduce_backward_columns<T, W, kSmooth>, config, tensors, sums(),
                    columns_shape(g, plan.reduce, dtype));
    }
  }

  int fold() const {
    FoldTermsArgs<A> f{};
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
    return launch_fold_terms(f, stream);
  }

  int take_given_terms() const {
    GivenTermsArgs<A> f{};
    f.sums = static_cast<const A*>(args.sums);
    f.count = args.count;
    f.stats = tensors.stats;
    f.channels = g.C;
    f.weight = args.weight;
    f.terms = reinterpret_cast<A*>(terms());
    return launch_given_terms(f, stream);
  }

  // Whether there are partials of the parameters' gradients to fold: there are none where the sums were final.
  bool has_partials() const { return fold_of_params().sums != nullptr; }
  FoldParamsArgs<A> fold_of_params() const {
    FoldParamsArgs<A> f{};
    f.stats = tensors.stats;
    f.sets = g.sets();
    f.channels = g.C;
    f.set_channels = g.set_channels();
    f.dweight = args.dweight;
    f.dbias = args.dbias;
    const bool fused = plan.strategy == Strategy::kFused;
    if (plan.param_sums == ParamSums::kFromCells) {
      f.sums = sums();
      f.outer = g.outer();
      f.pieces = fused ? run_pieces(g, plan.reduce) : plan.reduce.pieces;
    } else if (plan.param_sums != ParamSums::kNone) {
      f.sums = params();
      f.outer = 1;
      f.pieces = plan.param_sums == ParamSums::kInGang ? plan.reduce.blocks / plan.reduce.pieces : plan.params.pieces;
      f.scaled = true;
    }
    return f;
  }

  template <int W, bool kSmooth>
  int apply() const {
    const FoldParamsArgs<A> f = fold_of_params();
    const int64_t fold_blocks =
        f.sums == nullptr ? 0 : fold_params_blocks(f.channels, f.outer * f.pieces, plan.apply.threads());
    LaunchConfig config = config_of(plan.apply, 0, stream);
    config.blocks += fold_blocks;
    const SetTerms<A>* const set_terms = terms();
    if constexpr (kRows) {
      return launch(apply_backward_rows<T, W, kSmooth>, config, tensors, set_terms,
                    after_reduce(rows_of(g, plan.apply)), f, fold_blocks);
    } else {
      return launch(apply_backward_columns<T, W, kSmooth>, config, tensors, set_terms,
                    after_reduce(columns_shape(g, plan.apply, dtype)), f, fold_blocks);
    }
  }

  FusedBackward<A> fused_args() const {
    FusedBackward<A> f{};
    f.shape = fused_shape(plan.reduce, dtype, gang_partials());
    while (1 << f.unit_shift < plan.units.threads) ++f.unit_shift;
    f.segments = static_cast<int>(plan.units.segments);
    f.unit_length = static_cast<int>(plan.units.length);
    f.batch = g.kind == Kind::kBatch;
    f.sums = sums();
    if (plan.param_sums == ParamSums::kInGang) f.gathered = params();
    if (plan.param_sums == ParamSums::kFromCells && f.batch) f.dweight = args.dweight, f.dbias = args.dbias;
    f.grid_sync = plan.grid_sync;
    f.fold = fold_of_params();
    return f;
  }

  template <int W, bool kSmooth>
  int fused() const {
    const LaunchConfig config = fused_config(plan.reduce, plan.grid_sync, stream);
    if constexpr (kRows && W * sizeof(T) == 16) {
      if (plan.reduce.place() == Place::kRegisters) {
        return launch(register_backward<T, kSmooth>, config, tensors, fused_args(),
                      register_rows_shape(g, plan.reduce, dtype));
      }
    }
    if constexpr (kRows) {
      return launch(fused_backward_rows<T, W, kSmooth>, config, tensors, fused_args(), rows_of(g, plan.reduce));
    } else {
      const ColumnsShape shape = columns_shape(g, plan.reduce, dtype);
      if constexpr (W > 1 && !kSmooth) {
        if (plan.reduce.rereads()) {
          return launch(fused_backward_columns<T, W, kSmooth, true>, config, tensors, fused_args(), shape);
        }
      }
      return launch(fused_backward_columns<T, W, kSmooth, false>, config, tensors, fused_args(), shape);
    }
  }

  template <int W, bool kSmooth>
  int run() const {
    if (plan.strategy == Strategy::kFused) {
      int error = kNoSuchKernel;
      if constexpr (kFuses<T>) error = fused<W, kSmooth>();
      if constexpr (kRows) {
        if (!error && plan.param_sums == ParamSums::kOwnLaunch) error = reduce_elements_of<W, kSmooth>(false);
      }
      if (!error && has_partials() && !plan.grid_sync) error = launch_fold_params(fold_of_params(), stream);
      return error;
    }
    int error = reduce<W, kSmooth>();
    if (!error && plan.terms_bytes > 0) error = fold();
    if (!error && args.sums != nullptr) error = take_given_terms();
    if (error) return error;
    if (plan.apply.items > 0) return apply<W, kSmooth>();
    return has_partials() ? launch_fold_params(fold_of_params(), stream) : 0;
  }
};

template <class T, Traversal kTraversal>
int run_backward(const BackwardArgs& args, const BackwardPlan& plan, void* workspace, void* stream) {
  const Backward<T, kTraversal> call{args, plan, static_cast<unsigned char*>(workspace), stream};
  return dispatch_kernel<T, kTraversal>(plan.apply.pack, args.activation, [&](auto pack, auto smooth) {
    return call.template run<decltype(pack)::value, decltype(smooth)::value>();
  });
}

}  // namespace fastnorm::cuda
