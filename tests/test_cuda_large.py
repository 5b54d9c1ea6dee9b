"""On a GPU: tensors of more than 2^31 elements, forward and backward, in both layouts. Sets at the ends and in the
middle are computed again in float64."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnorm import functional
from tests.common.cases import Layer

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda")
NEEDED = 60 << 30  # bytes of device memory
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Large:
    layer: Layer
    layout: str

    @property
    def id(self) -> str:
        return f"{self.layer.id}-{self.layout}"


LARGE = [
    Large(Layer("batch", "BatchNorm2d", (5, 67, 2531, 2533), (67,)), "planar"),
    Large(Layer("batch", "BatchNorm2d", (5, 64, 2597, 2591), (64,)), "channels_last"),
    Large(Layer("group", "GroupNorm", (2, 48, 4733, 4729), (6, 48)), "planar"),
    Large(Layer("group", "GroupNorm", (2, 48, 4733, 4729), (6, 48)), "channels_last"),
    Large(Layer("instance", "InstanceNorm2d", (3, 41, 4181, 4177), (41,)), "planar"),
    Large(Layer("instance", "InstanceNorm2d", (3, 40, 4231, 4237), (40,)), "channels_last"),
    Large(Layer("positions", "LayerNorm2d", (3, 41, 4181, 4177), (41,)), "planar"),
    Large(Layer("rows", "LayerNorm", (2800001, 768), (768,)), "planar"),
    Large(Layer("long rows", "LayerNorm", (17, 126400001), (126400001,)), "planar"),
]


def large_tensor(case: Large, seed: int) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    shape = case.layer.shape
    if case.layout == "channels_last":
        n, c, h, w = shape
        t = torch.empty(n, h, w, c, dtype=torch.bfloat16, device=CUDA).permute(0, 3, 1, 2)
    else:
        t = torch.empty(shape, dtype=torch.bfloat16, device=CUDA)
    assert t.numel() > 2**31
    return t.normal_(0.5, 2, generator=generator)


def norm(case: Large, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    layer = case.layer
    if layer.norm == "LayerNorm":
        return functional.layer_norm(x, layer.args, weight, bias, EPS, activation="relu")
    if layer.norm == "LayerNorm2d":
        return functional.layer_norm2d(x, weight, bias, EPS, activation="relu")
    if layer.norm == "GroupNorm":
        return functional.group_norm(x, layer.groups, weight, bias, EPS, activation="relu")
    if layer.norm == "InstanceNorm2d":
        return functional.instance_norm(x, None, None, weight, bias, eps=EPS, activation="relu")
    return functional.batch_norm(x, None, None, weight, bias, True, 0.1, EPS, activation="relu")


def some_sets(case: Large) -> Iterator[tuple[Any, ...]]:
    """Sample or row, channels, and of LayerNorm2d the position: of the first set, one in the middle and the last."""
    n, c, *space = case.layer.shape
    if case.layer.norm == "LayerNorm2d":
        yield from ((i * (n - 1) // 2, slice(0, c), *(i * (size - 1) // 2 for size in space)) for i in range(3))
    elif case.layer.norm == "LayerNorm":
        yield from ((row, slice(0, c)) for row in (0, n // 2, n - 1))
    elif case.layer.norm == "BatchNorm2d":
        yield from ((slice(None), slice(channel, channel + 1)) for channel in (0, c // 2, c - 1))
    else:
        groups = case.layer.groups
        per_group = c // groups
        for sample, group in ((0, 0), (n // 2, groups // 2), (n - 1, groups - 1)):
            yield sample, slice(group * per_group, (group + 1) * per_group)


def largest(t: Tensor) -> float:
    return float(t.abs().max())


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_forward_and_backward(case: Large) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GB of free device memory")
    channels = case.layer.shape[1]
    weight, bias = (torch.rand(channels, device=CUDA).add_(0.5).requires_grad_() for _ in range(2))
    x, dy = large_tensor(case, 0).requires_grad_(), large_tensor(case, 1)
    y = norm(case, x, weight, bias)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    assert y.stride() == dx.stride() == x.stride()
    for index in some_sets(case):
        chosen = index[1]
        part = [t.detach()[index].double() for t in (x, dy, y, dx)]
        # One set, as [channels or nothing, elements]: its channels' weights beside it.
        if case.layer.norm == "BatchNorm2d":
            part = [t.transpose(0, 1) for t in part]
        rows = 1 if case.layer.norm == "LayerNorm" else chosen.stop - chosen.start
        xs, dys, ys, dxs = (t.reshape(rows, -1) for t in part)
        w, b = (t.detach()[chosen].double().view(rows, -1) for t in (weight, bias))
        rstd = (xs.var(unbiased=False) + EPS).rsqrt()
        xhat = (xs - xs.mean()) * rstd
        z = xhat * w + b
        assert largest(ys - z.clamp_min(0)) <= 2**-8 * largest(z)
        d = dys * (z > 0)
        wd = w * d
        exact = rstd * (wd - wd.mean() - xhat * (wd * xhat).mean())
        # At z = 0 a rounding decides: there the difference is the whole of dy.
        kink = z.abs() < 1e-3
        assert largest((dxs - exact).masked_fill(kink, 0)) <= 2**-7 * largest(exact)
        if case.layer.norm == "BatchNorm2d":
            scale = d.abs().sum(), (d * xhat).abs().sum()
            assert abs(float(dbias[chosen]) - float(d.sum())) <= 1e-5 * float(scale[0])
            assert abs(float(dweight[chosen]) - float((d * xhat).sum())) <= 1e-5 * float(scale[1])
