"""torch.fx sees a fastnorm norm as it sees torch.nn's in the same place: a leaf, or torch's own operators, once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from tests.test_tools import Make, each_norm


def traced_ops(make: Make, tracer: type[torch.fx.Tracer], ns: Any, in_model: bool) -> list[tuple[str, str]] | type:
    root = nn.Sequential(make(ns)) if in_model else make(ns)
    try:
        return [(n.op, getattr(n.target, "__name__", str(n.target))) for n in tracer().trace(root.eval()).nodes]
    except Exception as error:
        return type(error)


class Inline(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return False


class ByClass(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return type(m) in (nn.LayerNorm, nn.BatchNorm2d)


@each_norm
@pytest.mark.parametrize("in_model", [False, True], ids=["root", "child"])
@pytest.mark.parametrize("tracer", [torch.fx.Tracer, Inline, ByClass])
def test_a_leaf_where_torch_nns_is(
    make: Make, shape: tuple[int, ...], tracer: type[torch.fx.Tracer], in_model: bool
) -> None:
    expected, actual = (traced_ops(make, tracer, ns, in_model) for ns in (nn, fastnorm))
    if not in_model and isinstance(actual, list):  # the residual is a parameter of the root's, and may be left out
        actual = [op for op in actual if op not in (("placeholder", "residual"), ("call_function", "add_if_given"))]
    assert actual == expected


def subclasses(ns: Any) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    class Doubled(ns.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Permuted(ns.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class Twice(ns.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x) + 1)

    class Untouched(ns.GroupNorm):
        pass

    return {
        "doubled": (Doubled(4), (2, 3, 4)),
        "permuted": (Permuted(4), (2, 4, 3, 3)),
        "twice": (Twice(2, 4), (2, 4, 3)),
        "untouched": (Untouched(2, 4), (2, 4, 3)),
    }


@pytest.mark.parametrize("name", subclasses(nn))
@pytest.mark.parametrize("in_model", [False, True], ids=["root", "child"])
def test_tracing_a_subclass_applies_it_once(name: str, in_model: bool) -> None:
    for ns in (nn, fastnorm):
        module, shape = subclasses(ns)[name]
        model, x = nn.Sequential(module) if in_model else module, torch.randn(shape)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_traced_root_takes_a_residual_or_none(activation: str | None) -> None:
    norm, x, residual = fastnorm.LayerNorm(4, activation=activation), torch.randn(2, 4), torch.randn(2, 4)
    traced = torch.fx.symbolic_trace(norm)
    torch.testing.assert_close(traced(x), norm(x))
    torch.testing.assert_close(traced(x, residual), norm(x, residual))


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_tracing_applies_hooks_once(hook: str) -> None:
    model, x = nn.Sequential(fastnorm.GroupNorm(2, 4)), torch.randn(2, 4, 3)
    doubled = {
        "register_forward_hook": lambda module, args, output: 2 * output + 1,
        "register_forward_pre_hook": lambda module, args: (args[0] ** 2,),
    }
    getattr(model[0], hook)(doubled[hook])
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_tracing_a_wrapped_forward_applies_it_once() -> None:
    model, x = nn.Sequential(fastnorm.LayerNorm(4)), torch.randn(2, 4)
    inner = model[0].forward
    model[0].forward = lambda x: 3 * inner(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_tracing_keeps_activation_and_residual(activation: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = fastnorm.GroupNorm(2, 4, activation=activation)

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return self.norm(x, residual)

    block, x, residual = Block(), torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    for tracer in (torch.fx.Tracer, Inline):
        graph = torch.fx.GraphModule(block, tracer().trace(block))
        torch.testing.assert_close(graph(x, residual), block(x, residual))
