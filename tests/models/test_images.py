"""fastnorm's ImageNormalize against torchvision's transforms.v2, whose formula it has in one pass."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

import fastnorm
from benchmarks import images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FORMATS = {"planar": torch.contiguous_format, "channels_last": torch.channels_last}
INPUTS = (torch.uint8, torch.float32, torch.float64)
OUTPUTS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def v2() -> ModuleType:
    module: ModuleType = pytest.importorskip("torchvision.transforms.v2")
    return module


def batch(dtype: torch.dtype, layout: str) -> Tensor:
    """Every value that a uint8 has, in every channel, and shapes that no pack divides."""
    x = torch.stack([torch.randperm(256).view(1, 16, 16) for _ in range(3)], 1)[..., :15]
    x = x.to(torch.uint8) if dtype == torch.uint8 else x.to(dtype) / 255
    return x.contiguous(memory_format=FORMATS[layout])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("to", OUTPUTS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("dtype", INPUTS, ids=lambda d: str(d)[6:])
def test_values(v2: ModuleType, dtype: torch.dtype, to: torch.dtype, layout: str) -> None:
    x = batch(dtype, layout)
    wide = torch.float64 if torch.float64 in (dtype, to) else torch.float32
    theirs = v2.Compose([v2.ToDtype(wide, scale=True), v2.Normalize(MEAN, STD)])(x)
    ours = fastnorm.ImageNormalize(MEAN, STD, dtype=to)(x)
    assert ours.dtype == to and ours.is_contiguous(memory_format=FORMATS[layout])
    # Roundings of terms as large as 2.7 in float32, or in float64; and half an ulp of the result, of each of the two.
    exact = theirs.double()
    error = (ours.double() - theirs.to(to).double()).abs()
    assert (error <= torch.finfo(to).eps * exact.abs() + 4 * torch.finfo(wide).eps * 2.7).all()


def test_the_default_dtype_is_that_of_their_example(v2: ModuleType) -> None:
    x = batch(torch.uint8, "planar")
    theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=MEAN, std=STD)])(x)
    ours = fastnorm.ImageNormalize(MEAN, STD)(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)


def test_gradient(v2: ModuleType) -> None:
    x = batch(torch.float32, "planar").requires_grad_()
    dy = torch.randn_like(x)
    ours, theirs = (
        torch.autograd.grad(norm(x), x, dy)[0] for norm in (fastnorm.ImageNormalize(MEAN, STD), v2.Normalize(MEAN, STD))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_the_benchmark_finds_it_and_it_computes_the_same(v2: ModuleType) -> None:
    assert images.why_absent() is None
    for dtype, layout in (("float32", "channels_last"), ("bfloat16", "planar")):
        calls, exact = images.calls_of(images.Row((2, 3, 9, 7), dtype, layout), "cpu", True)
        assert calls.keys() == {"fastnorm", "torch", "torchvision", "clone"}
        assert images.faults(calls, exact) == []
