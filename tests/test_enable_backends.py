"""fastnorm.enable() and the operators of torch that pick a batch norm's backend themselves: the same outputs, running
statistics and gradients as torch's own kernels give, in the same dtypes, shapes and strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastnorm
from tests.common.aten_calls import described, row_of
from tests.test_enable import switched_off  # noqa: F401

aten = torch.ops.aten


def arguments(dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    x = torch.randn(4, 6, 5, 5, dtype=dtype).contiguous(memory_format=layout)
    return (x, *(torch.rand(6, dtype=dtype) + 0.5 for _ in range(4)))


def both(call: Any) -> None:
    """What the call gives by our kernels, which serve it, and by torch's; and what it leaves in its arguments."""
    before = row_of("batch_norm").served_calls
    with fastnorm.enabled():
        ours = call()
    assert row_of("batch_norm").served_calls > before
    theirs = call()
    assert list(map(described, ours)) == list(map(described, theirs))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["_batch_norm_with_update", "_batch_norm_with_update_functional"])
def test_training(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    def call() -> list[Tensor]:
        x, *params = arguments(dtype, layout)
        return [*getattr(aten, name)(x, *params, 0.1, 1e-5), *params]

    both(call)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_evaluation(layout: torch.memory_format) -> None:
    both(lambda: aten._batch_norm_no_update(*arguments(torch.float32, layout), 0.1, 1e-5))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("update", [True, False])
def test_backward(update: bool, layout: torch.memory_format) -> None:
    x, weight, bias, mean, var = arguments(torch.float32, layout)
    forward = aten._batch_norm_with_update if update else aten._batch_norm_no_update
    _, save_mean, save_rstd, reserve = forward(x, weight, bias, mean, var, 0.1, 1e-5)
    dy = torch.randn_like(x)
    both(
        lambda: aten.batch_norm_backward(
            dy, x, weight, mean, var, save_mean, save_rstd, update, 1e-5, [True] * 3, reserve
        )
    )


def test_gradients_through_autograd() -> None:
    def call() -> tuple[Tensor, ...]:
        x, weight, bias, mean, var = arguments(torch.float64, torch.contiguous_format)
        wanted = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        y = aten._batch_norm_with_update(x, weight, bias, mean, var, 0.1, 1e-5)[0]
        return torch.autograd.grad(y.sin().sum(), wanted)

    both(call)
