"""benchmarks/tune.py without a GPU: the jobs, their candidates, the report of made-up times, and measuring itself, on
the CPU, which heeds no plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import tune, tune_report
from benchmarks.candidates import LAYERS, SMALL, Candidate, Job, Parts, candidates, jobs, kind_of, predict_copy
from benchmarks.contestants import Row, copies_for
from benchmarks.timing import Timing
from benchmarks.tune_report import Ceilings, Outcome, as_markdown, as_text, family_table, fit, fit_parts
from fastnorm import _C
from tests.common import cases
from tests.common.plan_model import DEVICES
from tests.common.raw_calls import RawCall

JOBS = list(jobs())
H200 = DEVICES["H200"]
COPY_BYTES_PER_US = 0.86 * H200.bytes_per_us  # kCopyShare of csrc/plan/cost.cpp


def job(pattern: str) -> Job:
    (found,) = jobs(f"^{pattern}$")
    return found


RESNET = job(r"ResNet-50 BatchNorm2d 32x64x112x112 bfloat16 planar \+relu forward")


# ---- jobs ----


def test_every_family_in_every_variant() -> None:
    assert len({j.name for j in JOBS}) == len(JOBS) == 2 * 2 * 3 * sum(len(layer.layouts) for layer in LAYERS)
    shapes = {family: {j.row.layer.shape for j in JOBS if j.family == family} for family in tune_report.LINES}
    resnet = ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
    assert shapes == {
        "BatchNorm": {(n, c, s, s) for n in (32, 256) for c, s in resnet},
        "GroupNorm": {(2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (1, 512, 64, 64), (1, 128, 20, 256, 256)},
        "InstanceNorm": {(2, 32, 128, 128, 128), (2, 320, 8, 8, 8)},
        "LayerNorm": {(1024, 12288), (16384, 4096), (401408, 96)},
    }
    small = [j for j in JOBS if j.family == "small"]
    assert {j.row.layer for j in small} == set(SMALL) and all(j.row.nbytes <= 1 << 20 for j in small)
    activations = {j.family: j.row.activation for j in JOBS if j.row.epilogue == "act"}
    assert activations["GroupNorm"] == "silu" and activations["BatchNorm"] == "relu"


def test_a_short_budget_meets_every_shape_first() -> None:
    """In bfloat16 and behind the model's own epilogue; channels_last beside planar, backward beside forward."""
    first = JOBS[: 2 * sum(len(layer.layouts) for layer in LAYERS)]
    assert {j.row.layer for j in first} == set(LAYERS)
    assert {(j.row.dtype, j.row.epilogue) for j in first if j.family == "LayerNorm"} == {("bfloat16", "plain")}
    assert {(j.row.dtype, j.row.epilogue) for j in first if j.family == "GroupNorm"} == {("bfloat16", "act")}
    assert [j.family for j in first[:24]] == ["BatchNorm"] * 24 and first[-1].family == "small"
    assert [j.name for j in jobs("VAE.*last.*forward")] == [j.name for j in JOBS if "VAE" in j.name
                                                            and "last" in j.name and "forward" in j.name]  # fmt: skip


def test_passes_are_the_least() -> None:
    resnet = "ResNet-50 BatchNorm2d 32x64x112x112 bfloat16 planar"
    assert [job(f"{resnet} {e} forward").passes for e in ("plain", r"\+relu", r"\+add\+relu")] == [2, 2, 3]
    # x and dy in, dx out; with an add dresidual. A ReLU's mask of a bit an element is not counted.
    assert [job(f"{resnet} {e} backward").passes for e in ("plain", r"\+relu", r"\+add\+relu")] == [3, 3, 4]
    assert not any(j.call.residual for j in JOBS)  # ReLU follows every add: backward has the mask


# ---- candidates ----


@pytest.mark.parametrize("device", ["H200", "A100", "tiny"])
def test_candidates_differ_and_are_forced_exactly(device: str) -> None:
    facts, wanted = DEVICES[device], 6
    for each in JOBS:
        plans, found = each.compare(facts), candidates(each, facts, wanted)
        assert found[0].plan == each.plan(facts, {}) == plans[0], each.name
        assert len(found) <= wanted and len({c.label for c in found}) == len(found), each.name
        for i, candidate in enumerate(found):
            assert each.plan(facts, candidate.forced) == candidate.plan, f"{each.name}: {candidate.plan}"
            assert not any(candidate.plan == other.plan for other in found[:i]), each.name


