"""benchmarks/cpu_limits.py: which figures of a run miss a line, and what holds them back."""

from __future__ import annotations

import pytest

from benchmarks import cpu_limits
from benchmarks.contestants import Row
from benchmarks.machine import clock_ghz
from benchmarks.results import Result
from benchmarks.timing import Timing
from tests.common.cases import Layer

SHAPE = (32, 64, 56, 56)
PACKS = 32 * 64 * 56 * 56 / 32


def result(layout: str = "planar", norm: str = "BatchNorm2d", shape: tuple[int, ...] = SHAPE, **ms: float) -> Result:
    """Milliseconds by mode, or by mode and contestant (`forward_torch`); a copy takes 1, torch.nn 10."""

    def timing(value: float) -> Timing:
        return Timing(value * 1e-3, value * 1e-3, value * 1e-3, 5)

    times = {
        mode: {
            "fastnorm": timing(ms.get(mode, 1)),
            "torch": timing(ms.get(f"{mode}_torch", 10)),
            "clone": timing(1),
        }
        | ({"onednn": timing(ms[f"{mode}_onednn"])} if f"{mode}_onednn" in ms else {})
        for mode in ("forward", "step", "eval")
    }
    return Result(Row(Layer("", norm, shape, ()), "float32", layout, "plain"), times, above_cache=True)


def test_each_line_is_missed_by_its_own_figure() -> None:
    assert not cpu_limits.misses(result(forward=1.2), "forward")
    assert cpu_limits.misses(result(forward=1.25, forward_torch=1.3), "forward") == ["1.04 torch.nn", "1.25 copies"]
    assert cpu_limits.misses(result(eval=1, eval_torch=1.01), "eval") == []
    assert cpu_limits.misses(result(forward=1, forward_onednn=0.8), "forward") == ["0.80 oneDNN"]


@pytest.mark.parametrize(
    ("layout", "norm", "shape", "walk"),
    [
        ("channels_last", "BatchNorm2d", SHAPE, "columns, batch"),
        ("channels_last", "GroupNorm", SHAPE, "columns, groups"),
        ("planar", "BatchNorm2d", SHAPE, "runs, batch"),
        ("planar", "BatchNorm2d", (32, 64, 7, 7), "short runs"),
        ("planar", "InstanceNorm3d", (2, 32, 64, 64, 64), "runs, instances"),
        ("planar", "LayerNorm", (128, 96), "layer of 96"),
        ("planar", "LayerNorm", (128, 768), "layer of 768"),
    ],
)
def test_every_row_has_a_walk(layout: str, norm: str, shape: tuple[int, ...], walk: str) -> None:
    assert cpu_limits.walk_of(result(layout, norm, shape)) == walk


def test_a_step_is_two_passes_beside_their_limits() -> None:
    counts = {
        ("columns, batch", "plain", "forward", "float32"): 40.0,
        ("columns, batch", "plain", "backward", "float32"): 80.0,
    }
    slow = result("channels_last", forward=2, step=6)
    forward, backward = cpu_limits.passes_of(slow, "step", ghz=2.0, threads=2, counts=counts)
    a_copy = 1e-3 * 2e9 * 2 / PACKS  # cycles a pack, of two tensors
    assert (forward.direction, forward.instructions, forward.ports) == ("forward", 40, 8)
    assert (backward.direction, backward.instructions, backward.ports) == ("backward", 80, 11)
    assert forward.cycles == pytest.approx(2 * a_copy)
    assert forward.memory == pytest.approx(1.5 * a_copy)  # x twice, and y
    assert backward.cycles == pytest.approx(4 * a_copy)
    assert backward.memory == pytest.approx(2.5 * a_copy)  # x and dy twice, and dx


@pytest.mark.parametrize(
    ("cycles", "instructions", "memory", "reason"),
    [
        (26, 30, 20, "memory"),
        (26, 40, 10, "instructions"),
        (26, 40, 20, "memory and instructions"),
        (60, 30, 20, "memory, in part"),
        (80, 100, 20, "instructions, and waits between them"),
    ],
)
def test_a_pass_is_held_back_by_the_limits_that_it_is_near(
    cycles: float, instructions: float, memory: float, reason: str
) -> None:
    assert cpu_limits.Pass("forward", cycles, instructions, 8, memory).reason == reason


def test_the_clock_is_a_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    ghz = clock_ghz()
    assert ghz is None or 0.2 < ghz < 10
    monkeypatch.setenv("CC", "no-such-compiler")
    assert clock_ghz() is None
