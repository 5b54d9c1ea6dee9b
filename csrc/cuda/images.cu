// Normalizes images: y = (x - offset) * scale with two numbers for each channel.
//
// Who: a thread owns W neighbouring pixels and goes through their channels. In planes its W elements of a channel are a
// pack, and neighbouring threads read neighbouring packs; channels_last its W * C elements are neighbours, which it
// takes one by one, and the L1 cache serves what a line holds beside them. Traffic: x is read once, y is written once.
// Needs: W divides the pixels of an image, and planes are aligned to packs of W elements.
#include "core/images.h"

#include "fast_div.h"
#include "launch.cuh"
#include "pack.cuh"

namespace fastnorm::cuda {

namespace {

constexpr int kImageThreads = 256;
constexpr int64_t kMaxImageBlocks = 1 << 16;

// Elements from a pixel to the next, and from a channel to the next.
struct ImageStrides {
  int64_t pixel, channel;
  ImageStrides() = default;
  ImageStrides(const ImageArgs& args, bool interleaved)
      : pixel(interleaved ? args.C : 1), channel(interleaved ? 1 : args.S) {}
};

template <class A>
struct ImageShape {
  int64_t groups;  // of W pixels, of all images
  WideDiv groups_of_image;
  int64_t C, S;
  ImageStrides x, y;
  A offset[kMaxImageChannels], scale[kMaxImageChannels];
};

template <class A, class T>
FASTNORM_DEVICE A widen_pixel(T v) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    return static_cast<A>(v);
  } else {
    return widen<A>(v);
  }
}

// W elements, `step` apart: a pack where they are neighbours.
template <int W, class A, class T>
FASTNORM_DEVICE void load_pixels(const T* p, int64_t step, A (&out)[W]) {
  if constexpr (W > 1) {
    if (step == 1) {
      T lanes[W];
      const Pack<T, W> pack = load<W>(p);
      memcpy(lanes, &pack, sizeof lanes);
#pragma unroll
      for (int w = 0; w < W; ++w) out[w] = widen_pixel<A>(lanes[w]);
      return;
    }
  }
#pragma unroll
  for (int w = 0; w < W; ++w) {
    note_read(p + w * step, sizeof(T), Access::kStream);
    out[w] = widen_pixel<A>(p[w * step]);
  }
}
template <int W, class A, class T>
FASTNORM_DEVICE void store_pixels(T* p, int64_t step, const A (&values)[W]) {
  if constexpr (W > 1) {
    if (step == 1) return store<W>(p, narrow<T>(values));
  }
#pragma unroll
  for (int w = 0; w < W; ++w) {
    note_write(p + w * step, sizeof(T), Access::kStream);
    p[w * step] = narrow<T>(values[w]);
  }
}

template <class In, class Out, int W>
FASTNORM_KERNEL(kImageThreads, 2)
normalize_images(const In* x, Out* y, const ImageShape<ImageAccum<In, Out>> shape) {
  using A = ImageAccum<In, Out>;
  const int64_t step = grid_blocks() * block_threads();
  for (int64_t group = block_index() * block_threads() + thread_index(); group < shape.groups; group += step) {
    const int64_t image = shape.groups_of_image.divide(group);
    const int64_t pixel = (group - image * shape.groups_of_image.divisor) * W, base = image * shape.C * shape.S;
    const In* const first_x = x + base + pixel * shape.x.pixel;
    Out* const first_y = y + base + pixel * shape.y.pixel;
    for (int64_t c = 0; c < shape.C; ++c) {
      A v[W];
      load_pixels<W>(first_x + c * shape.x.channel, shape.x.pixel, v);
#pragma unroll
      for (int w = 0; w < W; ++w) v[w] = (v[w] - shape.offset[c]) * shape.scale[c];
      store_pixels<W>(first_y + c * shape.y.channel, shape.y.pixel, v);
    }
  }
}

template <class In, class Out, int W>
int launch_width(const ImageArgs& args, void* stream) {
  using A = ImageAccum<In, Out>;
  ImageShape<A> shape{};
  shape.groups = args.N * args.S / W;
  shape.groups_of_image = WideDiv(args.S / W);
  shape.C = args.C;
  shape.S = args.S;
  shape.x = ImageStrides(args, args.x_interleaved);
  shape.y = ImageStrides(args, args.y_interleaved);
  for (int64_t c = 0; c < args.C; ++c) {
    shape.offset[c] = static_cast<A>(args.offset[c]);
    shape.scale[c] = static_cast<A>(args.scale[c]);
  }
  const int64_t blocks = std::min((shape.groups + kImageThreads - 1) / kImageThreads, kMaxImageBlocks);
  return launch(normalize_images<In, Out, W>, LaunchConfig{blocks, kImageThreads, 0, stream},
                static_cast<const In*>(args.x), static_cast<Out*>(args.y), shape);
}

}  // namespace

int launch_normalize_images(const ImageArgs& args, void* stream) {
  return dispatch_image(args, [&](auto in, auto out) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    if constexpr (std::is_same_v<ImageAccum<In, Out>, float>) {
      const auto aligned = [](const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
      if (args.S % 4 == 0 && aligned(args.x, 4 * sizeof(In)) && aligned(args.y, 4 * sizeof(Out))) {
        return launch_width<In, Out, 4>(args, stream);
      }
    }
    return launch_width<In, Out, 1>(args, stream);
  });
}

}  // namespace fastnorm::cuda
