"""NaN and Inf: torch.nn's running statistics in every layout, and no trace of them in other sets or channels.

torch.nn on the CPU is the law: there a mean of infinities is infinite, and in torch's CUDA kernels NaN.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastnorm
from fastnorm import _C
from tests.common.cases import ACTIVATIONS, GROUP, INSTANCE, LAYER, LAYOUTS, PRECISIONS, Case, Layer, modes, to_layout
from tests.common.numerics import ACTIVATION_FUNCTIONS, Inputs, build, make_inputs, run, run_on_cpu
from tests.conftest import Backend

pytestmark = pytest.mark.emulated

INF, NAN = float("inf"), float("nan")
# Which elements of a set, as parts of its length, get which values.
PATTERNS: dict[str, dict[float, float]] = {
    "first is inf": {0.0: INF},
    "last is inf": {1.0: INF},
    "inf": {0.5: INF},
    "-inf": {0.5: -INF},
    "nan": {0.5: NAN},
    "two infs": {0.3: INF, 0.7: INF},
    "two -infs": {0.0: -INF, 0.9: -INF},
    "inf and -inf": {0.3: INF, 0.7: -INF},
    "inf and nan": {0.3: INF, 0.7: NAN},
}
_TRACK = (("affine", True), ("track_running_stats", True))
TRACKED = (
    Layer("one block", "BatchNorm1d", (64, 16), (16,)),
    Layer("tail", "BatchNorm1d", (37, 21), (21,)),
    Layer("rows of 11", "BatchNorm1d", (4, 6, 11), (6,)),
    Layer("short runs", "BatchNorm2d", (4, 21, 5, 5), (21,)),
    Layer("three dims", "BatchNorm3d", (2, 5, 3, 4, 5), (5,)),
    Layer("tracked", "InstanceNorm1d", (3, 5, 13), (5,), _TRACK),
    Layer("tracked", "InstanceNorm2d", (3, 5, 7, 5), (5,), _TRACK),
    Layer("tracked", "InstanceNorm3d", (2, 5, 3, 4, 5), (5,), _TRACK),
)
# Sets of several blocks and chunks; split over threads where there are some.
LARGE = (
    Layer("many rows", "BatchNorm1d", (9001, 19), (19,)),
    Layer("long runs", "BatchNorm2d", (2, 3, 300, 271), (3,)),
    Layer("runs of a block", "BatchNorm2d", (40, 5, 64, 64), (5,)),
    Layer("wide", "BatchNorm2d", (8, 515, 9, 9), (515,)),
    Layer("six sets", "InstanceNorm2d", (2, 3, 270, 271), (3,), _TRACK),
    Layer("two sets", "GroupNorm", (1, 6, 200, 201), (2, 6)),
    Layer("many rows", "GroupNorm", (700, 96), (32, 96)),
    Layer("three rows", "LayerNorm", (3, 70001), (70001,)),
)
# Each with sets whose last pack is not whole; in 2 dims neighbouring sets share that pack's memory.
NEIGHBOURS = (
    *(Layer(f"D is {D}", "GroupNorm", (5, 3 * D), (3, 3 * D)) for D in (1, 3, 4, 8, 17, 35, 50, 61)),
    *(layer for layer in GROUP if layer.groups > 1 and len(layer.shape) > 2 and math.prod(layer.shape) < 2**13),
    *(layer for layer in INSTANCE if layer.args[0] > 2 and math.prod(layer.shape) < 2**13),
    *(layer for layer in LAYER if len(layer.shape) == 2 and math.prod(layer.shape) < 2**13),
    Layer("odd", "BatchNorm2d", (3, 13, 7, 11), (13,)),
    Layer("pack and tail", "BatchNorm2d", (2, 65, 5, 5), (65,)),
    Layer("two dims", "BatchNorm1d", (7, 21), (21,)),
)
EPILOGUES = ((None, False), ("relu", True), ("silu", True), ("gelu_tanh", False))


def sets_of(t: Tensor, layer: Layer) -> Tensor:
    """The elements of each set as a row, whatever t's strides: a copy."""
    if layer.norm.startswith("BatchNorm"):
        return t.transpose(0, 1).reshape(t.shape[1], -1)
    if layer.norm == "LayerNorm":
        return t.reshape(t.shape[0], -1)
    if layer.norm == "GroupNorm":
        return t.reshape(len(t) * layer.groups, -1)
    return t.flatten(-int(layer.norm[-2])).flatten(0, -2)


def spoil(t: Tensor, layer: Layer, set_index: int, values: dict[float, float]) -> None:
    """Writes the values into the places of one set."""
    index = sets_of(torch.arange(t.numel(), device=t.device).view(t.shape), layer)[set_index]
    dense = t.contiguous()
    for part, value in values.items():
        dense.view(-1)[index[min(int(part * len(index)), len(index) - 1)]] = value
    t.copy_(dense)


