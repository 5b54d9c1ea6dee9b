"""fastnorm.fuse on graphs of torch.fx and torch.export."""

from __future__ import annotations

import contextlib
import copy
import operator
import pickle

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from tests.test_convert import BLOCKS, ResNetBlock
from tests.test_fuse import FUSED, LEFT, ONE, form, fused, refusals

X = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))


def operations(graph: torch.fx.GraphModule) -> list[str]:
    return sorted(f"{node.op} {node.target}" for node in graph.graph.nodes)


def results_of(model: nn.Module, x: Tensor, r: Tensor) -> dict[str, Tensor]:
    """Output, gradients and state of a call. Forms may write into their inputs, which therefore are no leaves; and what
    autograd refuses after such a write has an output all the same."""
    a, b = x.clone().requires_grad_(), r.clone().requires_grad_()
    torch.manual_seed(1)  # dropout
    y = model(a.mul(1), b.mul(1))
    results = {"y": y.detach().clone(), **{name: t.clone() for name, t in model.state_dict().items()}}
    leaves = {"dx": a, "dr": b, **{f"d{name}": p for name, p in model.named_parameters()}}
    with contextlib.suppress(RuntimeError):
        gradients = torch.autograd.grad(y.square().sum(), list(leaves.values()), allow_unused=True)
        results |= {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return results


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_traced_blocks(block: type[nn.Module], training: bool) -> None:
    native = block().train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(native))
    before = operations(traced)
    assert fastnorm.fuse(traced) is traced and fused(traced) == FUSED[block]
    torch.testing.assert_close(traced(X), native(X), rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(traced)
    torch.testing.assert_close(again(X), traced(X))
    for graph in (traced, again):
        fastnorm.revert(graph)
        graph.load_state_dict(native.state_dict(), strict=False)  # tracing makes constants
        norms = [type(m) for m in graph.modules() if "Norm" in type(m).__name__]
        assert norms == [type(m) for m in torch.fx.symbolic_trace(native).modules() if "Norm" in type(m).__name__]
        torch.testing.assert_close(graph.eval()(X), copy.deepcopy(native).eval()(X), rtol=1e-3, atol=1e-4)
    assert operations(traced) == before


@pytest.mark.parametrize("text", [text for text in ONE if "if x" not in text and "self.training" not in text])
def test_traced_forms(text: str) -> None:
    native = form(text).double()
    traced = torch.fx.symbolic_trace(copy.deepcopy(native))
    x, r = torch.randn(2, 2, 4, 5, 5, dtype=torch.float64)
    # A graph shows a call twice, and a change in place as a node beside the users of what it changes.
    left = "for _ in" in text or "\nself.relu(y)" in text or "\ny.add_" in text or "\nz.relu_" in text
    fastnorm.fuse(traced)
    assert list(fused(traced).values()) == ([] if left else [ONE[text]]), refusals(traced)
    ours, natives = results_of(traced, x, r), results_of(native, x, r)
    assert {"y", "dx", "dnorm.weight"} <= ours.keys() or "self.layers" in text
    torch.testing.assert_close(ours, {name: natives[name] for name in ours})  # a trace has no modules that are not used


LEFT_IN_GRAPHS = {
    "y = self.norm(x)\nreturn F.relu(y) + y + r": "several places",
    "return F.relu(self.norm(x) * 2) + r": "is followed by function mul",
    "return F.relu6(self.norm(x)) + r": "is followed by function relu6",
    "return F.relu(self.norm(x)) + F.silu(self.norm(r))": "is called in several places",
    "return self.norm(x) + 1": "is added to what is no tensor",
    "y = self.norm(x)\nx = self.relu(x)\ny = y + x\nreturn y": "may change what it reads",
}


@pytest.mark.parametrize("text", LEFT_IN_GRAPHS)
def test_what_is_left_in_graphs(text: str) -> None:
    native = form(text)
    traced = torch.fx.symbolic_trace(copy.deepcopy(native))
    code = traced.code
    fastnorm.fuse(traced)
    assert traced.code == code and not fused(traced)
    assert any(LEFT_IN_GRAPHS[text] in reason for reason in refusals(traced).values()), refusals(traced)
    assert len(LEFT) > len(LEFT_IN_GRAPHS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("text", "fused_there"),
    [
        ("z = x * 1\ny = self.norm(z)\na = self.relu(z)\nreturn F.silu(y) + a", ["silu"]),
        ("z = x * 1\ny = self.norm(z)\nz.relu_()\nreturn F.silu(y) + z", ["silu"]),
        ("z = x * 2\ny = self.norm(x) + z\nw = z.mul_(3)\nreturn F.relu(y) + w + r", ["add + relu"]),
        ("z = x * 1\ny = self.norm(z)\ntorch.mul(z, 2, out=z)\nreturn F.relu(y + z)", []),
        ("z = x * 1\ny = self.norm(z)\nz = z.__imul__(2)\nreturn F.relu(y + z)", []),
        ("z = x * 1\ny = self.norm(z)\nF.relu(z, True)\nreturn F.relu(y + z)", []),
        ("z = x * 1\ny = self.norm(z)\nF.threshold_(z, 0.1, 20)\nreturn F.relu(y + z)", []),
        ("z = x * 1\ny = self.norm(z)\nw = torch.mul(z, 2)\nreturn F.relu(y + w)", ["add + relu"]),
        ("z = x * 1\ny = self.norm(z)\nw = F.relu(z, False)\nreturn F.relu(y + w)", ["add + relu"]),
    ],
)
def test_writes_around_a_norm_in_a_graph(text: str, fused_there: list[str], training: bool) -> None:
    """What writes into what the norm or the sum reads stays behind it or keeps it from being moved."""
    native = form(text).double().train(training)
    x, r = torch.randn(2, 2, 4, 5, 5, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(copy.deepcopy(native))
    fastnorm.fuse(traced)
    assert list(fused(traced).values()) == fused_there, refusals(traced)
    with torch.no_grad():
        torch.testing.assert_close(traced(x, r), native(x, r))


def fuse_in_dynamo(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
    return fastnorm.fuse(graph)


@pytest.mark.parametrize("write", ["z[0] = 5.0", "z **= 2", "z -= 1", "z.data.mul_(2)", "z = z * 2"])
def test_writes_by_operators_in_dynamo(write: str) -> None:
    native = form(f"z = x * 1\ny = self.norm(z)\n{write}\nreturn F.relu(y + z) + r").eval()
    x, r = torch.randn(2, 2, 4, 5, 5)
    torch._dynamo.reset()
    with torch.no_grad():
        ours = torch.compile(copy.deepcopy(native), backend=fuse_in_dynamo)
        torch.testing.assert_close(ours(x, r), native(x, r))


@pytest.mark.parametrize("fused_sum", [False, True])
def test_a_norm_stays_under_no_grad(fused_sum: bool) -> None:
    """torch.compile's graphs turn gradients on and off by nodes of their own."""
    norm = nn.GroupNorm(1, 3)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = norm(x)
        return torch.nn.functional.silu(y + x) if fused_sum else torch.nn.functional.silu(y) + x

    torch._dynamo.reset()
    results = []
    for f in (call, torch.compile(call, backend=fuse_in_dynamo)):
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        f(x).sum().backward()
        assert norm.weight.grad is None
        results.append(x.grad)
    torch.testing.assert_close(*results)


def double(x: Tensor) -> Tensor:
    return x.mul_(2)


torch.fx.wrap("double")


def test_an_unknown_function_may_write() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x):  # type: ignore[no-untyped-def]
            y = self.norm(x)
            return torch.relu(y + double(x))

    native = Unknown().eval()
    traced = fastnorm.fuse(torch.fx.symbolic_trace(copy.deepcopy(native)))
    assert not fused(traced) and "after double" in refusals(traced)["norm"]
    torch.testing.assert_close(traced(X.clone()), native(X.clone()))


def test_an_attribute_of_a_users_own_is_kept() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())
    model[0].activation = "mine"
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    for fused_model in (fastnorm.fuse(model), fastnorm.fuse(traced)):
        fastnorm.revert(fused_model)
        assert fused_model.get_submodule("0").activation == "mine"


def test_hooks_in_graphs() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU()

        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.relu(self.norm(x))

    for name in ("norm", "relu"):
        traced = torch.fx.symbolic_trace(Block())
        traced.get_submodule(name).register_forward_hook(lambda *args: None)
        assert not fused(fastnorm.fuse(traced)) and "hooks" in refusals(traced)["norm"]
    traced = torch.fx.symbolic_trace(Block())
    expected = traced.eval()(X)
    fastnorm.fuse(traced)
    loaded = pickle.loads(pickle.dumps(traced))  # without the nodes' meta
    torch.testing.assert_close(loaded(X), expected)
    fastnorm.revert(loaded)
    torch.testing.assert_close(loaded(X), expected)
    assert type(loaded.norm) is nn.BatchNorm2d


@pytest.mark.parametrize("fused_first", [False, True])
def test_the_traced_model_stays_as_it_is(fused_first: bool) -> None:
    """A trace shares its modules with the model."""
    native = ResNetBlock().eval()
    model = copy.deepcopy(native)
    if fused_first:
        fastnorm.fuse(model)
    types = [type(m) for m in model.modules()]
    traced = torch.fx.symbolic_trace(model)
    fastnorm.fuse(traced)
    assert fused(traced).items() >= FUSED[ResNetBlock].items() and [type(m) for m in model.modules()] == types
    for m in (traced, model):
        torch.testing.assert_close(m(X), native(X), rtol=1e-4, atol=1e-5)
    assert {id(p) for p in traced.parameters()} <= {id(p) for p in model.parameters()}


@pytest.mark.parametrize("part", ["bn1", "bn2", "conv1"])
def test_a_part_of_a_graph_can_be_reverted(part: str) -> None:
    native = ResNetBlock().eval()
    traced = fastnorm.fuse(torch.fx.symbolic_trace(copy.deepcopy(native)))
    fastnorm.revert(traced.get_submodule(part))
    torch.testing.assert_close(traced(X), native(X), rtol=1e-4, atol=1e-5)
    fastnorm.revert(traced)
    torch.testing.assert_close(traced(X), native(X), rtol=1e-4, atol=1e-5)
    assert type(traced.bn1) is type(traced.bn2) is nn.BatchNorm2d


def test_a_graph_inside_a_model() -> None:
    native = nn.Sequential(ResNetBlock(), nn.BatchNorm2d(8), nn.ReLU())
    ours = copy.deepcopy(native)
    ours[0] = torch.fx.symbolic_trace(ours[0])
    fastnorm.fuse(ours)
    assert fused(ours) == {"0.bn1": "relu", "0.bn2": "add + relu", "1": "relu"}
    torch.testing.assert_close(ours(X), native(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_exported_blocks(block: type[nn.Module], training: bool) -> None:
    native = block().train(training)
    exported = torch.export.export(copy.deepcopy(native), (X,)).module()
    before = operations(exported)
    fastnorm.fuse(exported)
    assert sorted(fused(exported).values()) == sorted(FUSED[block].values()), refusals(exported)
    torch.testing.assert_close(exported(X), native(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(exported.state_dict()), dict(native.state_dict()), rtol=1e-4, atol=1e-5)
    fastnorm.revert(exported)
    assert operations(exported) == before
    torch.testing.assert_close(exported(X), native(X), rtol=1e-4, atol=1e-5)


def test_functions_in_a_traced_graph() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6))

        def forward(self, x):  # type: ignore[no-untyped-def]
            y = torch.nn.functional.group_norm(x, 2, self.weight, eps=1e-3)
            return torch.nn.functional.silu(operator.add(y, x))

    native = Functional()
    traced = torch.fx.symbolic_trace(native)
    before = operations(traced)
    fastnorm.fuse(traced)
    assert list(fused(traced).values()) == ["add + silu"]
    torch.testing.assert_close(traced(X), native(X))
    fastnorm.revert(traced)
    assert operations(traced) == before and isinstance(traced(X), Tensor)
