"""On a GPU: a training step captured in a CUDA graph, replayed, does what the same steps do eagerly, to the bit; and no
call waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from tests.common.cases import TYPICAL, Case, Layer
from tests.common.numerics import Inputs, build, call, make_inputs
from tests.common.waiting import host_goes_on

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda")
_TRACK = (("affine", True), ("track_running_stats", True))
# Fused and split, rows and columns, weights of channels and of elements.
LAYERS = (
    *TYPICAL,
    Layer("cumulative", "BatchNorm2d", (3, 6, 5, 4), (6,), (("momentum", None),)),
    Layer("fused", "BatchNorm2d", (8, 64, 14, 14), (64,)),
    Layer("split", "BatchNorm2d", (16, 64, 56, 56), (64,)),
    Layer("split", "GroupNorm", (2, 64, 128, 128), (8, 64)),
    Layer("tracked", "InstanceNorm2d", (4, 32, 24, 24), (32,), _TRACK),
    Layer("gathered", "LayerNorm", (4096, 768), (768,)),
)
STEPS = 4


def step(case: Case, module: nn.Module, inputs: Inputs) -> list[Tensor]:
    leaves = [inputs.x, inputs.residual, *module.parameters()]
    y = call(case, module, inputs.x, inputs.residual)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.grad)]


def leaf_inputs(case: Case, seed: int) -> Inputs:
    inputs = make_inputs(case, CUDA, seed=seed)
    return Inputs(inputs.x.requires_grad_(), inputs.residual.requires_grad_(), inputs.grad)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.id)
def test_training_step_replays(layer: Layer, activation: str) -> None:
    for layout in layer.layouts:
        case = Case(layer, layout, ("bfloat16", "float32"), activation, residual=True)
        module = build(case, fastnorm, CUDA)
        eager = copy.deepcopy(module)
        static = leaf_inputs(case, seed=100)
        warm_up(lambda case=case, module=module, static=static: step(case, copy.deepcopy(module), static))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(case, module, static)
        for name, buffer in module.named_buffers():  # capturing computes nothing
            assert torch.equal(buffer, eager.get_buffer(name)), name
        for i in range(STEPS):
            inputs = leaf_inputs(case, seed=i)
            with torch.no_grad():
                for held, new in zip(vars(static).values(), vars(inputs).values(), strict=True):
                    held.copy_(new)
            graph.replay()
            for j, (a, b) in enumerate(zip(captured, step(case, eager, inputs), strict=True)):
                assert torch.equal(a, b), f"output {j} of replay {i}, {layout}"
            for name, buffer in module.named_buffers():
                assert torch.equal(buffer, eager.get_buffer(name)), f"{name} after replay {i}, {layout}"


def warm_up(body) -> None:  # type: ignore[no-untyped-def]
    """As torch has it done before a capture: on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(stream)


def test_a_cumulative_average_goes_on_in_a_graph() -> None:
    """momentum=None divides by a count that only the device knows."""
    module = fastnorm.BatchNorm2d(8, momentum=None).to(CUDA)
    x = torch.empty(4, 8, 5, 5, device=CUDA)
    warm_up(lambda: copy.deepcopy(module)(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(x)
    batches = [torch.randn(4, 8, 5, 5, device=CUDA) * (i + 1) for i in range(5)]
    for batch in batches:
        x.copy_(batch)
        graph.replay()
    assert int(module.num_batches_tracked) == 5
    means = torch.stack([batch.double().mean((0, 2, 3)) for batch in batches]).mean(0)
    variances = torch.stack([batch.double().transpose(0, 1).flatten(1).var(1) for batch in batches]).mean(0)
    torch.testing.assert_close(module.running_mean.double(), means, rtol=0, atol=1e-6)
    torch.testing.assert_close(module.running_var.double(), variances, rtol=1e-5, atol=0)


def test_a_model_of_all_norms_in_a_graph() -> None:
    """As a user captures it: torch.cuda.make_graphed_callables, forward and backward."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        fastnorm.BatchNorm2d(16, activation="relu"),
        fastnorm.GroupNorm(4, 16, activation="silu"),
        fastnorm.InstanceNorm2d(16, affine=True),
        nn.Flatten(2),
        fastnorm.LayerNorm(64),
    ).to(CUDA)
    eager, x = copy.deepcopy(model), torch.randn(4, 3, 8, 8, device=CUDA, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (x,))
    results = []
    for m in (graphed, eager):
        y = m(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *m.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # the convolution's algorithm may differ


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_the_guard_bites(no_waiting: None) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=CUDA).item()


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.id)
def test_the_host_waits_for_nothing(layer: Layer, mode: str) -> None:
    for layout in layer.layouts:
        case = Case(layer, layout, ("float32", "float32"), "relu", residual=True, mode=mode)
        module, inputs = build(case, fastnorm, CUDA), leaf_inputs(case, seed=0)
        step(case, module, inputs)
        with host_goes_on():
            step(case, module, inputs)