def kinds(t: Tensor) -> Tensor:
    """0 where t is finite, else which of inf, -inf and NaN it is."""
    return t.isposinf() + 2 * t.isneginf() + 3 * t.isnan()


def wrong(ours: dict[str, Tensor], native: dict[str, Tensor], clean: dict[str, Tensor]) -> list[str]:
    """What is not as it should be: finite where torch.nn's is and, of running statistics, the same infinity; what is
    finite has the bits of a `clean` call without NaN and Inf or, where that says nothing, torch.nn's value."""
    found = []
    for name, value in ours.items():
        expected = native[name]
        finite = expected.isfinite()
        if not torch.equal(value.isfinite(), finite):
            found.append(f"{name}: finite in {int(value.isfinite().sum())} places, torch.nn's in {int(finite.sum())}")
        elif name.startswith("running") and not torch.equal(kinds(value), kinds(expected)):
            found.append(f"{name}: {value[~finite]}, torch.nn's is {expected[~finite]}")
        elif value.is_floating_point():
            eps = 16 * torch.finfo(value.dtype).eps
            size = float(expected[finite].abs().max()) if bool(finite.any()) else 0.0
            if not bool(((value == clean[name]) | value.isclose(expected, eps, eps * size))[finite].all()):
                found.append(f"{name}: finite, but another value")
    return found


def compare(
    case: Case,
    clean: Inputs,
    device: torch.device,
    spoiled: Inputs | None = None,
    change: tuple[str, dict[int, float]] | None = None,
) -> None:
    """Calls with the `spoiled` inputs, or with elements of a parameter or buffer changed, give what torch.nn gives."""
    results = []
    for namespace, ill, called in ((fastnorm, True, run), (torch.nn, True, run_on_cpu), (fastnorm, False, run)):
        module = build(case, namespace, device)
        if change and ill:
            tensors = dict(module.named_parameters()) | dict(module.named_buffers())
            with torch.no_grad():
                for i, value in change[1].items():
                    tensors[change[0]].view(-1)[i] = value
        results.append(called(case, module, spoiled if spoiled and ill else clean))
    assert not wrong(*results), f"{case.id}, {change}"


def with_spoiled(inputs: Inputs, field: str, layer: Layer, set_index: int, values: dict[float, float]) -> Inputs:
    t = getattr(inputs, field).clone()
    spoil(t, layer, set_index, values)
    return dataclasses.replace(inputs, **{field: t})


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (2, 3, 33, 40)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_running_means_that_the_dtype_does_not_have(shape: tuple[int, ...], layout: str, device: torch.device) -> None:
    """Of float16 beyond 65,504, and infinite ones of any dtype: in evaluation, values and dx."""
    mean, var = torch.tensor([7e4, INF, -INF]), torch.tensor([1e8, 1.0, 1.0])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = to_layout(torch.full(shape, 6e4).to(dtype), layout)
        results = []
        for function, place in ((torch.nn.functional.batch_norm, "cpu"), (fastnorm.functional.batch_norm, device)):
            leaf = x.to(place).requires_grad_()
            y = function(leaf, mean.to(place), var.to(place), eps=0.0)
            y[:, 0].float().sum().backward()
            assert leaf.grad is not None
            results.append((y.detach().cpu(), leaf.grad.cpu()))
        torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("layer", TRACKED, ids=lambda layer: layer.id)
def test_running_statistics(layer: Layer, pattern: str, device: torch.device) -> None:
    for layout in layer.layouts:
        for precision in PRECISIONS:
            case = Case(layer, layout, precision)
            inputs = make_inputs(case, device)
            compare(case, inputs, device, with_spoiled(inputs, "x", layer, 2, PATTERNS[pattern]))


def check_large(layer: Layer, device: torch.device) -> None:
    for layout in layer.layouts:
        for precision in PRECISIONS[1:3]:
            case = Case(layer, layout, precision)
            inputs = make_inputs(case, device)
            for values in PATTERNS.values():
                compare(case, inputs, device, with_spoiled(inputs, "x", layer, 1, values))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layer", LARGE, ids=lambda layer: layer.id)
def test_large_sets(layer: Layer, threads: int, device: torch.device, backend: Backend) -> None:
    if backend.plays:
        pytest.skip("test_running_statistics has sets that these small devices split")
    torch.set_num_threads(threads)
    check_large(layer, device)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("layout", ["planar", "channels_last"])