@pytest.mark.parametrize("device", ["H200", "A100", "tiny"])
def test_the_best_of_every_kind_is_among_them(device: str) -> None:
    """As far as there is room: there are nine kinds. The smallest maps have grids that nothing forces."""
    facts = DEVICES[device]
    for each in JOBS:
        plans, found = each.compare(facts), candidates(each, facts, 9)
        kinds = {kind_of(c.plan) for c in found}
        missing = {kind_of(plan) for plan in plans} - kinds
        assert not missing or each.row.layer == cases.TINY, each.name
        for kind in kinds:
            best = next(plan for plan in plans if kind_of(plan) == kind)
            forced = [c for c in found if kind_of(c.plan) == kind]
            assert forced[0].plan == best or cannot_be_forced(each, best), each.name
        rest = [c.plan.estimate.total for c in found[len(kinds) :]]
        assert rest == sorted(rest)


def cannot_be_forced(each: Job, plan: _C.ForwardPlan | _C.BackwardPlan) -> bool:
    """The source of the sums of LayerNorm's parameters tells two plans apart, and nothing forces it."""
    return each.backward and each.row.layer.norm == "LayerNorm" and plan.param_sums in ("in_gang", "own_launch")  # type: ignore[union-attr]


def test_few_candidates_are_the_cheapest_kinds() -> None:
    all_of = candidates(RESNET, H200, 99)
    assert [c.plan for c in candidates(RESNET, H200, 1)] == [all_of[0].plan]
    first = candidates(RESNET, H200, 3)
    assert [c.label for c in first] == [c.label for c in all_of[:3]]
    assert len({kind_of(c.plan) for c in first}) == 3
    assert any(c.label == "split" and c.forced == {"strategy": "split"} for c in all_of)


def test_a_residual_is_predicted_with_its_bytes() -> None:
    """Read in forward, and its gradient written in backward."""
    for direction in ("forward", "backward"):
        name = "ResNet-50 BatchNorm2d 256x64x112x112 bfloat16 planar"
        both = job(f"{name} plain {direction}"), job(rf"{name} \+add\+relu {direction}")
        plain, add = (next(p.estimate for p in each.compare(H200) if p.strategy == "split") for each in both)
        # The few blocks of the last wave do not keep the memory quite busy.
        assert add.memory - plain.memory == pytest.approx(256 * 64 * 112 * 112 * 2 / COPY_BYTES_PER_US, rel=5e-3)
        assert add.issue > plain.issue
        assert (add.barriers, add.launches) == (plain.barriers, plain.launches)


def test_a_copy_is_predicted_as_one_pass() -> None:
    nbytes = 256 * 64 * 112 * 112 * 2
    copy = predict_copy(job("ResNet-50 BatchNorm2d 256x64x112x112 bfloat16 planar plain forward"), H200)
    least = 2 * nbytes / COPY_BYTES_PER_US
    assert copy == pytest.approx(least, rel=0.05) and copy > least


# ---- the report ----


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


# ---- measuring ----


def small_job(epilogue: str, backward: bool, layout: str = "planar") -> Job:
    layer = cases.Layer("UNet", "GroupNorm", (2, 16, 6, 6), (4, 16), (), ("silu",))
    return Job(Row(layer, "bfloat16", layout, epilogue), backward)


def test_disagreement_is_in_epsilons() -> None:
    one = {"y": torch.ones(4, dtype=torch.bfloat16), "sum": torch.tensor([1000.0, 0.0]), "mask": torch.zeros(2).byte()}
    other = {**one, "mask": torch.ones(2).byte()}
    assert tune.disagreement(one, other) == 0
    eps = torch.finfo(torch.bfloat16).eps
    assert tune.disagreement({**one, "y": one["y"] + 2 * eps}, one) == 2
    close = torch.tensor([1000.0, 1000 * torch.finfo(torch.float32).eps])
    assert tune.disagreement({**one, "sum": close}, one) == pytest.approx(1)
    assert not tune.disagreement({**one, "y": one["y"] * torch.nan}, one) <= 64


