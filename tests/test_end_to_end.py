"""benchmarks/end_to_end.py, its models and its measure of memory, on small pictures."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import fastnorm
from benchmarks import compare, end_to_end, memory, models
from benchmarks.end_to_end import Contestant, Outcome, Setup
from benchmarks.models import BasicBlock, ConvNeXt, Model, ResNet, UNet
from benchmarks.timing import Timing
from tests.common.cases import LAYOUTS

MIB = 1 << 20


class Small(nn.Module):
    """A norm of each kind, in few layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2)
        self.bn, self.gn = nn.BatchNorm2d(16), nn.GroupNorm(4, 16)
        self.ln, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(self.bn(self.conv(x)))
        return self.head(self.ln(nn.functional.silu(self.gn(x)).mean((2, 3))))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "MODELS", {"small": Model(Small, 16)})
    monkeypatch.setattr(models, "MODELS", {"small": Model(Small, 16)})


def setup(**options: object) -> Setup:
    return Setup("small", (4, 3, 16, 16), **options)  # type: ignore[arg-type]


# ---- models ----


@pytest.mark.parametrize(
    ("name", "parameters", "norms", "fused"),
    [  # parameters: torchvision's 11,689,512 and 25,557,032, ConvNeXt-T's 28,589,128
        ("resnet18", 11_689_512, {"BatchNorm2d": 20}, 17),
        ("resnet50", 25_557_032, {"BatchNorm2d": 53}, 49),
        ("convnext", 28_589_128, {"LayerNorm": 23}, 0),
        ("unet", None, {"GroupNorm": 21}, 21),
    ],
)
def test_models_are_those_of_the_papers_and_fuse(
    name: str, parameters: int | None, norms: dict[str, int], fused: int
) -> None:
    with torch.device("meta"):
        model = models.MODELS[name].build()
    assert Counter(type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__ and m._parameters) == norms
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == parameters
    rows = fastnorm.report(fastnorm.fuse(model))
    assert sum("fused" in row.why and "not fused" not in row.why for row in rows) == fused


@pytest.mark.parametrize(
    "make",
    [lambda: ResNet(BasicBlock, (1, 1)), lambda: UNet((32, 64)), lambda: ConvNeXt((16, 32), (1, 1))],
    ids=["resnet", "unet", "convnext"],
)
def test_a_model_computes_the_same_in_every_way(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "MODELS", {"small": Model(make, 32)})  # type: ignore[arg-type]
    for layout in LAYOUTS:
        case = Setup("small", (4, 3, 32, 32), layout=layout)
        outcome = Outcome(case)
        found = dict(end_to_end.contestants(case, compiled=False))
        end_to_end.compare(found, outcome)
        assert not outcome.faults and set(found) == set(end_to_end.WAYS)


def test_a_model_whose_library_is_missing_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm" in str(models.why_absent("timm/resnet50")) and models.why_absent("unet") is None


# ---- contestants ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", end_to_end.MODES)
def test_a_row_is_compared_and_timed(small: None, mode: str, dtype: str) -> None:
    outcome = end_to_end.measure(setup(mode=mode, dtype=dtype), 0.0, with_memory=False)
    assert set(outcome.times) == set(end_to_end.WAYS) and not outcome.faults and not outcome.memory
    assert set(outcome.errors) == set(end_to_end.WAYS[1:])
    assert all(set(errors) == {"output", "float64"} for errors in outcome.errors.values())
    assert all(outcome.images_per_s(name) > 0 for name in outcome.times)


def test_enabled_serves_torchs_norms_and_only_within_its_steps(small: None) -> None:
    def served() -> int:
        return sum(row.served_calls for row in fastnorm.report())

    contestant = Contestant(Small(), setup(), "enabled")
    before = served()
    contestant.step()
    assert served() - before == 6  # three norms, forward and backward
    Contestant(Small(), setup(), "torch.nn").step()
    assert served() - before == 6


def test_a_training_step_trains(small: None) -> None:
    contestant = Contestant(Small(), setup(), "fuse")
    before = [p.detach().clone() for p in contestant.model.parameters()]
    contestant.step()
    assert all(p.grad is None for p in contestant.model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(contestant.model.parameters(), before, strict=True))
    kinds = {type(m) for m in contestant.model.modules()}
    assert fastnorm.BatchNorm2d in kinds and fastnorm.GroupNorm in kinds


