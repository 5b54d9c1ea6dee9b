"""Outputs larger than the last cache are stored past it; they have the same bits as parts that fit it."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from fastnorm import functional
from tests.common.cases import to_layout

# More than half of the last cache: csrc/plan/cpu.cpp streams calls of two such tensors. With a cache beyond 64 MiB it
# does not, and the test is only one of large tensors.
CACHE = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0
BYTES = min(max(CACHE, 16 << 20) * 5 // 8, 40 << 20)


def gradients(y: Tensor, *leaves: Tensor) -> list[Tensor]:
    """y, and the gradients of `leaves` for the incoming gradient y / 2."""
    return [y.detach(), *torch.autograd.grad(y, leaves, y.detach() / 2)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 37], ids=["aligned", "odd"])
@pytest.mark.parametrize("layout", ["planar", "channels_last"])
@pytest.mark.parametrize("activation", ["relu", "silu", None])
def test_instance_norm(activation: str | None, layout: str, width: int, dtype: torch.dtype, threads: int) -> None:
    """With relu the bits of a mask go with whole packs, where runs begin in the middle of a line."""
    channels = width // 2
    samples = BYTES // (channels * width * width * dtype.itemsize) // 4 * 4
    x, residual = (
        to_layout(torch.randn(samples, channels, width, width, dtype=dtype), layout).requires_grad_() for _ in range(2)
    )
    torch.set_num_threads(threads)
    whole = gradients(functional.instance_norm(x, residual=residual, activation=activation), x, residual)
    for i in range(0, samples, samples // 4):
        part = slice(i, i + samples // 4)
        a, b = (t.detach()[part].requires_grad_() for t in (x, residual))
        parts = gradients(functional.instance_norm(a, residual=b, activation=activation), a, b)
        assert all(torch.equal(t[part], p) for t, p in zip(whole, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [96, 333])
def test_layer_norm(columns: int, dtype: torch.dtype) -> None:
    rows = BYTES // (columns * dtype.itemsize) // 4 * 4
    x = torch.randn(rows, columns, dtype=dtype, requires_grad=True)
    whole = gradients(functional.layer_norm(x, (columns,), activation="silu"), x)
    for i in range(0, rows, rows // 4):
        part = x.detach()[i : i + rows // 4].requires_grad_()
        parts = gradients(functional.layer_norm(part, (columns,), activation="silu"), part)
        assert all(torch.equal(t[i : i + rows // 4], p) for t, p in zip(whole, parts, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("width", [56, 37], ids=["aligned", "odd"])
def test_batch_norm(width: int, frozen: bool) -> None:
    """The parts are channels."""
    samples = BYTES // (16 * width * width * 4)
    x = torch.randn(samples, 16, width, width, requires_grad=True)
    mean, var = torch.randn(16), torch.rand(16) + 0.5
    whole = gradients(functional.batch_norm(x, mean, var, training=not frozen, activation="relu"), x)
    for c in range(0, 16, 4):
        part = x.detach()[:, c : c + 4].contiguous().requires_grad_()
        statistics = (None, None) if not frozen else (mean[c : c + 4], var[c : c + 4])
        y = functional.batch_norm(part, *statistics, training=not frozen, activation="relu")
        assert all(torch.equal(t[:, c : c + 4], p) for t, p in zip(whole, gradients(y, part), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(3, 5), (4, 8), (3, 11), (6, 6), (7, 7), (8, 8), (14, 14), (22, 23)], ids=str)
@pytest.mark.parametrize("samples", [1, 3, 11])
@pytest.mark.parametrize("activation", ["relu", "gelu", None])
def test_evaluation_of_short_runs(
    activation: str | None, samples: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Packs go over the ends of runs of a channel; channels_last has none of these, and the same arithmetic."""
    shape = (samples, 5, *size)
    x, residual = (torch.randn(shape).to(dtype) for _ in range(2))
    weight, bias, mean, var = torch.rand(4, 5, dtype=torch.promote_types(dtype, torch.float32))
    results = [
        functional.batch_norm(
            to_layout(x, layout), mean, var, weight, bias, residual=to_layout(residual, layout), activation=activation
        )
        for layout in ("planar", "channels_last")
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_of_many_short_runs(dtype: torch.dtype) -> None:
    """Their lines are stored past the cache."""
    samples = BYTES // (64 * 14 * 14 * dtype.itemsize)
    x, mean, var = torch.randn(samples, 64, 14, 14, dtype=dtype), torch.randn(64), torch.rand(64) + 0.5
    whole = functional.batch_norm(x, mean, var)
    for i in range(0, samples, 16):
        assert torch.equal(whole[i : i + 16], functional.batch_norm(x[i : i + 16], mean, var))