@pytest.mark.parametrize("epilogue", cases.EPILOGUES)
@pytest.mark.parametrize("backward", [False, True])
def test_measuring(epilogue: str, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate runs under its own plan, on all copies in turn, and none stays forced."""
    forced: list[object] = []
    turns: list[int] = []  # addresses of x
    timed_call = tune.timed_call

    def set_plan_options(**options: object) -> None:
        forced.append(options.get("forced"))

    def counted(each: Job, raw: RawCall) -> Callable[[], dict[str, torch.Tensor]]:
        call = timed_call(each, raw)
        return lambda: (turns.append(raw.x.data_ptr()), call())[1]

    monkeypatch.setattr(tune._C, "set_plan_options", set_plan_options)
    monkeypatch.setattr(tune, "timed_call", counted)
    monkeypatch.setattr(tune, "cache_bytes", lambda device: 5000)
    each = small_job(epilogue, backward)
    assert copies_for(each.row.nbytes, 5000) == 4
    found = candidates(each, H200, 3)
    outcome = tune.measure(each, H200, found, 0.0, "cpu")
    assert outcome.disagreements == (0.0,) * len(found) and outcome.copy is not None
    assert all(t.median > 0 for t in (*outcome.times, outcome.copy))
    assert forced[: len(found) + 1] == [found[0].forced, *(c.forced for c in found)]
    raced = turns[len(found) + 1 :]  # after the check
    assert len(set(raced[:4])) == 4 and raced[4:] == raced[:-4]
    assert forced[-1] is None and all(c.forced in forced[len(found) + 1 :] for c in found)
    saved = json.loads(json.dumps(outcome.to_json()))
    assert [c["forced"] for c in saved["candidates"]] == [c.forced for c in found]
    assert saved["candidates"][1]["us"]["median"] == pytest.approx(outcome.us(1), abs=1e-3)


def test_refusals_are_counted_by_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused plan is refused at its first call: the choice's comes before the comparison."""
    each = small_job("plain", True)
    found = candidates(each, H200, 3)
    refusing, current = [found[0].forced, found[2].forced], {"count": 0}

    def set_plan_options(**options: object) -> None:
        if options.get("forced") in refusing:
            refusing.remove(options["forced"])  # type: ignore[arg-type]
            current["count"] += 2

    monkeypatch.setattr(tune._C, "set_plan_options", set_plan_options)
    monkeypatch.setattr(tune._C, "refused_gangs", lambda: 5 + current["count"])
    outcome = tune.measure(each, H200, found, 0.0, "cpu")
    assert outcome.refusals == (2, 0, 2)
    saved = json.loads(json.dumps(outcome.to_json()))
    assert [c["refused_launches"] for c in saved["candidates"]] == [2, 0, 2]


def test_calls_compute_what_torch_does() -> None:
    raw = tune.make_raw_call(small_job("plain", True), "cpu", 0)
    x = raw.x.float().requires_grad_()
    y = torch.nn.functional.group_norm(x, 4, raw.weight, raw.bias)
    (dx,) = torch.autograd.grad(y, x, raw.dy.float())
    got = tune.timed_call(small_job("plain", True), raw)()
    torch.testing.assert_close(got["dx"].float(), dx, rtol=2e-2, atol=2e-2)
    assert not torch.equal(raw.x, tune.make_raw_call(small_job("plain", True), "cpu", 1).x)


def test_what_does_not_fit_is_skipped_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    now, parts = [0.0], []

    def measure(each: Job, facts: object, found: list[Candidate], budget_s: float, device: str) -> str:
        parts.append(budget_s)
        now[0] += 2 * budget_s
        if each is todo[1]:
            raise torch.OutOfMemoryError("CUDA out of memory\nmore")
        if len(parts) == 4:
            raise KeyboardInterrupt
        return each.name

    monkeypatch.setattr(tune.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tune, "measure", measure)
    todo = JOBS[:6]
    outcomes, skipped = tune.measure_all(todo, H200, 2, 6.0, "cpu")
    assert parts == pytest.approx([0.5] * 4)
    assert outcomes == [todo[0].name, todo[2].name]
    assert skipped == [(todo[1].name, "CUDA out of memory"), *((each.name, "interrupted") for each in todo[3:])]

    parts.clear()
    now[0] = 0.0
    outcomes, skipped = tune.measure_all(todo[2:5], H200, 2, 0.7, "cpu")
    assert parts == pytest.approx([tune.LEAST_S] * 2) and len(outcomes) == 2
    assert skipped == [(todo[4].name, "no time left")]


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    def race(calls: dict[str, Callable[[], object]], budget_s: float, device: str) -> dict[str, Timing]:
        for call in calls.values():
            call()
        return {"copy": timing(2.0), "call": timing(3.0)}

    monkeypatch.setattr(tune, "race", race)
    monkeypatch.setattr(tune, "LARGE_BYTES", 1 << 20)
    ceilings = tune.measure_ceilings("cpu")
    assert ceilings.bytes_per_us == pytest.approx(1 << 20) and ceilings.launch_us == pytest.approx(3.0)


# ---- the command ----


def test_without_a_gpu_it_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "new" / "t.json", tmp_path / "new" / "t.md"
    arguments = ["--facts", "H200", "--filter", "VAE.*512x.*planar plain", "--candidates", "2"]
    tune.main([*arguments, "--json", str(files[0]), "--markdown", str(files[1])])
    text = capsys.readouterr().out
    assert "VAE GroupNorm 1x512x64x64" in text and "GroupNorm" in text and "GPU" not in text
    saved = json.loads(files[0].read_text())
    assert saved["facts"]["num_sms"] == 132 and saved["ceilings"] is None and saved["fit"] is None
    assert [(j["direction"], len(j["candidates"])) for j in saved["jobs"]] == [("forward", 2), ("backward", 2)] * 2
    assert saved["commit"] and len(files[1].read_text().splitlines()) == 2 + 8


def test_what_it_cannot_do_it_says() -> None:
    with pytest.raises(SystemExit, match="no job matches"):
        tune.main(["--facts", "H200", "--filter", "GroupNormal"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU"):
            tune.main([])
