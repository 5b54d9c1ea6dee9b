"""The kernels as nvcc compiles them, under the interpreter of tests/ptx: gangs and schedules, other architectures, and
the host half of csrc/cuda on tests/ptx's CUDA runtime. That they compute what torch.nn does is in the tests marked
`emulated`, with the backend `ptx`."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator

import pytest
import torch

import fastnorm
from tests.common.cases import LAYERS, Case, Layer
from tests.common.gang_calls import GangCall, errors_of, gang_calls
from tests.common.gangs import FEW, facts_of
from tests.common.numerics import build, make_inputs
from tests.common.ptx_mutants import Module
from tests.common.raw_calls import RawCall, same_bits
from tests.conftest import NO_NVCC, PTX
from tests.ptx import backend
from tests.ptx import build as ptx_build

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(ptx_build.nvcc() is None, reason=NO_NVCC)]

CPU = torch.device("cpu")
PRECISIONS = (("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16"))
EPILOGUES = ((None, False), ("silu", True), ("relu", True), ("leaky_relu", True), ("gelu", False))
NUMBERS = itertools.count(1)


def raw(case: Case) -> RawCall:
    return RawCall(case, make_inputs(case, CPU), torch.ops.fastnorm_ptx)


@pytest.mark.parametrize("call", list(gang_calls(PRECISIONS, EPILOGUES)), ids=lambda call: call.id)
def test_gangs(call: GangCall) -> None:
    """No defect, the right values, and the same bits under every schedule."""
    ptx, calls = backend.load(), call.raw()
    with ptx.configured(device=call.device, forced=call.forced):
        results = calls.both()
    assert not errors_of(call.case, results)
    for order, seed in (("lifo", 0), ("random", 1), ("priority", 2)):
        with ptx.configured(order, seed, call.device, forced=call.forced):
            assert not same_bits(calls.both(), results), f"{order}, seed {seed}"


# ---- other architectures ----

# The kernels of one storage type for each direction; and the device of tests/emulator/device.h for each architecture.
OTHERS = (
    ("forward_rows", "float"),
    ("forward_columns", "float"),
    ("backward_rows", "BFloat16"),
    ("backward_columns", "BFloat16"),
    ("fold", ""),
)
ARCHES = {"sm_75": "small", "sm_80": "alone"}


@pytest.fixture(scope="module", params=["sm_75", pytest.param("sm_80", marks=pytest.mark.whole)])
def device_of_arch(request: pytest.FixtureRequest) -> Iterator[str]:
    ptx = backend.load()
    ptx.load_kernels(request.param, OTHERS)
    yield ARCHES[request.param]
    ptx.load_kernels(kernels=OTHERS)


@pytest.mark.parametrize("layer", LAYERS[::3], ids=lambda layer: layer.id)
def test_other_architectures(layer: Layer, device_of_arch: str) -> None:
    """sm_75 copies through registers, and neither has clusters."""
    ptx = backend.load()
    for layout in layer.layouts:
        case = Case(layer, layout, ("float32", "float32"), "silu")
        with ptx.configured(device=device_of_arch):
            assert not errors_of(case, raw(case).forward())
        case = Case(layer, layout, ("bfloat16", "float32"), "relu", True)
        call = raw(case)
        with ptx.configured(device=device_of_arch):
            saved = call.forward()
            assert not errors_of(case, call.backward(saved["stats"], saved["mask"]))


# ---- memory ----


def shifted(module: Module, kernel: str, opcode: str) -> str:
    """The kernel with all such accesses one float32 farther on."""
    change = re.compile(rf"({re.escape(opcode)}[^\[]*\[%rd\d+)(?:\+(-?\d+))?\]")
    start, end = module.kernels[kernel]
    lines = {i: change.sub(lambda m: f"{m[1]}+{int(m[2] or 0) + 4}]", module.lines[i]) for i in range(start, end)}
    return module.alone(kernel, lines)


@pytest.mark.parametrize(("opcode", "verb"), [("ld.global.f32", "read"), ("st.global.f32", "written")])
def test_one_element_past_a_tensor(opcode: str, verb: str) -> None:
    """Of an input that is a view of more memory, and of an output."""
    ptx, case = backend.load(), Case(Layer("", "LayerNorm", (3, 7), (7,)))
    ((path,), call) = ptx_build.build_kernels("sm_90", [("forward_rows", "float")]), raw(case)
    module = Module(path.read_text())
    call.x = torch.cat([call.x, torch.zeros_like(call.x)])[:3]
    with PTX[0].active():
        ptx.reset_counters()
        call.forward()
        (kernel,) = ptx.launched()
        ptx.load_text(shifted(module, kernel, opcode))
        with pytest.raises(torch.AcceleratorError, match=f"4 bytes {verb} outside of the call's tensors, 0 bytes past"):
            call.forward()
        ptx.load_text(module.alone(kernel))
        call.forward()


# ---- the runtime ----


@pytest.mark.parametrize("name", ["tiny", "few", "alone", "small", "h200"])
def test_the_device_that_plans_are_made_for(name: str) -> None:
    """platform.cu asks the runtime for every fact: a launch is of the size that the planner says."""
    ptx, call = backend.load(), raw(Case(LAYERS[0], activation="silu"))
    facts = facts_of(ptx.device(name))
    plan = fastnorm._C.plan_forward(call.shape.geometry, "float32", facts, activation="silu")
    with ptx.configured(device=name), ptx.counting() as counts:
        call.forward()
    first = counts.launches[0]
    assert (first.blocks, first.threads, first.shared_bytes) == (
        plan.grid.blocks,
        plan.grid.threads,
        plan.grid.shared_bytes,
    )
    assert len(counts.launches) == plan.launches


def call_on_gangs() -> RawCall:
    """Its sets fit no block of FEW, so that its plans have gangs."""
    return raw(Case(Layer("", "GroupNorm", (2, 4, 64, 96), (2, 4))))


def test_a_device_that_refuses_gangs_is_served_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """platform.cu tells the runtime's errors apart: cudaErrorCooperativeLaunchTooLarge is a refusal."""
    monkeypatch.setenv("FASTNORM_STRICT", "0")
    ptx, call = backend.load(), call_on_gangs()
    # One in forward. In backward, clusters that sync as a grid are first tried as clusters alone.
    facts = facts_of(FEW)
    refusals = 2 + (fastnorm._C.plan_backward(call.shape.geometry, "float32", facts).reduce.gang == "cluster")
    with ptx.configured(device=dataclasses.replace(FEW, cooperative=False, largest_cluster=1)):
        expected = call.both()
    before = ptx.refused_gangs()
    another = dataclasses.replace(FEW, l2_bytes=FEW.l2_bytes + next(NUMBERS))  # for which no plan has been made
    with ptx.configured(device=another, refuses="gangs"), ptx.counting() as counts:
        results = call.both()
    assert ptx.refused_gangs() == before + refusals
    assert not same_bits(results, expected)
    assert not any(launch.cooperative or launch.cluster > 1 for launch in counts.launches)


def test_what_is_found_fails_the_call() -> None:
    """It is no refusal: fastnorm does not turn to torch's operators."""
    ptx = backend.load()
    with PTX[0].active():
        ptx.configure(device=dataclasses.replace(ptx.device("tiny"), shared_per_block=64))
        with pytest.raises(torch.AcceleratorError, match=r"CUDA error: ptx: .* shared memory"):
            fastnorm.BatchNorm2d(64)(torch.randn(2, 64, 9, 9).to(memory_format=torch.channels_last))


def test_the_backend_launches_kernels() -> None:
    """Modules compute by launches inside of the context, and not outside."""
    ptx, case = backend.load(), Case(LAYERS[0], activation="relu")
    module, x = build(case, fastnorm, CPU), make_inputs(case, CPU).x
    for chosen in PTX:
        with chosen.active():
            ptx.reset_counters()
            module(x.requires_grad_()).sum().backward()
            assert len(ptx.launches()) >= 2 and all("fastnorm" in name for name in ptx.launched())
    ptx.reset_counters()
    module(x)
    assert not ptx.launches()
