"""Compiled autograd: torch.compile of the backward of an eager forward, which asks every node for its own operator."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import fastnorm
from tests.common.cases import TYPICAL, Case, Layer
from tests.common.numerics import build, call, make_inputs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    compiled_autograd.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def backend() -> CompileCounterWithBackend:
    return CompileCounterWithBackend("aot_eager")


def backward(loss: Tensor, backend: Any) -> None:
    """By the eager engine where backend is None; else compiled, in one graph."""
    if backend is None:
        return loss.backward()
    with compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
        loss.backward()


def gradients(case: Case, module: nn.Module, backend: Any) -> list[Tensor]:
    """Of x, the residual and the parameters."""
    inputs, module = make_inputs(case, CPU), copy.deepcopy(module)
    y = call(case, module, inputs.x.requires_grad_(), inputs.residual)
    backward((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), backend)
    return [t.grad for t in (inputs.x, inputs.residual, *module.parameters()) if t is not None and t.grad is not None]


@pytest.mark.parametrize("layer", TYPICAL, ids=lambda layer: layer.norm)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
def test_gradients_are_those_of_the_eager_engine(
    layer: Layer, activation: str | None, residual: bool, backend: CompileCounterWithBackend
) -> None:
    case = Case(layer, activation=activation, residual=residual)
    module = build(case, fastnorm, CPU)
    expected = gradients(case, module, None)
    for _ in range(2):
        torch.testing.assert_close(gradients(case, module, backend), expected, rtol=0, atol=0)
    assert backend.frame_count == 1, "the graph was not found again"


def test_what_is_no_tensor_belongs_to_the_graph(backend: CompileCounterWithBackend) -> None:
    for settings in ({"num_groups": 2}, {"num_groups": 3}, {"num_groups": 3, "activation": "leaky_relu"}):
        module = fastnorm.GroupNorm(num_channels=6, **settings)  # type: ignore[arg-type]
        leaves = [torch.linspace(-1, 2, 600).view(4, 6, 5, 5).requires_grad_() for _ in range(2)]
        for leaf, how in zip(leaves, (None, backend), strict=True):
            backward(module(leaf).pow(3).sum(), how)
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=0, atol=0)
    assert backend.frame_count == 3


def test_saved_tensor_hooks_run_in_the_graph(backend: CompileCounterWithBackend) -> None:
    module = fastnorm.GroupNorm(2, 6, activation="silu")
    leaves = [torch.linspace(-1, 2, 600).view(4, 6, 5, 5).requires_grad_() for _ in range(2)]
    for leaf, how in zip(leaves, (None, backend), strict=True):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t + 1, lambda t: t - 1):
            loss = module(leaf).pow(3).sum()
        backward(loss, how)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