def test_moments(layout: str, pattern: str, device: torch.device) -> None:
    layer = Layer("moments", "BatchNorm2d", (4, 21, 5, 5), (21,))
    for precision in PRECISIONS:
        case = Case(layer, layout, precision)
        clean = make_inputs(case, device)
        x = with_spoiled(clean, "x", layer, 2, PATTERNS[pattern]).x
        mean, var = fastnorm.moments(x)
        module = torch.nn.BatchNorm2d(21, momentum=1.0, dtype=mean.dtype)
        module(x.cpu().to(mean.dtype))
        assert torch.equal(kinds(mean).cpu(), kinds(module.running_mean))
        assert torch.equal(kinds(var).cpu(), kinds(module.running_var))
        finite = mean.isfinite()
        for value, expected in zip((mean, var), fastnorm.moments(clean.x), strict=True):
            assert torch.equal(value[finite], expected[finite])


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("layer", NEIGHBOURS, ids=lambda layer: layer.id)
def test_other_sets_stay_finite(layer: Layer, value: float, device: torch.device) -> None:
    """One element of x, of the residual or of the incoming gradient is not finite."""
    for layout in layer.layouts:
        for i, (activation, residual) in enumerate(
            ((None, False), ("relu", True), ("silu", True), ("gelu_tanh", False))
        ):
            case = Case(layer, layout, PRECISIONS[i % 3], activation, residual)
            inputs = make_inputs(case, device)
            for field in ("x", "grad", *(["residual"] if residual else [])):
                compare(case, inputs, device, with_spoiled(inputs, field, layer, 1, {0.5: value}))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("layer", NEIGHBOURS, ids=lambda layer: layer.id)
def test_other_channels_stay_finite(layer: Layer, value: float, device: torch.device) -> None:
    """One weight, bias or running statistic is not finite."""
    for layout in layer.layouts:
        for mode in modes(layer):
            case = Case(layer, layout, PRECISIONS[1], "silu", mode=mode)
            module = build(case, torch.nn, device)
            for name, t in (*module.named_parameters(), *module.named_buffers()):
                if t.is_floating_point() and t.numel() > 2:
                    change = {1: value, t.numel() - 1: value}
                    compare(case, make_inputs(case, device), device, change=(name, change))


# One sum of what lies past the end of a run, and everything would be NaN: there z is -mean * rstd * weight.
CONSTANT = (
    Layer("short run", "BatchNorm2d", (2, 3, 2, 5), (3,)),
    Layer("short run", "BatchNorm1d", (3, 5, 7), (5,)),
    Layer("two dims", "BatchNorm1d", (9, 5), (5,)),
    Layer("short run", "GroupNorm", (2, 6, 5), (3, 6)),
    Layer("two dims", "GroupNorm", (2, 15), (3, 15)),
    Layer("short run", "InstanceNorm1d", (2, 5, 11), (5,), (("affine", True),)),
    Layer("short row", "LayerNorm", (4, 11), (11,)),
)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer", CONSTANT, ids=lambda layer: layer.id)
def test_large_constant(layer: Layer, activation: str | None, device: torch.device) -> None:
    """Where x is one large number everywhere, z is the bias, and all is finite."""
    for layout in layer.layouts:
        for precision in (PRECISIONS[1], PRECISIONS[3]):
            case = Case(layer, layout, precision, activation)
            inputs = make_inputs(case, device)
            inputs.x.fill_(2.0**122)  # as often as there are elements of a set, a float32 still
            module = build(case, fastnorm, device)
            results = run(case, module, inputs)
            for name, value in results.items():
                assert bool(value.isfinite().all()), f"{name} of {case.id}"
            bias = module.bias.detach().to(case.dtype)
            if layer.norm != "LayerNorm":
                bias = bias.view(-1, *[1] * (inputs.x.dim() - 2))
            torch.testing.assert_close(results["y"], ACTIVATION_FUNCTIONS[activation](bias).expand_as(inputs.x))


@pytest.mark.parametrize("capability", _C.cpu_capabilities())
def test_every_instruction_set(capability: str) -> None:
    """The tests above in a process that runs on these kernels."""
    environment = dict(os.environ, FASTNORM_CPU=capability, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [capability, "all"]


def run_all() -> None:
    device = torch.device("cpu")
    torch.set_num_threads(1)
    for layer in TRACKED:
        for pattern in ("inf", "two -infs", "inf and -inf"):
            test_running_statistics(layer, pattern, device)
    for layer in NEIGHBOURS:
        test_other_sets_stay_finite(layer, NAN, device)
        test_other_channels_stay_finite(layer, INF, device)
    for layer in CONSTANT:
        for activation in ("silu", "gelu_tanh"):
            test_large_constant(layer, activation, device)
    torch.set_num_threads(2)
    check_large(LARGE[0], device)
    print(_C.cpu_capability(), "all")


if __name__ == "__main__":
    run_all()
