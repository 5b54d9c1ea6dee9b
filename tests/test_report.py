"""README's figures are those of the committed runs; and benchmarks/report.py on runs that are made up."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.end_to_end import Outcome, Setup
from benchmarks.results import Result, json_text
from benchmarks.timing import Timing

Edit = Callable[[dict[str, Any]], None]
RUNS = (report.RUN, report.SYSTEM_MALLOC_RUN, report.AVX2_RUN, report.GPU_RUN)  # of bench.py


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """README and the runs in a folder of their own, which the test may change."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for name in (*RUNS, *report.PICTURES.values()):
        shutil.copy(report.RESULTS / name, results / name)
    shutil.copy(report.README, tmp_path / "README.md")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


def edit(name: str, change: Edit) -> None:
    path = report.RESULTS / name
    run = json.loads(path.read_text())
    change(run)
    path.write_text(json_text(run))


def slower(factor: float) -> Edit:
    """Our times multiplied, in rows that are not tiny."""

    def change(run: dict[str, Any]) -> None:
        for row in run["rows"]:
            for mode in row["modes"].values():
                for part in ("median", "low", "high"):
                    mode["us"]["fastnorm"][part] *= 1.0 if row["model"] == "tiny" else factor

    return change


def test_readme_says_what_the_committed_runs_say() -> None:
    assert report.main(["--check"]) == 0


def test_readmes_speed_section_has_no_figure_outside_of_the_marks() -> None:
    section = re.search(r"^## Speed\n(.*?)^## ", report.README.read_text(), re.MULTILINE | re.DOTALL)
    assert section is not None
    outside = report.MARKED.sub("", section[1])
    assert outside != section[1] and not re.search(r"\d", outside), outside


@pytest.mark.parametrize("path", RUNS)
def test_a_row_comes_back_from_json(path: str) -> None:
    for row in report.load(path)["rows"]:
        result = Result.from_json(row, "cuda" if path == report.GPU_RUN else "cpu")
        again = result.to_json()
        assert {k: v for k, v in again.items() if k != "modes"} == {k: v for k, v in row.items() if k != "modes"}
        for mode, measured in row["modes"].items():
            assert result.speedup(mode) == pytest.approx(measured["times_torch"], abs=1e-3)
            assert result.copies(mode) == pytest.approx(measured["copies"], rel=1e-3, abs=1e-3)
            assert again["modes"][mode]["us"] == measured["us"]  # type: ignore[index]


def test_a_typed_figure_fails_the_check_and_is_put_right(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = report.README.read_text()
    wrong = re.sub(r"Over all (\d+) rows: \d", r"Over all \1 rows: 9", right)
    assert wrong != right
    report.README.write_text(wrong)
    assert report.main(["--check"]) == 1 and "README.md is not what the committed runs say" in capsys.readouterr().out
    assert report.README.read_text() == wrong
    assert report.main([]) == 0 and report.README.read_text() == right


def test_another_run_makes_another_text_and_picture(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def few(run: dict[str, Any]) -> None:  # a picture of few rows is drawn sooner
        run["rows"] = [row for row in run["rows"] if row["epilogue"] == "plain" and row["layout"] == "planar"]

    edit(report.RUN, few)
    edit(report.RUN, slower(4))
    picture = report.RESULTS / report.PICTURES[report.RUN]
    old = picture.read_bytes()
    assert report.main(["--check"]) == 1 and picture.name in capsys.readouterr().out
    assert report.main([]) == 0 and picture.read_bytes() != old
    assert report.main(["--check"]) == 0
    text = " ".join(report.README.read_text().split())
    assert "geometric mean over float32 and bfloat16, planar, plain" in text and "do not reach yet" in text


def test_goals_that_are_reached_are_said_to_be(copied: Path) -> None:
    edit(report.RUN, slower(0.1))
    text = report.speed()
    assert "What we aimed for is reached: 2.6 times torch.nn forward" in text and "do not reach" not in text
    assert "it is the faster one" not in text


def test_a_run_without_avx512_says_where_torch_is_faster(copied: Path) -> None:
    figures = 3 * sum(row["model"] != "tiny" for row in report.load(report.AVX2_RUN)["rows"])
    edit(report.AVX2_RUN, slower(100))
    assert f"torch.nn is the faster one in {figures} of {figures} figures" in " ".join(report.avx2().split())
    edit(report.AVX2_RUN, slower(1e-4))
    assert "torch.nn is the faster one" not in report.avx2()


def test_a_gpus_table_says_where_torch_is_faster_and_what_was_left_out(copied: Path) -> None:
    def no_float32_plain(run: dict[str, Any]) -> None:
        run["rows"] = [row for row in run["rows"] if row["dtype"] != "float32" or row["epilogue"] != "plain"]

    edit(report.GPU_RUN, no_float32_plain)
    edit(report.GPU_RUN, slower(0.01))
    text = " ".join(report.gpu().split())
    assert "NVIDIA H200" in text and "torch.nn is the faster one" not in text and "Of float32: " in text
    edit(report.GPU_RUN, slower(1e4))
    figures = re.search(r"torch\.nn is the faster one in (\d+) of (\d+) figures: ", " ".join(report.gpu().split()))
    assert figures is not None and figures[1] == figures[2] != "0"


def test_a_busy_machine_and_no_onednn_are_said(copied: Path) -> None:
    def change(run: dict[str, Any]) -> None:
        run["machine"]["busy_cores"] = 0.7
        for row in run["rows"]:
            for mode in row["modes"].values():
                mode["us"].pop("onednn", None)

    edit(report.RUN, change)
    text = report.speed()
    assert "a busy (0.7 cores by other processes) machine" in text.replace("\n", " ") and "oneDNN" not in text


def test_models_have_a_section(copied: Path) -> None:
    outcome = Outcome(Setup("resnet18", (8, 3, 224, 224)))
    for name, ms in (("torch.nn", 400.0), ("fuse", 200.0)):
        outcome.times[name] = Timing(ms * 1e-3, ms * 1e-3, ms * 1e-3, 3)
        outcome.memory[name] = 500_000_000
    run = {k: v for k, v in report.load(report.RUN).items() if k in ("machine", "versions", "commit", "date")}
    with pytest.raises(report.ReportError, match=r"models-.*\.json does not exist"):
        report.models()
    (report.RESULTS / report.MODELS_RUN).write_text(json_text({**run, "rows": [outcome.to_json()]}))
    report.README.write_text("<!-- report: models -->\n<!-- end -->\n")
    assert report.main([]) == 0
    row = "| resnet18 | 8x3x224x224 | float32 | planar | train | 20.0, 500 MB | 2.00x, 100% |"
    assert row in report.README.read_text().splitlines()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- report: sped -->\n<!-- end -->", "sped -->: expected one of speed, avx2, gpu, models"),
        ("<!-- report: speed -->\n", "has no `<!-- end -->`"),
    ],
)
def test_marks_that_cannot_be_filled_are_named(text: str, message: str) -> None:
    with pytest.raises(report.ReportError, match=re.escape(message)):
        report.rewritten(text)


def test_a_span_of_one_value_is_one_value() -> None:
    assert report.between([1.04, 0.96]) == "1.0" and report.between([1.0, 2.04]) == "1.0 to 2.0"
    assert report.listed(["a"]) == "a" and report.listed(["a", "b", "c"]) == "a, b and c"
