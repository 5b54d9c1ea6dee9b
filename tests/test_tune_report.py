"""benchmarks/tune_report.py: the report of made-up times, and the constants fitted to them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from benchmarks import tune_report
from benchmarks.candidates import Job, Parts, candidates, jobs, predict_copy
from benchmarks.timing import Timing
from benchmarks.tune_report import Ceilings, Outcome, as_markdown, as_text, family_table, fit, fit_parts
from tests.test_tune import H200, JOBS, RESNET, job


def timing(us: float) -> Timing:
    return Timing(us * 1e-6, us * 0.9e-6, us * 1.1e-6, 5)


def made_up(each: Job, time_of: Callable[[Parts], float], copy: float = 10.0, count: int = 5) -> Outcome:
    """As if a candidate took so many microseconds."""
    found = tuple(candidates(each, H200, count))
    times = tuple(timing(time_of(c.predicted)) for c in found)
    return Outcome(each, H200, found, times, timing(copy), (0.0,) * len(found))


def in_order(each: Job, *us: float, copy: float) -> Outcome:
    taken = iter(us)
    return made_up(each, lambda parts: next(taken), copy, len(us))


def printed(*arguments: object) -> str:
    console = Console(record=True, width=200, color_system=None)
    tune_report.print_report(console, *arguments)  # type: ignore[arg-type]
    return console.export_text()


def test_outcomes_add_up() -> None:
    backward = job(r"ResNet-50 BatchNorm2d 32x64x112x112 bfloat16 planar \+relu backward")
    o = in_order(backward, 40.0, 32.0, 50.0, copy=20.0)
    assert o.floor_us == pytest.approx(30.0)  # three passes at the pace of two in 20
    assert o.share == pytest.approx(0.75) and o.line == 0.85
    assert o.best == 1 and o.loss == pytest.approx(1.25)
    assert o.share_at(4_000_000) == pytest.approx(32 * 64 * 112 * 112 * 2 * 3 / 4e6 / 40)
    assert job("UNet GroupNorm 2x320x64x64 float32 planar plain backward").family == "GroupNorm"


def test_without_times_an_outcome_is_its_prediction() -> None:
    found = tuple(candidates(RESNET, H200, 4))
    o = Outcome(RESNET, H200, found)
    assert o.us(2) == found[2].predicted.total and o.best == 0 and o.loss == 1
    assert o.floor_us == predict_copy(RESNET, H200)
    saved = json.loads(json.dumps(o.to_json()))
    assert saved["copy_us"] == {"predicted": round(o.copy_us, 3)} and "us" not in saved["candidates"][0]


def test_report_of_made_up_times() -> None:
    planar = in_order(RESNET, 30.0, 24.0, 40.0, copy=20.0)
    last = in_order(job(RESNET.name.replace("planar", "channels_last").replace("+", r"\+")), 22.0, 25.0, copy=20.0)
    tiny = in_order(job("tiny BatchNorm2d 2x8x4x4 float32 planar plain forward"), 4.0, copy=2.0)
    rival = planar.candidates[1].label
    last = dataclasses.replace(last, disagreements=(0.0, 99.4))
    text = printed([planar, tiny, last], H200, [("a job", "no time left")], Ceilings(4e6, 3.25))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    i = lines.index("ResNet-50 BatchNorm2d 32x64x112x112")
    predicted = [f"{o.candidates[0].predicted.total:.1f}" for o in (planar, last)]
    assert lines[i + 1] == f"bf16 planar +relu forward 20.0 30.0 {predicted[0]} 67% 24.0 0.80 {rival}"
    assert lines[i + 2] == f"bf16 last +relu forward 20.0 22.0 {predicted[1]} 91% 22.0 1.00 the choice"
    nbytes = 32 * 64 * 112 * 112 * 2
    large = (2 * nbytes / 4e6) / (30 * 22) ** 0.5
    assert f"forward 78% 85% 1 of 2 {large:.0%}" in lines  # the mean of 67% and 91%
    assert f"forward planar 67% 85% 0 of 1 {2 * nbytes / 4e6 / 30:.0%}" in lines
    assert any(line.startswith("forward 50% - -") for line in lines)
    assert f"67% {RESNET.name}" in lines
    assert f"1.25x {RESNET.name}: {planar.candidates[0].label} 30.0 us, {rival} 24.0 us" in lines
    assert f"99 epsilons {last.job.name}: {last.candidates[1].label}" in lines
    assert "a job: no time left" in lines
    assert "Ceilings: a large copy moves 4,000 GB/s, of 4,800; the shortest call takes 3.2 us" in lines


def test_refused_plans_are_told_and_count_for_nothing() -> None:
    """Their times are those of other plans."""
    o = dataclasses.replace(in_order(RESNET, 30.0, 24.0, 27.0, copy=20.0), refusals=(0, 2, 0))
    assert o.best == 2
    lines = [" ".join(line.split()) for line in printed([o], H200).splitlines()]
    i = lines.index("Refused by the GPU, at so many launches, and replaced by another plan: 1")
    assert lines[i + 1].startswith(f"2 {RESNET.name}: {str(o.candidates[1].plan)[:40]}")
    chosen = dataclasses.replace(o, refusals=(1, 0, 0))
    assert chosen.best == 1
    assert "which was refused: the time is of another plan" in printed([chosen], H200)
    few = [in_order(RESNET, 30.0, 24.0, 27.0, copy=20.0)] * 3
    fitted, without = fit_parts(few), fit_parts([dataclasses.replace(few[0], refusals=(0, 1, 0)), *few[1:]])
    assert fitted is not None and without is not None and (fitted.plans, without.plans) == (9, 8)


def test_report_of_predictions() -> None:
    outcomes = [Outcome(j, H200, tuple(candidates(j, H200, 3))) for j in jobs("2x1280x16x16 bfloat16 planar plain")]
    text = printed(outcomes, H200)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    o = outcomes[0]
    parts = o.candidates[0].predicted
    numbers = " ".join(f"{n:.1f}" for n in (parts.total, parts.memory, parts.issue, parts.waits, parts.launches))
    label = o.candidates[0].label
    assert f"bf16 planar plain forward {o.floor_us:.1f} {o.share:.0%} {numbers} {label}" in lines
    assert len(outcomes) == 2
    assert all(any(line.endswith(each.candidates[2].label) for line in lines) for each in outcomes)
    assert "Measured over estimated" not in text and "loses" not in text


def test_tables_are_text_and_markdown() -> None:
    table = (
        ("variant", "", "us", "which"),
        [("a shape", ["x", "forward", "1.0", "one"]), ("a shape", ["yy", "", "10.0", "two"])],
    )
    assert as_text(table).splitlines() == [
        "  variant             us  which",
        "a shape",
        "  x        forward   1.0  one",
        "  yy                10.0  two",
    ]
    assert as_markdown(table).splitlines() == [
        "| layer | variant |  | us | which |",
        "| --- | --- | --- | --- | --- |",
        "| a shape | x | forward | 1.0 | one |",
        "| a shape | yy |  | 10.0 | two |",
    ]


def test_families_without_outcomes_have_no_line() -> None:
    _, lines = family_table([in_order(RESNET, 25.0, copy=20.0)], 4e6)
    assert [(title, cells[:4]) for title, cells in lines] == [("BatchNorm", ["forward", "", "80%", "85%"])]


# ---- the constants ----


def test_the_fit_finds_the_factors() -> None:
    factors = {"memory": 1.25, "issue": 0.8, "waits": 0.5, "launches": 2.0}
    outcomes = [made_up(j, lambda p: sum(f * p.counted[name] for name, f in factors.items())) for j in JOBS[:40]]
    counted = {name for o in outcomes for c in o.candidates for name, us in c.predicted.counted.items() if us > 0}
    assert len(counted) >= 3  # all plans may be bound by memory
    found = fit_parts(outcomes)
    assert found is not None and found.plans > 100 and found.misfit < 1e-6
    assert {n: getattr(found, n) for n in counted} == pytest.approx({n: factors[n] for n in counted})
    doubled = fit_parts(made_up(j, lambda p: 2 * p.total) for j in JOBS[:40])
    assert doubled is not None and "split" in doubled.by_kind
    assert doubled.by_kind == pytest.approx(dict.fromkeys(doubled.by_kind, 2))


def test_outliers_move_the_fit_little() -> None:
    r = np.random.default_rng(0)
    parts = r.uniform(1, 10, (200, 3))
    us = parts @ [1.1, 0.7, 1.5] * r.normal(1, 0.01, 200)
    us[::10] *= 5
    assert fit(parts, us) == pytest.approx([1.1, 0.7, 1.5], rel=0.05)


def test_no_factor_is_negative() -> None:
    r = np.random.default_rng(0)
    parts = r.uniform(1, 10, (100, 3))
    factors = fit(parts, parts @ [1.0, 1.0, -0.3])
    assert (factors >= 0).all() and factors[2] == 0 and factors[:2] == pytest.approx([0.85, 0.85], abs=0.15)


def test_a_few_plans_are_not_fitted() -> None:
    assert fit_parts([in_order(RESNET, 30.0, 24.0, 40.0, copy=20.0)]) is None
    assert fit_parts([Outcome(RESNET, H200, tuple(candidates(RESNET, H200, 9)))]) is None
