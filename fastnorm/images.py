"""ImageNormalize: batches of images to normalized tensors of the wanted dtype and layout, in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch.fx
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from .dispatch import Unsupported, check_recorded, check_tensor, fall_back
from .extension import _C

__all__ = ["ImageNormalize"]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LEAST_STD = 1e-30  # its inverse is a float32
FORMATS = (torch.preserve_format, torch.contiguous_format, torch.channels_last)

#: x, offset, scale, dtype, memory_format -> (x - offset) * scale
normalize_images = torch.ops.fastnorm.normalize_images.default


class ImageNormalize(nn.Module):
    """(x / 255 - mean) / std of uint8 images, (x - mean) / std of others: torchvision's ToDtype(scale=True) and
    Normalize, and the change of the memory format, in one pass over memory instead of three or four.

    mean, std: a number for each channel, of images whose values are in [0, 1]. dtype: of the output, float32, float64,
    bfloat16 or float16; None: float32 for uint8 images, else the input's. memory_format: of the output,
    torch.contiguous_format, torch.channels_last, or torch.preserve_format for the input's.

    forward(images): (N, C, H, W) or (C, H, W), uint8 or any of the dtypes above. Interleaved images, (N, H, W, C) in
    memory, are given as `images.permute(0, 3, 1, 2)`, which copies nothing. Floating-point images get a gradient.
    Arithmetic is in float32, or float64 where the input or the output is.

    ValueError: mean and std of different lengths, one that is not finite, a std below 1e-30, images of another number
    of channels or dimensions, another memory_format. TypeError: another dtype, what is no Tensor. More than 32 channels
    are left to torch's operators.
    Source: torchvision.transforms.v2.ToDtype and Normalize.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        super().__init__()
        for name, given in (("mean", mean), ("std", std)):
            if not isinstance(given, Iterable):
                raise TypeError(f"{name} must be a number for each channel, but got {type(given).__name__}")
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.dtype, self.memory_format = dtype, memory_format
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"mean and std have {len(self.mean)} and {len(self.std)} numbers, expected one per channel"
            )
        for m in self.mean:
            if not math.isfinite(m):
                raise ValueError(f"mean has {m}, expected finite numbers")
        for s in self.std:
            if not LEAST_STD <= abs(s) < float("inf"):
                raise ValueError(f"std has {s}, expected finite numbers of at least {LEAST_STD}")
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype is {dtype}, expected None or one of {', '.join(map(str, FLOATS))}")
        if memory_format not in FORMATS:
            raise ValueError(f"memory_format is {memory_format}, expected one of {', '.join(map(str, FORMATS))}")

    def forward(self, images: Tensor) -> Tensor:
        return image_normalize(images, self.mean, self.std, self.dtype, self.memory_format)

    def why_unserved(self) -> str | None:
        """Why the kernel serves no call of this module."""
        return why_unserved(len(self.mean))

    def extra_repr(self) -> str:
        own = f"mean={self.mean}, std={self.std}, dtype={self.dtype}, memory_format={self.memory_format}"
        return own.replace("torch.", "")


def image_normalize(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
) -> Tensor:
    """ImageNormalize's forward."""
    check_tensor("images", images)
    if images.dtype != torch.uint8 and images.dtype not in FLOATS:
        raise TypeError(f"images have dtype {images.dtype}, expected uint8 or one of {', '.join(map(str, FLOATS))}")
    if images.dim() not in (3, 4) or images.shape[-3] != len(mean):
        raise ValueError(
            f"images have shape {tuple(images.shape)}, expected (N, C, H, W) or (C, H, W) with C = {len(mean)}"
        )
    if images.dim() == 3:
        return image_normalize(images[None], mean, std, dtype, memory_format)[0]
    most = 255.0 if images.dtype == torch.uint8 else 1.0
    offset, scale = [most * m for m in mean], [1 / (most * s) for s in std]
    to = dtype or (torch.float32 if images.dtype == torch.uint8 else images.dtype)
    try:
        check_recorded(images)
        if (refusal := why_unserved(len(mean))) is not None:  # torch.compile cannot catch the operator's own
            raise Unsupported(refusal)
        return normalize_images(images, offset, scale, to, memory_format)  # type: ignore[no-any-return]
    except RuntimeError as error:
        return fall_back(  # type: ignore[no-any-return]
            "ImageNormalize", error, lambda: reference(images, offset, scale, to, memory_format)
        )


torch.fx.wrap("image_normalize")  # one node of a traced graph


def why_unserved(channels: int) -> str | None:
    """Why the kernel serves no images of so many channels."""
    most = _C.MAX_IMAGE_CHANNELS
    return f"x has {channels} channels, expected at most {most}" if channels > most else None


def reference(
    x: Tensor, offset: Sequence[float], scale: Sequence[float], dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    """`normalize_images` in torch's operators."""
    accum = torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32
    a, b = (torch.tensor(values, dtype=accum, device=x.device).view(-1, 1, 1) for values in (offset, scale))
    y = ((x.to(accum) - a) * b).to(dtype)
    return y if memory_format == torch.preserve_format else y.contiguous(memory_format=memory_format)


def _format_of(x: Tensor, memory_format: torch.memory_format) -> torch.memory_format:
    if memory_format != torch.preserve_format:
        return memory_format
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last  # of a single image, too
    return suggest_memory_format(x)


def _fake(x: Tensor, offset: Any, scale: Any, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=_format_of(x, memory_format))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.scale, *_ = inputs
    ctx.dtype, ctx.format = x.dtype, _format_of(x, torch.preserve_format)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    """The same map without the offset, to x's dtype and layout."""
    zeros = [0.0] * len(ctx.scale)
    return normalize_images(dy, zeros, ctx.scale, ctx.dtype, ctx.format), None, None, None, None


torch.library.register_fake("fastnorm::normalize_images", _fake)
torch.library.register_autograd("fastnorm::normalize_images", _backward, setup_context=_setup_context)
