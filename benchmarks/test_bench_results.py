"""The arithmetic of the table: floors, copies, shares, means, the lines to reach, and the order of a race."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import onednn
from benchmarks.contestants import MODES, Arena, Row, mode_call, passes, quick_table, table
from benchmarks.results import Result, geometric_mean, json_text, means, moved, summary_lines
from benchmarks.tables import make_markdown, make_table, print_moved, print_summary
from benchmarks.timing import Timing, race, repeats_for
from tests.common import cases

RESULTS = sorted((Path(__file__).parent / "results").glob("*.json"))
LAYER = cases.Layer("ResNet-50", "BatchNorm2d", (32, 64, 56, 56), (64,))


def timing(ms: float) -> Timing:
    return Timing(ms * 1e-3, ms * 1e-3, ms * 1e-3, 5)


def result(ours: float, torch: float, clone: float, epilogue: str = "plain", layer: cases.Layer = LAYER) -> Result:
    """The same milliseconds in all modes."""
    times = {"fastnorm": timing(ours), "torch": timing(torch), "clone": timing(clone)}
    return Result(Row(layer, "float32", "planar", epilogue), dict.fromkeys(MODES, times), above_cache=True)


@pytest.mark.parametrize(
    ("mode", "activation", "residual", "expected"),
    [
        ("forward", None, False, 2),  # x -> y
        ("eval", "relu", False, 2),
        ("forward", "relu", True, 3),  # x, residual -> y
        ("step", None, False, 5),  # + dy, x -> dx
        ("step", "silu", False, 5),
        ("step", None, True, 6),  # dresidual is dy
        ("step", "relu", True, 7),  # + dresidual; a bit per element saved
        ("step", "silu", True, 8),  # + residual, to recompute what silu saw
    ],
)
def test_least_passes(mode: str, activation: str | None, residual: bool, expected: int) -> None:
    assert passes(mode, activation, residual) == expected


def test_floor_is_the_time_of_copying_the_least_bytes() -> None:
    plain, added = result(6, 30, 2), result(6, 30, 2, "add_act")
    assert plain.speedup("forward") == pytest.approx(5)
    assert plain.floor("forward") == pytest.approx(2e-3)  # one copy moves two passes
    assert plain.floor("step") == pytest.approx(5e-3)
    assert added.floor("step") == pytest.approx(7e-3)
    assert plain.copies("forward") == pytest.approx(3)
    assert plain.share("step") == pytest.approx(5 / 6)


def test_geometric_mean() -> None:
    assert geometric_mean([1, 4, 16]) == pytest.approx(4)
    assert math.isnan(geometric_mean([]))


def test_lines_count_the_rows_they_are_about_and_sort_the_misses() -> None:
    tiny = result(1, 0.5, 1, layer=cases.TINY)
    good, slow, slower = result(1, 5, 1), result(2, 2, 1), result(4, 2, 1)
    found = {line.what.split()[0]: line for line in summary_lines([tiny, good, slow, slower], ("forward",))}
    assert found["at"].rows == 3  # tiny has its own line
    assert [value for _, value in found["at"].misses] == ["0.50", "1.00"]
    assert [value for _, value in found["forward"].misses] == ["4.00", "2.00"]
    assert (found["a"].rows, found["a"].misses[0][1]) == (1, "0.50")
    assert means([tiny, good, slow, slower], "forward")["times_torch"] == pytest.approx((5 * 1 * 0.5) ** (1 / 3))


def test_json_has_medians_quartiles_and_units() -> None:
    found = json.loads(json.dumps(result(6, 30, 2, "add_act").to_json()))
    assert found["shape"] == [32, 64, 56, 56]
    assert (found["epilogue"], found["bytes"]) == ("+add+relu", 32 * 64 * 56 * 56 * 4)
    step = found["modes"]["step"]
    assert step["us"]["torch"] == {"median": 30e3, "low": 30e3, "high": 30e3, "rounds": 5}
    assert (step["times_torch"], step["copies"], step["floor_share"]) == (5.0, 0.857, 1.167)


def test_json_is_a_line_a_row() -> None:
    run = {
        "commit": "a",
        "options": {"modes": ["step", "eval"], "b": 0.1},
        "rows": [{"x": [1, 2]}, {"x": []}],
        "no": [],
    }
    assert json_text(run).splitlines() == [
        "{",
        ' "commit": "a",',
        ' "options": {"modes": ["step", "eval"], "b": 0.1},',
        ' "rows": [',
        '  {"x": [1, 2]},',
        '  {"x": []}',
        " ],",
        ' "no": []',
        "}",
    ]
    assert json.loads(json_text(run)) == run


def test_moved_compares_torchs_times_in_rows_that_both_runs_have() -> None:
    saved = {"rows": [result(9, 20, 1).to_json()]}
    found = moved([result(1, 30, 1), result(1, 50, 1, "act")], saved)
    assert found == pytest.approx([1.5] * len(MODES))
    assert moved([result(1, 50, 1, "act")], saved) == []


def test_summary_says_how_far_torch_moved() -> None:
    console = Console(record=True, width=200)
    print_moved(console, [1.0, 2.0, 4.0], "a.json")
    assert "2.00 times (quartiles 1.50 and 3.00) what it took in a.json" in console.export_text()
    print_moved(console, [], "a.json")
    assert console.export_text() == ""


def test_onednn_is_absent_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "PACKAGE", "fastnorm-has-no-such-package")
    onednn.library.cache_clear()
    try:
        assert onednn.version() is None
        assert not any(onednn.serves(row) for row in table())
    finally:
        onednn.library.cache_clear()


def test_onednn_serves_channels_last_batch_norm_and_layer_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "library", lambda: object())
    served = {(r.layer.norm, r.layout, r.fused) for r in table() if onednn.serves(r)}
    batch = {("BatchNorm2d", "channels_last", fused) for fused in ("plain", "+relu")}
    assert served == batch | {("LayerNorm", "planar", "plain")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("layer", "layout", "epilogue"),
    [
        (cases.Layer("", "BatchNorm2d", (4, 24, 5, 6), (24,)), "channels_last", "plain"),
        (cases.Layer("", "BatchNorm2d", (4, 24, 5, 6), (24,)), "channels_last", "act"),
        (cases.Layer("", "LayerNorm", (30, 96), (96,)), "planar", "plain"),
    ],
    ids=["batch", "batch-relu", "layer"],
)
def test_onednn_computes_what_torch_does(layer: cases.Layer, layout: str, epilogue: str, dtype: str) -> None:
    if onednn.library() is None:
        pytest.skip(f"{onednn.PACKAGE} is not installed")
    row = Row(layer, dtype, layout, epilogue)
    arena = Arena(row)
    norm = onednn.OneDnnNorm(row, arena.x.detach(), training=True)
    expected = arena.norms["torch"](arena.x, None)
    dy = cases.torch.randn_like(expected)
    (dx,) = cases.torch.autograd.grad(expected, [arena.x], dy)
    tolerance = {"rtol": 1e-2, "atol": 2e-2} if dtype == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
    cases.torch.testing.assert_close(norm.forward(arena.x.detach()), expected.detach(), **tolerance)
    cases.torch.testing.assert_close(norm.backward(arena.x.detach(), dy), dx, **tolerance)
    onednn.mode_call(row, "eval", arena.x)()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_saved_results_are_a_line_a_row(path: Path) -> None:
    assert path.read_text() == json_text(json.loads(path.read_text()))


@pytest.mark.parametrize("width", [60, 80, 100, 150])
def test_table_fits_the_terminal(width: int) -> None:
    text = make_table([result(6, 30, 2), result(1234.5, 3e5, 2, "add_act")], width).plain
    assert max(map(len, text.splitlines()[1:])) <= width
    assert "5.00x" in text and "6 000" in text


def test_markdown_has_a_row_per_shape_with_mean_and_range() -> None:
    text = make_markdown([result(1, 2, 1), result(1, 8, 1, "act")], ("eval",)).splitlines()
    assert text[0] == "| layer | eval: torch.nn | eval: copies |"
    assert text[2:] == ["| ResNet-50 BatchNorm2d 32x64x56x56 | 4.0x (2.0 to 8.0) | 1.0 (1.0 to 1.0) |"]


def test_summary_prints_every_miss_up_to_its_limit() -> None:
    console = Console(record=True, width=150)
    print_summary(console, [result(6, 3, 1), result(1, 5, 1)])
    text = console.export_text()
    assert "0.50" in text and "3 of 6  at least 1.1 x torch.nn" in text


def test_timing_takes_median_and_quartiles() -> None:
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Timing(3.0, 2.0, 4.0, 5)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0, 1)


def test_race_gives_everyone_the_same_rounds_and_stops_at_the_budget() -> None:
    calls: dict[str, int] = {"a": 0, "b": 0}

    def work(name: str) -> None:
        calls[name] += 1
        sum(range(200_000))  # about 2 ms

    contestants = {name: lambda name=name: work(name) for name in calls}
    found = race(contestants, budget_s=0.0, min_rounds=4, max_rounds=100)
    assert {t.rounds for t in found.values()} == {4}
    assert all(t.low <= t.median <= t.high for t in found.values())


def test_a_short_call_is_repeated_to_fill_a_sample() -> None:
    assert repeats_for(lambda: None, lambda call, n: n * 1e-6) >= 2000
    assert repeats_for(lambda: None, lambda call, n: n * 1e-2) == 1


def test_full_table_has_every_combination_once() -> None:
    names = [row.name for row in table()]
    assert len(names) == len(set(names)) == 3 * 2 * (2 * 11 + 2)  # epilogues, dtypes, layouts; LayerNorm has one
    assert {row.name for row in quick_table()} <= set(names)
    assert {row.layer.norm for row in quick_table()} == {row.layer.norm for row in table()}
    assert [row.layer.norm for row in quick_table("GroupNorm|tiny")] == ["BatchNorm2d", "GroupNorm", "GroupNorm"]


@pytest.mark.parametrize("epilogue", cases.EPILOGUES)
def test_both_sides_of_a_row_compute_the_same_gradients(epilogue: str) -> None:
    arena = Arena(Row(cases.TINY, "float32", "channels_last", epilogue))
    assert arena.disagreement() < 16
    assert set(arena.calls("step")) == {"fastnorm", "torch", "clone"}
    gradients = {}
    for name in ("fastnorm", "torch"):
        parameters = list(arena.modules[name].parameters())
        cases.torch.manual_seed(0)  # the same incoming gradient
        gradients[name] = mode_call("step", arena.norms[name], arena.x, arena.residual, parameters)()
    for ours, theirs in zip(gradients["fastnorm"], gradients["torch"], strict=True):
        cases.torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
