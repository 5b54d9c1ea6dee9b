"""benchmarks/tune.py, but for the timing: the rows, their candidates, and the report of made-up times."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import tune
from plan_model import DEVICES
from tune import Candidate, Outcome, Row, candidates, kind_of, plan_of

ROWS = tune.rows()


def test_rows_cover_the_families_in_both_directions() -> None:
    seen = {(r.family, r.backward, r.dtype, r.layout) for r in ROWS}
    for family in tune.TARGETS:
        layouts = ("planar",) if family == "LayerNorm" else ("planar", "channels_last")
        for layout in layouts:
            assert {(family, b, d, layout) for b in (False, True) for d in ("bfloat16", "float32")} <= seen
    assert len({r.name for r in ROWS}) == len(ROWS)
    first_epilogue = next(i for i, r in enumerate(ROWS) if r.activation)
    assert not any(r.activation is None for r in ROWS[first_epilogue:])


def test_streams_are_the_least() -> None:
    def streams(pattern: str) -> int:
        (row,) = tune.rows(f"^{pattern}$")
        return row.streams

    resnet = "ResNet-50 BatchNorm2d 32x64x112x112 bfloat16 planar"
    assert [streams(f"{resnet} {e} forward") for e in ("plain", "relu", r"add\+relu")] == [2, 2, 3]
    # x and dy in, dx out; with an add dresidual; a relu's mask is small
    assert [streams(f"{resnet} {e} backward") for e in ("plain", "relu", r"add\+relu")] == [3, 3, 4]
    assert streams(r"UNet GroupNorm 2x320x64x64 float32 planar add\+silu backward") == 5


@pytest.mark.parametrize("device", ["H200", "A100", "T4", "no gangs"])
def test_candidates_differ_and_are_forced_exactly(device: str) -> None:
    facts = DEVICES[device]
    for row in ROWS[:: 7 if device != "H200" else 3]:
        found = candidates(row, facts, 6)
        assert found[0].plan == plan_of(row, facts, {}), row.name
        assert all(a.plan != b.plan for i, a in enumerate(found) for b in found[:i])
        for candidate in found:
            assert plan_of(row, facts, candidate.forced) == candidate.plan, f"{row.name}: {candidate.plan}"
        kinds = {kind_of(plan) for plan in tune.compare(row, facts)}
        assert len({kind_of(c.plan) for c in found}) >= min(3, len(kinds)), row.name


def made_up(row: Row, factors: tuple[float, float, float]) -> Outcome:
    """As if every part of the estimate were off by its factor."""
    found = candidates(row, DEVICES["H200"], 5)
    for c in found:
        e = c.plan.estimate
        c.us = sum(f * part for f, part in zip(factors, (e.memory, e.barriers, e.launches), strict=True))
    return Outcome(row, found, 10.0)


def test_the_fit_finds_the_factors() -> None:
    outcomes = [made_up(row, (1.25, 0.5, 2.0)) for row in ROWS[:40]]
    factors = tune.fit(outcomes)
    assert factors == pytest.approx({"memory": 1.25, "barriers": 0.5, "launches": 2.0}, rel=1e-6)


def test_a_part_that_would_be_negative_is_left_out() -> None:
    outcomes = [made_up(row, (1.0, 1.0, -0.05)) for row in ROWS[:40]]
    assert set(tune.fit(outcomes)) <= {"memory", "barriers"}


def test_report_of_made_up_times() -> None:
    row = tune.rows("^ResNet-50 BatchNorm2d 32x64x112x112 bfloat16 planar plain forward$")[0]
    found = candidates(row, DEVICES["H200"], 3)
    times = (30.0, 24.0, 40.0)
    for candidate, us in zip(found, times, strict=True):
        candidate.us = us
    outcome = Outcome(row, found, 20.0)
    assert outcome.floor == 20.0 and outcome.best.us == 24.0 and outcome.chosen.us == 30.0
    out = io.StringIO()
    tune.report(Console(file=out, width=200), [outcome], DEVICES["H200"])
    text = out.getvalue()
    assert "BatchNorm forward: 67% of bandwidth, aim 85%; 1 of 1 rows below" in text
    assert f"better by 20%: {row.name}" in text
    saved = outcome.to_json()
    assert [plan["us"] for plan in saved["plans"]] == [30.0, 24.0, 40.0]
    assert saved["plans"][0]["predicted_us"]["total"] == pytest.approx(found[0].predicted)


def test_candidate_is_the_estimates_total() -> None:
    plan = candidates(ROWS[0], DEVICES["H200"], 1)[0].plan
    assert Candidate(plan, {}).predicted == plan.estimate.total > 0


def test_without_a_gpu_it_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    tune.main(["--facts", "H200", "--filter", "VAE.*planar plain"])
    text = capsys.readouterr().out
    assert "GroupNorm forward" in text and "8 of 8 rows" in text
