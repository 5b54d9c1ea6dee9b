"""The figures of README and docs are those of the committed runs; and benchmarks/report.py on runs that are made up."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, report_text
from benchmarks import report_sections as sections
from benchmarks.end_to_end import Outcome, Setup
from benchmarks.results import Result, json_text
from benchmarks.timing import Timing

Edit = Callable[[dict[str, Any]], None]
RUNS = (sections.RUN, sections.SYSTEM_MALLOC_RUN, sections.AVX2_RUN, sections.GPU_RUN)  # of bench.py
COUNTS = (sections.INSTRUCTIONS, sections.CPU_INSTRUCTIONS)
OTHERS = (*COUNTS, sections.COMPILE_RUN, sections.IMAGES_RUN, sections.HOST_TIME_RUN)
# Names of hardware, and where links lead: no figures.
NAMES = re.compile(r"AVX-512|H200|\]\(\S+\)|^\[\w+\]: \S+$", re.MULTILINE)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pages and the runs in a folder of their own, which the test may change. There is no run of whole models."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for name in (*RUNS, *OTHERS, *sections.PICTURES.values()):
        shutil.copy(report_text.RESULTS / name, results / name)
    for page in report.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(report.ROOT / page, tmp_path / page)
    monkeypatch.setattr(report_text, "RESULTS", results)
    monkeypatch.setattr(report_text, "ROOT", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main([]) == 0  # the section of whole models says that there is none
    return tmp_path


def edit(name: str, change: Edit) -> None:
    path = report_text.RESULTS / name
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


def read(page: str) -> str:
    return (report.ROOT / page).read_text()


def words(text: str) -> str:
    """On one line."""
    return " ".join(text.split())


def test_pages_say_what_the_committed_runs_say() -> None:
    assert report.main(["--check"]) == 0


def test_pages_have_no_figure_of_speed_outside_of_the_marks() -> None:
    section = re.search(r"^## Speed\n(.*?)^## ", read(report.README), re.MULTILINE | re.DOTALL)
    assert section is not None
    for text in (section[1], read(report.SPEED)):
        outside = NAMES.sub("", report.MARKED.sub("", text))
        assert outside != text and not re.search(r"\d", outside), outside


@pytest.mark.parametrize("path", RUNS)
def test_a_row_comes_back_from_json(path: str) -> None:
    for row in report_text.load(path)["rows"]:
        result = Result.from_json(row, "cuda" if path == sections.GPU_RUN else "cpu")
        again = result.to_json()
        assert {k: v for k, v in again.items() if k != "modes"} == {k: v for k, v in row.items() if k != "modes"}
        for mode, measured in row["modes"].items():
            assert result.speedup(mode) == pytest.approx(measured["times_torch"], abs=1e-3)
            assert result.copies(mode) == pytest.approx(measured["copies"], rel=1e-3, abs=1e-3)
            assert again["modes"][mode]["us"] == measured["us"]  # type: ignore[index]


@pytest.mark.parametrize("page", report.PAGES)
def test_a_typed_figure_fails_the_check_and_is_put_right(
    page: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = read(page)
    wrong = re.sub(r"(<!-- report: [^|]*?\d)(?=[ .x])", r"\g<1>9", right, count=1)
    assert wrong != right
    (copied / page).write_text(wrong)
    assert report.main(["--check"]) == 1 and f"{page} is not what the committed runs say" in capsys.readouterr().out
    assert read(page) == wrong
    assert report.main([]) == 0 and read(page) == right


def test_another_run_makes_another_text_and_picture(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def few(run: dict[str, Any]) -> None:  # a picture of few rows is drawn sooner
        run["rows"] = [row for row in run["rows"] if row["epilogue"] == "plain" and row["layout"] == "planar"]

    edit(sections.RUN, few)
    edit(sections.RUN, slower(4))
    picture = report_text.RESULTS / sections.PICTURES[sections.RUN]
    old = picture.read_bytes()
    assert report.main(["--check"]) == 1 and picture.name in capsys.readouterr().out
    assert report.main([]) == 0 and picture.read_bytes() != old
    assert report.main(["--check"]) == 0
    for page in (report.README, report.SPEED):
        assert "geometric mean over float32 and bfloat16, planar, plain" in words(read(page))
    assert "do not reach yet" in words(read(report.SPEED)) and "torch.nn is the faster one" in words(
        read(report.README)
    )


def test_goals_that_are_reached_are_said_to_be(copied: Path) -> None:
    edit(sections.RUN, slower(0.1))
    text = sections.speed()
    assert "What we aimed for is reached: 2.6 times torch.nn forward" in text and "do not reach" not in text
    assert "it is the faster one" not in text


def test_goals_that_are_reached_are_told_from_those_that_are_not() -> None:
    reached = {"forward": 2.7, "step": 2.3, "eval": 2.2}
    assert sections.goals(reached, []).replace("\n", " ") == (
        "What we aim for and do not reach yet: 2.4 times torch.nn forward + backward. Reached: 2.6 times torch.nn "
        "forward and 2.2 in evaluation, and no figure below 1.05."
    )


def test_a_run_without_avx512_says_where_torch_is_faster(copied: Path) -> None:
    figures = 3 * sum(row["model"] != "tiny" for row in report_text.load(sections.AVX2_RUN)["rows"])
    edit(sections.AVX2_RUN, slower(100))
    assert f"torch.nn is the faster one in {figures} of {figures} figures" in " ".join(sections.avx2().split())
    edit(sections.AVX2_RUN, slower(1e-4))
    assert "torch.nn is the faster one" not in sections.avx2()


def test_a_gpus_table_says_where_torch_is_faster_and_what_was_left_out(copied: Path) -> None:
    def no_float32_plain(run: dict[str, Any]) -> None:
        run["rows"] = [row for row in run["rows"] if row["dtype"] != "float32" or row["epilogue"] != "plain"]

    edit(sections.GPU_RUN, no_float32_plain)
    edit(sections.GPU_RUN, slower(0.01))
    text = " ".join(sections.gpu().split())
    assert "NVIDIA H200" in text and "torch.nn is the faster one" not in text and "Of float32: " in text
    edit(sections.GPU_RUN, slower(1e4))
    figures = re.search(r"torch\.nn is the faster one in (\d+) of (\d+) figures: ", " ".join(sections.gpu().split()))
    assert figures is not None and figures[1] == figures[2] != "0"


def test_a_busy_machine_and_no_onednn_are_said(copied: Path) -> None:
    def change(run: dict[str, Any]) -> None:
        run["machine"]["busy_cores"] = 0.7
        for row in run["rows"]:
            for mode in row["modes"].values():
                mode["us"].pop("onednn", None)

    edit(sections.RUN, change)
    text = sections.speed()
    assert "a busy (0.7 cores by other processes) machine" in text.replace("\n", " ") and "oneDNN" not in text


def test_models_have_a_section(copied: Path) -> None:
    outcome = Outcome(Setup("resnet18", (8, 3, 224, 224)))
    for name, ms in (("torch.nn", 400.0), ("fuse", 200.0)):
        outcome.times[name] = Timing(ms * 1e-3, ms * 1e-3, ms * 1e-3, 3)
        outcome.memory[name] = 500_000_000
    run = {k: v for k, v in report_text.load(sections.RUN).items() if k in ("machine", "versions", "commit", "date")}
    assert "No run of whole models is saved yet" in read(report.SPEED)
    (report_text.RESULTS / sections.MODELS_RUN).write_text(json_text({**run, "rows": [outcome.to_json()]}))
    assert report.main(["--check"]) == 1 and report.main([]) == 0
    row = "| resnet18 | 8x3x224x224 | float32 | planar | train | 20.0, 500 MB | 2.00x, 100% |"
    assert row in read(report.SPEED).splitlines() and "No run of whole models" not in read(report.SPEED)


def test_a_run_that_is_absent_is_named(copied: Path) -> None:
    (report_text.RESULTS / sections.AVX2_RUN).unlink()
    with pytest.raises(
        report_text.ReportError, match=r"cpu-epyc-avx2-2core\.json does not exist: save a run there first"
    ):
        sections.avx2()


def test_torch_compile_says_who_is_ahead(copied: Path) -> None:
    count = len(report_text.load(sections.COMPILE_RUN)["rows"])

    def kernels(factor: float) -> Edit:
        """Those of bfloat16 take so many times the time of inductor's code, others half of it."""

        def change(run: dict[str, Any]) -> None:
            for row in run["rows"]:
                row["kernel_us"] = row["torch compiled_us"] * (factor if row["dtype"] == "bfloat16" else 0.5)
                row["fastnorm_us"] = row["kernel_us"] / 2

        return change

    edit(sections.COMPILE_RUN, kernels(1.25))
    text = words(sections.under_compile())
    assert f"in {count // 2} of the {count} rows; in the others, of bfloat16, they take 25% longer." in text
    edit(sections.COMPILE_RUN, kernels(0.5))
    text = words(sections.under_compile())
    assert f"in {count} of the {count} rows. Eager calls of the kernels are faster still in {count} rows." in text


