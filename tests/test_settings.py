"""set_compile_mode and set_autocast_mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from fastnorm import dispatch, settings
from tests.common.numerics import assert_alike


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    fastnorm.set_compile_mode("auto")
    fastnorm.set_autocast_mode("torch")
    torch._dynamo.reset()


def test_bad_modes() -> None:
    with pytest.raises(ValueError, match="mode is 'keep', expected 'auto', 'kernel', 'decompose'"):
        fastnorm.set_compile_mode("keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode is 'kernel', expected 'torch', 'keep'"):
        fastnorm.set_autocast_mode("kernel")  # type: ignore[arg-type]
    assert (settings.compile_mode, settings.autocast_mode) == ("auto", "torch")


# ---- torch.compile ----


class Recorder:
    """A backend of torch.compile that keeps what it was given."""

    def __init__(self) -> None:
        self.graphs: list[set[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        fastnorm.BatchNorm2d(6, activation="relu"), fastnorm.GroupNorm(2, 6), fastnorm.LayerNorm(5, activation="silu")
    )


def is_ours(targets: set[str]) -> bool:
    return any("fastnorm" in target for target in targets)


@pytest.mark.parametrize("training", [True, False])
def test_compile_modes(training: bool) -> None:
    """Same numbers; a change of mode compiles anew, and back again finds what was compiled."""
    x, reference = torch.randn(4, 6, 5, 5), model().train(training)
    expected = [copy.deepcopy(reference)(x)]
    recorder = Recorder()
    compiled = torch.compile(copy.deepcopy(reference), backend=recorder, fullgraph=True)
    for mode, ours, graphs in (
        ("auto", True, 1),
        ("decompose", False, 2),
        ("kernel", True, 3),
        ("decompose", False, 3),
    ):
        fastnorm.set_compile_mode(mode)  # type: ignore[arg-type]
        assert_alike([compiled(x)], expected)
        assert len(recorder.graphs) == graphs
        assert (graphs == 3 and mode == "decompose") or is_ours(recorder.graphs[-1]) == ours


@pytest.mark.parametrize("training", [True, False])
def test_auto_decomposes_evaluation_on_a_gpu(training: bool, device: torch.device) -> None:
    """Batch norm by running statistics, there alone. torch's operators give the same values, gradients and buffers."""
    results, recorder = [], Recorder()
    for compiles in (False, True):
        norm = fastnorm.BatchNorm2d(6, activation="relu").to(device, torch.float64).train(training)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, 6, 5, 5, generator=generator, dtype=torch.float64).to(device).requires_grad_()
        call = torch.compile(norm, backend=recorder, fullgraph=True) if compiles else norm
        y = call(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *norm.parameters()]), *norm.buffers()])
    assert is_ours(recorder.graphs[0]) == (training or device.type == "cpu")
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-9)


def test_strict_mode_takes_a_choice_for_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastnorm.dispatch.strict", True)
    fastnorm.set_compile_mode("decompose")
    recorder = Recorder()
    torch.compile(model(), backend=recorder, fullgraph=True)(torch.randn(2, 6, 5, 5))
    assert not is_ours(recorder.graphs[0])


def test_eager_calls_have_no_mode() -> None:
    fastnorm.set_compile_mode("decompose")
    net = model()
    net(torch.randn(2, 6, 5, 5))
    assert [row.served_calls for row in fastnorm.report(net)] == [1, 1, 1]


def test_decomposed_gradients() -> None:
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for mode in ("kernel", "decompose"):
        fastnorm.set_compile_mode(mode)  # type: ignore[arg-type]
        net = model().double()
        y = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()]), *net.buffers()])
    for kernel, decomposed in zip(*results, strict=True):
        torch.testing.assert_close(kernel, decomposed, rtol=1e-9, atol=1e-9)


# ---- autocast ----


@pytest.fixture
def widening_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which autocast treats norms as it does on CUDA."""
    monkeypatch.setattr(dispatch, "WIDENING", frozenset(("cpu",)))


def test_where_torch_widens() -> None:
    """torch's registrations say so, and the CPU is not among them."""
    assert frozenset(d for d in fastnorm.ops.DEVICES if d == "cuda") == dispatch.WIDENING


def norms() -> list[tuple[nn.Module, bool]]:
    """Norms, and whether autocast widens them."""
    return [
        (fastnorm.GroupNorm(2, 6, activation="silu"), True),
        (fastnorm.LayerNorm(5), True),
        (fastnorm.BatchNorm2d(6), False),
        (fastnorm.InstanceNorm2d(6, affine=True), False),
    ]


@pytest.mark.usefixtures("widening_cpu")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["torch", "keep"])
def test_autocast_modes(mode: str, compiled: bool) -> None:
    fastnorm.set_autocast_mode(mode)  # type: ignore[arg-type]
    for norm, widens in norms():
        x, residual = (torch.randn(3, 6, 5, 5, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))

        def run(x: Tensor, residual: Tensor, norm: nn.Module = norm) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return norm(x, residual)  # type: ignore[no-any-return]

        y = (torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)(x, residual)
        dtype = torch.float32 if widens and mode == "torch" else torch.bfloat16
        assert y.dtype == dtype
        dx, dresidual = torch.autograd.grad(y.float().square().sum(), (x, residual))
        assert dx.dtype == dresidual.dtype == torch.bfloat16
        expected = copy.deepcopy(norm)(x.to(dtype), residual.to(dtype))
        assert_alike(y, expected)
    assert norms()[0][0](x).dtype == torch.bfloat16, "without autocast nothing widens"


@pytest.mark.usefixtures("widening_cpu")
def test_functions_widen_too() -> None:
    x = torch.randn(3, 6, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastnorm.functional.layer_norm(x, (5,)).dtype == torch.float32
        assert fastnorm.functional.group_norm(x, 2, residual=x).dtype == torch.float32
        fastnorm.set_autocast_mode("keep")
        assert fastnorm.functional.layer_norm(x, (5,)).dtype == torch.bfloat16
