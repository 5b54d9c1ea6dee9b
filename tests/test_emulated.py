"""The CUDA kernels under the emulator: the same bits under every schedule, nothing read that was not written, nothing
left unwritten, any alignment; and that what tests call the emulated backend is the emulated kernels."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastnorm
from tests.common.cases import (
    EPILOGUES,
    LAYERS,
    LAYOUTS,
    MAPS,
    PRECISIONS,
    TYPICAL,
    Case,
    Layer,
    modes,
    parity_cases,
)
from tests.common.numerics import build, make_inputs, measure, run, scale_of, truth
from tests.common.raw_calls import RawCall, same_bits
from tests.conftest import EMULATED, EMULATED_DEVICES, thinned_cases
from tests.emulator import backend as emulator

pytestmark = pytest.mark.emulator

CPU = torch.device("cpu")
DRAWN = ("random", "priority")


def raw(case: Case) -> RawCall:
    return RawCall(case, make_inputs(case, CPU), torch.ops.fastnorm_emulated)


def thin(layers: tuple[Layer, ...], epilogues: tuple[tuple[str | None, bool], ...]) -> Iterator[Case]:
    """Every layer and layout, with the precisions and epilogues in turn."""
    precisions, turns = itertools.cycle(PRECISIONS), itertools.cycle(epilogues)
    for layer in layers:
        for layout in layer.layouts:
            activation, residual = next(turns)
            yield Case(layer, layout, next(precisions), activation, residual)


SCHEDULED = list(
    thin((*LAYERS, *MAPS), (("relu", True), ("silu", True), (None, False), ("leaky_relu", True), ("gelu", False)))
)


@pytest.mark.parametrize("device", EMULATED_DEVICES)
@pytest.mark.parametrize("case", SCHEDULED, ids=lambda case: case.id)
def test_same_bits_under_every_schedule(case: Case, device: str) -> None:
    settings, call = emulator.load(), raw(case)
    with settings.configured(device=device):
        expected = call.both()
    schedules = [("lifo", 0, 1), ("fifo", 0, 3), *((order, seed, 2) for order in DRAWN for seed in (1, 2))]
    for order, seed, together in schedules:
        with settings.configured(order, seed, device, together):
            assert not same_bits(call.both(), expected), f"{order}, seed {seed}, {together} blocks together"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """All that torch.empty returns is full of NaN, the workspace too."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("device", EMULATED_DEVICES)
@pytest.mark.parametrize("layer", [*LAYERS, *MAPS], ids=lambda layer: layer.id)
def test_all_is_written_and_nothing_else_read(layer: Layer, device: str, poisoned: None) -> None:
    assert torch.empty(3).isnan().all() and torch.empty(2, dtype=torch.uint8).eq(255).all()
    with emulator.load().configured(device=device):
        for layout in layer.layouts:
            for precision in (PRECISIONS[0], PRECISIONS[1], PRECISIONS[5]):
                for (activation, residual), mode in itertools.product(
                    (("relu", True), ("silu", False)), modes(layer)[::2]
                ):
                    for name, value in raw(Case(layer, layout, precision, activation, residual, mode)).both().items():
                        assert name == "mask" or value.isfinite().all(), f"{name}, {layout}, {precision}, {mode}"


# ---- alignment ----


def misaligned(t: Tensor, elements: int) -> Tensor:
    """A copy of t, so many elements past an address that 64 divides."""
    memory = torch.empty(t.numel() + elements, dtype=t.dtype)
    assert memory.data_ptr() % 64 == 0
    return memory[elements:].as_strided(t.shape, t.stride(), elements).copy_(t)


@pytest.mark.parametrize("precision", PRECISIONS[1:4], ids="-".join)
@pytest.mark.parametrize("layer", [*TYPICAL, *LAYERS[8:10], MAPS[6]], ids=lambda layer: layer.id)
def test_any_alignment(layer: Layer, precision: tuple[str, str]) -> None:
    """One misaligned tensor narrows the accesses of all. The emulator fails misaligned accesses."""
    settings = emulator.load()
    for layout, elements, device in itertools.product(layer.layouts, (1, 2, 3, 4, 8), EMULATED_DEVICES):
        case = Case(layer, layout, precision, "silu", True)
        inputs = make_inputs(case, CPU)
        exact = truth(case, build(case, torch.nn, CPU), inputs)
        for field in ("x", "residual", "dy", "weight", "bias"):
            call = RawCall(case, inputs, torch.ops.fastnorm_emulated)
            setattr(call, field, misaligned(getattr(call, field), elements))
            with settings.configured(device=device):
                results = call.both()
            for name in ("y", "dx", "dweight", "dbias", "dresidual"):
                scale = scale_of(name, exact, plain=False)
                value = exact.values[name]
                error = measure(name, results[name].view(value.shape), results[name].view(value.shape), value, scale)
                assert error.ours <= 5, f"{error}, {field} {elements} elements off, {layout}, {device}"


# ---- the backend ----


@pytest.mark.parametrize("case", [Case(layer, activation="relu", residual=True) for layer in TYPICAL])
def test_the_backend_launches_kernels(case: Case) -> None:
    """Modules then compute by launches, backward too, and not before or after."""
    settings = emulator.load()
    inputs = make_inputs(case, CPU)
    outside = run(case, build(case, fastnorm, CPU), inputs)
    for backend in EMULATED:
        with backend.active():
            settings.reset_counters()
            y = build(case, fastnorm, CPU)(inputs.x.requires_grad_(), inputs.residual)
            forward = settings.traffic()
            y.backward(inputs.grad)
            both = settings.traffic()
        nbytes = inputs.x.numel() * 4
        assert forward.read_stream >= 2 * nbytes and forward.written_stream >= nbytes
        assert both.read_stream - forward.read_stream >= 2 * nbytes
    settings.reset_counters()
    again = run(case, build(case, fastnorm, CPU), inputs)
    assert not settings.launches() and not same_bits(again, outside)


def test_what_the_emulator_finds_fails_the_call() -> None:
    """It is no refusal: fastnorm does not turn to torch's operators."""
    device = emulator.load().device("tiny")
    with EMULATED[0].active():
        emulator.load().configure(device=dataclasses.replace(device, shared_per_block=64))
        with pytest.raises(torch.AcceleratorError, match="shared"):
            fastnorm.BatchNorm2d(64)(torch.randn(2, 64, 9, 9).to(memory_format=torch.channels_last))


def test_the_thinned_table_has_every_pair() -> None:
    """Any two values of layer, layout, precision, epilogue, mode and device that can go together do so in some case."""

    def values(case: Case) -> list[tuple[str, object]]:
        epilogue = (case.activation, case.residual)
        fields = {"layer": case.layer, "layout": case.layout, "precision": case.precision, "mode": case.mode}
        return [*fields.items(), ("epilogue", epilogue)]

    def pairs(cases: set[Case]) -> set[frozenset[tuple[str, object]]]:
        return {frozenset(pair) for case in cases for pair in itertools.combinations(values(case), 2)}

    thinned, full = thinned_cases(), set(parity_cases())
    assert set(thinned) == set(EMULATED_DEVICES)
    assert pairs(set().union(*thinned.values())) == pairs(full)
    singles = [{value for case in cases for value in values(case)} for cases in (*thinned.values(), full)]
    assert all(found == singles[-1] for found in singles)
    assert all(len(cases) < len(full) / 3 for cases in thinned.values())
    assert len(EPILOGUES) == 3 and len(LAYOUTS) == 2
