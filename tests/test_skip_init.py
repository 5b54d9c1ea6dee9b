"""SkipInit: values, derivatives, bytes of the state, and what torch does with a module."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fastnorm
from fastnorm import SkipInit
from tests.common.cases import DTYPES, to_layout

pytestmark = pytest.mark.emulated


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(
    ("shape", "layout"),
    [*((s, "planar") for s in ((), (7,), (4, 33), (2, 5, 17), (2, 6, 5, 3))), ((2, 6, 5, 3), "channels_last")],
    ids=str,
)
def test_values(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> None:
    """Forward and backward against the formula in float64, rounded once; alpha may be float32 with any of them."""
    for alpha_dtype in {dtype, torch.float32}:
        module = SkipInit(0.3, device=device, dtype=alpha_dtype)
        residual, branch, dy = (to_layout(torch.randn(shape).to(dtype), layout).to(device) for _ in range(3))
        leaves = [t.requires_grad_() for t in (residual, branch, module.alpha)]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        y = module(residual, branch)
        truth = exact[0] + exact[2].reshape(()) * exact[1]
        assert y.dtype == dtype and y.shape == branch.shape and y.stride() == branch.stride()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), truth, rtol=eps, atol=8 * eps)
        results = torch.autograd.grad(y, leaves, dy)
        for value, expected in zip(results, torch.autograd.grad(truth, exact, dy.double()), strict=True):
            # dalpha is summed of unrounded products: its own rounding remains, and that of the sums per channel.
            coarsest = max(eps, torch.finfo(value.dtype).eps)
            torch.testing.assert_close(value.double(), expected, rtol=2 * coarsest, atol=32 * coarsest)
        assert torch.equal(results[0], dy)


@pytest.mark.not_emulated("derivatives are formulas of torch's operators")
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4)], ids=str)
def test_derivatives(shape: tuple[int, ...]) -> None:
    module = SkipInit(0.7, dtype=torch.float64)
    residual, branch = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def f(residual: Tensor, branch: Tensor, alpha: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"alpha": alpha}, (residual, branch))

    assert gradcheck(f, (residual, branch, module.alpha))
    assert gradgradcheck(f, (residual, branch, module.alpha))


def test_starts_as_the_identity_and_learns(device: torch.device) -> None:
    """At alpha = 0 the branch gets no gradient, and alpha does."""
    module = SkipInit(device=device)
    residual, branch = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device, requires_grad=True)
    y = module(residual, branch)
    assert torch.equal(y, residual)
    y.square().sum().backward()
    assert not branch.grad.any()
    torch.testing.assert_close(module.alpha.grad, (2 * residual * branch).sum().reshape(1))


@pytest.mark.not_emulated("compiles")
def test_compiled() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.skip = nn.Linear(6, 6), SkipInit(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.skip(x, torch.relu(self.linear(x)))

    model = nn.Sequential(Block(), Block())
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 6)
    for net in (model, compiled):
        net(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), model(x))
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_traced_by_fx() -> None:
    """A call in the graph, served by the kernels, that learns the same alpha."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.skip = nn.Linear(3, 3), SkipInit(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.skip(x, self.linear(x))

    model = Block()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"] == ["skip_init"]
    x = torch.randn(4, 3)
    y = traced(x)
    torch.testing.assert_close(y, model(x))
    y.sum().backward()
    assert traced.skip.alpha is model.skip.alpha and model.skip.alpha.grad is not None


@pytest.mark.fallback(r"residual (is|has)|a torch.func transform")
def test_what_torch_serves() -> None:
    """A residual that broadcasts or has another dtype, as in torch; vmap."""
    module, branch = SkipInit(0.5), torch.randn(4, 3)
    for residual in (torch.randn(3), torch.randn(4, 1), torch.randn(4, 3, dtype=torch.float64)):
        torch.testing.assert_close(module(residual, branch), residual + 0.5 * branch)
    assert module(torch.randn(1, 3), torch.randn(3)).shape == (1, 3)
    both = torch.randn(2, 4, 3)
    torch.testing.assert_close(torch.func.vmap(module)(both, both), both + 0.5 * both)


def test_state() -> None:
    """alpha is all of it: it is saved, loaded, copied, converted to half, reset."""
    module = SkipInit(0.25)
    assert {k: v.tolist() for k, v in module.state_dict().items()} == {"alpha": [0.25]}
    other = SkipInit()
    other.load_state_dict(module.state_dict())
    file = io.BytesIO()
    torch.save(other, file)
    file.seek(0)
    for copied in (torch.load(file, weights_only=False), copy.deepcopy(other)):
        assert copied.alpha.item() == 0.25 and copied.init == 0.0
    assert module.half().alpha.dtype == torch.float16
    module.alpha.data.fill_(3)
    module.reset_parameters()
    assert module.alpha.item() == 0.25 and repr(module) == "SkipInit(init=0.25)"
    assert fastnorm.SkipInit(0.5, device="meta", dtype=torch.bfloat16).alpha.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("init", "error", "message"),
    [
        ("0", TypeError, "init must be a number, but got str"),
        (True, TypeError, "init must be a number, but got bool"),
        (float("nan"), ValueError, "init is nan, expected a finite number"),
        (float("inf"), ValueError, "init is inf"),
    ],
)
def test_refuses(init: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SkipInit(init)


@pytest.mark.parametrize("missing", ["residual", "branch"])
def test_refuses_what_is_no_tensor(missing: str) -> None:
    tensors = {"residual": torch.ones(2, 3), "branch": torch.ones(2, 3), missing: None}
    with pytest.raises(TypeError, match=f"{missing} must be a Tensor, but got NoneType"):
        SkipInit()(**tensors)


def test_any_real_number_is_a_start() -> None:
    assert fastnorm.SkipInit(np.float32(0.5)).alpha.item() == 0.5
