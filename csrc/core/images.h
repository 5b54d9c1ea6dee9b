// The arguments of a call that normalizes images: y = (x - offset) * scale, two numbers for each channel, from any
// of the types and layouts of images to any other in one pass.
#pragma once

#include <type_traits>

#include "dtype.h"

namespace fastnorm {

constexpr int64_t kMaxImageChannels = 32;

struct ImageArgs {
  const void* x;
  void* y;
  bool x_is_uint8;
  DType x_dtype, y_dtype;             // x_dtype: where x is not uint8
  int64_t N, C, S;                    // images, channels, pixels
  bool x_interleaved, y_interleaved;  // the channels of a pixel are neighbours (channels_last); else planes
  double offset[kMaxImageChannels], scale[kMaxImageChannels];

  int64_t numel() const { return N * C * S; }
};

// What the arithmetic is in.
template <class In, class Out>
using ImageAccum = std::conditional_t<std::is_same_v<In, double> || std::is_same_v<Out, double>, double, float>;

// Calls f(Tag<In>{}, Tag<Out>{}).
template <class F>
decltype(auto) dispatch_image(const ImageArgs& args, F&& f) {
  return dispatch(args.y_dtype, [&](auto out) -> decltype(auto) {
    if (args.x_is_uint8) return f(Tag<uint8_t>{}, out);
    return dispatch(args.x_dtype, [&](auto in) -> decltype(auto) { return f(in, out); });
  });
}

}  // namespace fastnorm
