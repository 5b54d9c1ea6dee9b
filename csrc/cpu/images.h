// Normalizes images: y = (x - offset) * scale with two numbers for each channel.
//
// A tile of pixels goes through the L1 cache: it is widened, shifted and scaled in the order of x, put into the order
// of y where that is another, and narrowed. Each of the three is a loop that the compiler makes vectors of, so that a
// type or a layout more is no loop more.
#pragma once

#include <bit>

#include "core/images.h"
#include "task.h"

namespace fastnorm::FASTNORM_CPU_CAPABILITY {

template <class In, class Out>
class NormalizeImages {
 public:
  explicit NormalizeImages(const cpu::ImageCall& call) : args_(call), parallel_(call.parallel) {}

  void run() const {
    const int64_t tiles = div_up(args_.S, pixels_), tasks_per_image = div_up(tiles, kTilesPerTask);
    for_each_task(parallel_, args_.N * tasks_per_image, [&](int64_t task) {
      const int64_t image = task / tasks_per_image, first = task % tasks_per_image * kTilesPerTask;
      normalize(image, first, std::min(first + kTilesPerTask, tiles));
    });
  }

 private:
  using A = ImageAccum<In, Out>;
  static constexpr int64_t kTile = 1536;        // elements: four arrays of them stay in the L1 cache
  static constexpr int64_t kTilesPerTask = 32;  // 50 thousand elements: some 10 microseconds

  const ImageArgs& args_;
  const Parallel parallel_;
  const int64_t C_ = args_.C, pixels_ = std::max<int64_t>(kTile / C_ / 16 * 16, 16);
  const bool reorders_ = args_.x_interleaved != args_.y_interleaved && C_ > 1;

  void normalize(int64_t image, int64_t first, int64_t end) const {
    const int64_t n = pixels_ * C_;
    const Buffer<A> offset(n), scale(n), tile(n), reordered(n);
    // Of every element of a tile: planes of `pixels_`, or the channels of pixel after pixel.
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = args_.x_interleaved ? i % C_ : i / pixels_;
      offset[i] = static_cast<A>(args_.offset[c]);
      scale[i] = static_cast<A>(args_.scale[c]);
    }
    for (int64_t pixel = first * pixels_; pixel < std::min(end * pixels_, args_.S); pixel += pixels_) {
      const int64_t count = std::min(pixels_, args_.S - pixel);
      for_each_run(args_.x_interleaved, image, pixel, count, [&](int64_t place, int64_t in_tile, int64_t length) {
        widen(static_cast<const In*>(args_.x) + place, length, offset + in_tile, scale + in_tile, tile + in_tile);
      });
      const A* ordered = tile;
      if (reorders_) {
        reorder(tile, count, reordered);
        ordered = reordered;
      }
      for_each_run(args_.y_interleaved, image, pixel, count, [&](int64_t place, int64_t in_tile, int64_t length) {
        narrow(ordered + in_tile, length, static_cast<Out*>(args_.y) + place);
      });
    }
  }

  // The stretches of memory that a tile is: their places in the tensor and in the tile, and their lengths.
  template <class F>
  void for_each_run(bool interleaved, int64_t image, int64_t pixel, int64_t count, F&& f) const {
    if (interleaved) return f((image * args_.S + pixel) * C_, 0, count * C_);
    for (int64_t c = 0; c < C_; ++c) f((image * C_ + c) * args_.S + pixel, c * pixels_, count);
  }

  void reorder(const A* from, int64_t count, A* to) const {
    const auto with = [&](auto channels) {
      const int64_t C = channels;
      for (int64_t c = 0; c < C; ++c) {
        A* const plane_to = to + c * pixels_;
        const A* const plane_from = from + c * pixels_;
        if (args_.x_interleaved) {
          for (int64_t i = 0; i < count; ++i) plane_to[i] = from[i * C + c];
        } else {
          for (int64_t i = 0; i < count; ++i) to[i * C + c] = plane_from[i];
        }
      }
    };
    switch (C_) {
      case 3: return with(std::integral_constant<int64_t, 3>{});
      case 4: return with(std::integral_constant<int64_t, 4>{});
      default: return with(C_);
    }
  }

  // ---- conversions: float16 by the processor's own, pack by pack, the others as GCC makes vectors of them ----

  static constexpr int64_t kPack = kLanes<float>;

  static void widen(const In* x, int64_t n, const A* offset, const A* scale, A* out) {
    if constexpr (std::is_same_v<In, Float16>) {
      for (int64_t i = 0; i < n; i += kPack) {
        const int64_t count = std::min(kPack, n - i);
        alignas(kPackBytes) float lanes[kPack];
        store(lanes, load_first(x + i, count));
        for (int64_t k = 0; k < count; ++k) out[i + k] = (static_cast<A>(lanes[k]) - offset[i + k]) * scale[i + k];
      }
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = (value(x[i]) - offset[i]) * scale[i];
    }
  }
  static A value(uint8_t v) { return static_cast<A>(static_cast<int32_t>(v)); }
  static A value(float v) { return static_cast<A>(v); }
  static A value(double v) { return static_cast<A>(v); }
  static A value(BFloat16 v) { return static_cast<A>(std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16)); }

  static void narrow(const A* values, int64_t n, Out* y) {
    if constexpr (std::is_same_v<Out, Float16>) {
      for (int64_t i = 0; i < n; i += kPack) {
        const int64_t count = std::min(kPack, n - i);
        alignas(kPackBytes) float lanes[kPack] = {};
        for (int64_t k = 0; k < count; ++k) lanes[k] = static_cast<float>(values[i + k]);
        store_first(y + i, load(lanes), count);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) put(values[i], y[i]);
    }
  }
  static void put(A v, float& y) { y = static_cast<float>(v); }
  static void put(A v, double& y) { y = v; }
  static void put(A v, BFloat16& y) {  // to nearest even; a NaN stays one
    const uint32_t u = std::bit_cast<uint32_t>(static_cast<float>(v)), rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    y.bits = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? u >> 16 | 0x40 : rounded);
  }
};

}  // namespace fastnorm::FASTNORM_CPU_CAPABILITY
