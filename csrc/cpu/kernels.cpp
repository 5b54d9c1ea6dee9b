// The kernels of one instruction set. This file is compiled once for each; FASTNORM_CPU_CAPABILITY names it.
#include "columns_backward.h"
#include "columns_forward.h"
#include "eval_forward.h"
#include "images.h"
#include "layer_backward.h"
#include "layer_forward.h"
#include "positions_backward.h"
#include "positions_forward.h"
#include "rows_backward.h"
#include "rows_forward.h"
#include "short_runs.h"

#define FASTNORM_STRING_(s) #s
#define FASTNORM_STRING(s) FASTNORM_STRING_(s)

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

static void forward(const ForwardCall& args) {
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (args.has_statistics()) {
      EvalForward<T>(args).run();
    } else if (args.geometry.sets_are_positions()) {
      PositionsForward<T>(args).run();
    } else if (args.geometry.traversal() == Traversal::kColumns) {
      ColumnsForward<T>(args).run();
    } else if (has_short_runs<T>(args)) {
      ShortRunsForward<T>(args).run();
    } else if (args.geometry.per_element() && args.geometry.D() <= kBlock * kChunkBlocks) {
      LayerForward<T>(args).run();
    } else {
      RowsForward<T>(args).run();
    }
  });
}

static void backward(const BackwardCall& args) {
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (args.geometry.sets_are_positions()) {
      PositionsBackward<T>(args).run();
    } else if (args.geometry.traversal() == Traversal::kColumns) {
      ColumnsBackward<T>(args).run();
    } else if (has_short_runs<T>(args)) {
      ShortRunsBackward<T>(args).run();
    } else if (args.geometry.per_element()) {
      LayerBackward<T>(args).run();
    } else {
      RowsBackward<T>(args).run();
    }
  });
}

static void normalize_images(const ImageCall& call) {
  dispatch_image(call, [&](auto in, auto out) {
    NormalizeImages<typename decltype(in)::type, typename decltype(out)::type>(call).run();
  });
}

extern const cpu::Kernels kernels;
const cpu::Kernels kernels{FASTNORM_STRING(FASTNORM_CPU_CAPABILITY), forward, backward, normalize_images};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
