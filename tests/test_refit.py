"""benchmarks/refit.py on made-up times of plans that the planner of today makes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import refit
from benchmarks.candidates import candidates, jobs
from benchmarks.refit import is_held_out, misfit_table, read, regret
from benchmarks.timing import Timing
from benchmarks.tune import facts_json
from benchmarks.tune_report import Outcome
from tests.common.plan_model import DEVICES

H200 = DEVICES["H200"]
JOBS = list(jobs("(UNet GroupNorm 2x320x64x64|ResNet-50 BatchNorm2d 32x64x56x56) bfloat16 planar .*forward"))


def save(path: Path, *factors: float) -> list[Outcome]:
    """A file of tune.py, in which each job's plans take so many times their estimates."""
    outcomes = []
    for job in JOBS:
        found = tuple(candidates(job, H200, len(factors)))
        us = [factor * each.predicted.total for factor, each in zip(factors, found, strict=True)]
        times = tuple(Timing(each * 1e-6, each * 1e-6, each * 1e-6, 5) for each in us)
        outcomes.append(Outcome(job, H200, found, times, times[0], (0.0,) * len(found), (0,) * len(found)))
    path.write_text(json.dumps({"facts": facts_json(H200), "jobs": [each.to_json() for each in outcomes]}))
    return outcomes


def test_what_was_measured_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    saved = save(path, 2.0, 1.0, 2.0)
    outcomes, gone = read(path)
    assert gone == 0 and [each.job for each in outcomes] == JOBS
    for ours, theirs in zip(outcomes, saved, strict=True):
        assert [each.plan for each in ours.candidates] == [each.plan for each in theirs.candidates]
        assert [ours.us(i) for i in range(3)] == pytest.approx([theirs.us(i) for i in range(3)], abs=1e-3)
    assert [each.job for each in read(path, "UNet.*silu")[0]] == [job for job in JOBS if "UNet" in job.name][:1]


def test_plans_that_are_not_made_any_more_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    save(path, 1.0, 1.0)
    text = json.loads(path.read_text())
    for each in text["jobs"][0]["candidates"]:
        each["plan"] = each["plan"].replace("blocks for", "warps for")
    text["jobs"][1]["candidates"][0]["plan"] = "fused: by magic; estimate 0.1 us"
    path.write_text(json.dumps(text))
    outcomes, gone = read(path)
    assert gone == 3 and [each.job for each in outcomes] == JOBS[1:] and len(outcomes[0].candidates) == 1


def test_plans_that_the_gpu_refused_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    save(path, 1.0, 1.0)
    text = json.loads(path.read_text())
    text["jobs"][0]["candidates"][0]["refused_launches"] = 3
    path.write_text(json.dumps(text))
    outcomes, gone = read(path)
    assert gone == 1 and [len(each.candidates) for each in outcomes] == [1] + [2] * (len(JOBS) - 1)


def test_regret_and_misfit(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    saved = save(path, 2.0, 1.0)
    outcomes, _ = read(path)
    losses = [2 * o.candidates[0].predicted.total / o.candidates[1].predicted.total for o in saved]
    found = regret(outcomes)
    assert found.jobs == len(JOBS) == found.above and found.worst == pytest.approx(max(losses), rel=1e-3)
    assert found.unmeasured == 0 and found.misfit == pytest.approx(0.5, abs=0.01)
    _, lines = misfit_table(outcomes, ["family"])
    assert sum(int(cells[2]) for _, cells in lines) == 2 * len(JOBS)
    assert {cells[0] for _, cells in lines} == {"GroupNorm planar", "BatchNorm planar"}
    assert all(float(cells[3]) == pytest.approx(1.5, abs=0.01) for _, cells in lines)


def test_a_choice_that_was_not_measured_is_said(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    save(path, 1.0, 1.0)
    text = json.loads(path.read_text())
    text["jobs"][0]["candidates"].pop(0)
    path.write_text(json.dumps(text))
    assert regret(read(path)[0]).unmeasured == 1


def test_a_third_is_held_out() -> None:
    every = list(jobs())
    held = [job for job in every if is_held_out(job)]
    assert 0.25 < len(held) / len(every) < 0.45
    names = {(job.row.title, job.row.dtype, job.row.layout) for job in held}
    assert all(is_held_out(job) == ((job.row.title, job.row.dtype, job.row.layout) in names) for job in every)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Sequence[str]:
    refit.main(arguments)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.json"
    save(path, 3.0, 1.0, 1.0)
    lines = printed(capsys, str(path), "--by", "epilogue")
    assert f"act {2 * 3} 1.00 1.00 3.00 0%" in lines
    assert sum("x " in line and "forward: " in line for line in lines) == len(JOBS)
    assert any(line.startswith("measured over estimated: memory ") for line in lines)
    judged = [int(line.split(": ")[1].split()[0]) for line in lines if line.startswith(("fitted: ", "held out: "))]
    held = sum(is_held_out(job) for job in JOBS)
    assert judged == [each for each in (len(JOBS) - held, held) if each > 0]
    with pytest.raises(SystemExit, match="no measured plan"):
        refit.main([str(path), "--filter", "nothing"])


@pytest.mark.parametrize("run", ["first", "second", "fourth"])
def test_the_files_that_the_constants_were_fitted_to(run: str) -> None:
    """The planner chooses well among its plans, as far as it still makes them."""
    (path,) = (Path(refit.__file__).parent / "results").glob(f"tune-h200-*-{run}.json")
    # The first run's kernels read a residual with one load in flight.
    outcomes, _ = read(path, "^((?!add).)*$" if run == "first" else "")
    found = regret(outcomes)
    assert found.mean < 1.02 and found.misfit < 0.1
