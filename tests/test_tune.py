"""benchmarks/tune.py without a GPU: jobs, their candidates, and measuring itself on the CPU, which heeds no plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import tune, tune_report
from benchmarks.candidates import LAYERS, SMALL, Candidate, Job, candidates, jobs, kind_of, predict_copy
from benchmarks.contestants import Row, copies_for
from benchmarks.timing import Timing
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
        return {"copy": Timing(2e-6, 2e-6, 2e-6, 5), "call": Timing(3e-6, 3e-6, 3e-6, 5)}

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