def test_what_is_farthest_from_a_copy_is_counted(copied: Path) -> None:
    def change(run: dict[str, Any]) -> None:
        for row in run["rows"]:
            row["instructions"] = 1234.0 if row["direction"] == "backward" else 12.0

    edit(sections.INSTRUCTIONS, change)
    edit(sections.GPU_RUN, slower(100))
    text = words(sections.gpu_limits())
    assert text.startswith("- On an NVIDIA H200 the kernels take") and text.count("12 forward and 1234 backward") == 4
    assert all(float(figure) > 50 for figure in re.findall(r"\((\d[\d.]*) to", text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- report: sped -->\n<!-- end -->", "docs/limits.md has the sections sped, expected gpu-limits"),
        ("<!-- report: speed -->\n<!-- end -->", "docs/limits.md has the sections speed, expected gpu-limits"),
        ("", "docs/limits.md has the sections none, expected gpu-limits"),
        ("<!-- report: gpu-limits -->\n", "has no `<!-- end -->`"),
    ],
)
def test_marks_that_cannot_be_filled_are_named(text: str, message: str) -> None:
    with pytest.raises(report_text.ReportError, match=re.escape(message)):
        report.rewritten(text, report.LIMITS)


def test_a_span_of_one_value_is_one_value() -> None:
    assert sections.between([1.04, 0.96]) == "1.0" and sections.between([1.0, 2.04]) == "1.0 to 2.0"
    assert sections.listed(["a"]) == "a" and sections.listed(["a", "b", "c"]) == "a, b and c"