def test_a_contestant_with_other_results_is_not_timed(small: None) -> None:
    outcome = Outcome(setup())
    found = dict(end_to_end.contestants(outcome.setup, compiled=False))
    with torch.no_grad():
        found["convert"].model.ln.weight.mul_(1.01)
    end_to_end.compare(found, outcome)
    assert "convert" not in found and [fault.contestant for fault in outcome.faults] == ["convert"]
    assert "convert is wrong: the output differs from torch.nn's by" in str(outcome.faults[0])


def test_wrong_gradients_are_found_in_float64(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastnorm.fuse

    def wrong(model: nn.Module) -> nn.Module:
        model.gn.weight.register_hook(lambda gradient: 1.001 * gradient)
        return right(model)

    monkeypatch.setattr(fastnorm, "fuse", wrong)
    outcome = Outcome(setup())
    end_to_end.compare(dict(end_to_end.contestants(outcome.setup, compiled=False)), outcome)
    (fault,) = outcome.faults
    assert str(fault).startswith("fuse is wrong: in float64, output and gradients differ")
    assert outcome.errors["convert"]["float64"] < 1e-6


# ---- memory ----


def allocate(megabytes: int) -> int:
    kept = []

    def work() -> None:
        kept.append(bytearray(megabytes * MIB))  # calloc: resident once it is written
        kept[0][:: 1 << 10] = b"x" * (megabytes << 10)
        kept.clear()

    return memory.peak(work, "cpu")


def test_peak_memory_of_a_child() -> None:
    assert 63 * MIB <= memory.in_child(allocate, 64) <= 80 * MIB


def test_a_fault_in_a_child_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        memory.in_child(divmod, 1, 0)


# ---- the command ----


def test_the_command_saves_a_run_that_can_be_compared(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "in_child", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(end_to_end, "keep_memory", lambda: False)
    out, table = tmp_path / "new" / "a.json", tmp_path / "a.md"
    arguments = ["--model", "small", "--batch", "2", "--memory-format", "planar", "--budget", "0.001"]
    monkeypatch.setattr(end_to_end, "choices", lambda names, text: tuple(text.split(",")))
    end_to_end.main([*arguments, "--json", str(out), "--markdown", str(table)])
    assert "geometric mean of 2" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [row["mode"] for row in rows] == ["train", "eval"] and rows[0]["shape"] == [2, 3, 16, 16]
    assert set(rows[0]["us"]["fuse"]) == {"median", "low", "high", "rounds"} and set(rows[0]["memory_mb"]) == {
        *end_to_end.WAYS
    }
    assert len(table.read_text().splitlines()) == 4
    assert compare.main([str(out), str(out)]) == 0
    end_to_end.main([*arguments, "--list"])
    assert capsys.readouterr().out.splitlines()[-1] == "small 2x3x16x16 f32 planar eval"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "alexnet"], "alexnet, expected some of resnet18"),
        (["--mode", "step"], "step, expected some of train, eval"),
        (["--dtype", "float16"], "float16, expected some of float32, bfloat16"),
        (["--batch", "0"], "'0', expected a whole number above 0"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        end_to_end.main(arguments)
    assert message in capsys.readouterr().err


def test_nothing_to_measure_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SystemExit, match="none of these models"):
        end_to_end.main(["--model", "timm/resnet50"])
    assert "timm/resnet50: absent, timm" in capsys.readouterr().out
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU"), contextlib.redirect_stdout(None):
            end_to_end.main(["--model", "unet", "--device", "cuda"])


def test_markdown_has_speed_and_share_of_memory() -> None:
    outcome = Outcome(setup())
    for name, ms in (("torch.nn", 4.0), ("fuse", 2.0)):
        outcome.times[name] = Timing(ms * 1e-3, ms * 1e-3, ms * 1e-3, 3)
    outcome.memory = {"torch.nn": 100_000_000, "fuse": 80_000_000}
    lines = end_to_end.make_markdown([outcome]).splitlines()
    assert lines[2] == "| small | 4x3x16x16 | float32 | planar | train | 1000.0, 100 MB | 2.00x, 80% |"
