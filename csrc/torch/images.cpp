// The op normalize_images: check, allocate, call.
#include "core/images.h"

#include "backend.h"
#include "ops.h"
#include "tensor_args.h"

namespace fastnorm::ops {

namespace {

// As torch's pointwise operators see x, where suggest_memory_format() takes a single interleaved image for planar.
at::MemoryFormat format_of(const Tensor& x) {
  const bool interleaved = !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
  return interleaved ? at::MemoryFormat::ChannelsLast : x.suggest_memory_format();
}

}  // namespace

Tensor normalize_images(const Tensor& x, at::ArrayRef<double> offset, at::ArrayRef<double> scale, at::ScalarType dtype,
                        at::MemoryFormat format) {
  const Backend& backend = backend_of(x, "x");
  check_on(x, "x", x.device());
  FASTNORM_SUPPORTED(x.dim() == 4, "x has shape ", x.sizes(), ", expected (N, C, H, W)");
  ImageArgs args{};
  args.N = x.size(0);
  args.C = x.size(1);
  args.S = x.size(2) * x.size(3);
  const auto channels = static_cast<size_t>(args.C);
  FASTNORM_SUPPORTED(args.C <= kMaxImageChannels, "x has ", args.C, " channels, expected at most ", kMaxImageChannels);
  FASTNORM_SUPPORTED(offset.size() == channels && scale.size() == channels, "offset and scale have ", offset.size(),
                     " and ", scale.size(), " numbers, expected x's ", args.C, " channels");
  args.x_is_uint8 = x.scalar_type() == at::kByte;
  if (!args.x_is_uint8) args.x_dtype = dtype_of(x, "x");

  const at::MemoryFormat x_format = format_of(x);
  const at::MemoryFormat y_format = format == at::MemoryFormat::Preserve ? x_format : format;
  FASTNORM_SUPPORTED(y_format == at::MemoryFormat::Contiguous || y_format == at::MemoryFormat::ChannelsLast,
                     "memory_format is ", format, ", expected contiguous, channels_last or preserve");
  Tensor y = backend.make_empty(x.sizes(), dtype, y_format, x.device());
  args.y_dtype = dtype_of(y, "the output");
  if (x.numel() == 0) return y;
  const Tensor dense = x.contiguous(x_format);
  args.x = dense.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.x_interleaved = x_format == at::MemoryFormat::ChannelsLast;
  args.y_interleaved = y_format == at::MemoryFormat::ChannelsLast;
  std::copy(offset.begin(), offset.end(), args.offset);
  std::copy(scale.begin(), scale.end(), args.scale);
  backend.normalize_images(args, x.device());
  return y;
}

}  // namespace fastnorm::ops
