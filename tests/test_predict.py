"""benchmarks/predict.py: the predicted shares of the rows of the benchmark table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import predict
from benchmarks.candidates import Job, predict_copy
from benchmarks.contestants import table
from benchmarks.instructions import DIRECTIONS, key_of
from tests.common.plan_model import DEVICES

LOG = Path(__file__).parents[1] / "benchmarks" / "results" / "LOG.md"
SAVED = LOG.with_name("instructions.json")
SHAPES = "32x256x56x56|transformer LayerNorm 16384x4096"


def test_a_share_is_the_floor_over_the_estimate() -> None:
    found = predict.predictions(SHAPES, ["H200"])["H200"]
    assert [p.job.backward for p in found] == [False, True] * (len(found) // 2)
    for p in found:
        total = p.job.compare(DEVICES["H200"])[0].estimate.total
        copies = {False: 3 if p.job.row.residual else 2, True: 4 if p.job.row.fused.startswith("+add+") else 3}
        floor = predict_copy(p.job, DEVICES["H200"]) * copies[p.job.backward] / 2
        assert p.share == pytest.approx(floor / total), p.job.name
        assert 0.02 < p.share < 1.5 and p.loss in "miw"


def test_what_takes_the_time() -> None:
    """A GPU with slow SMs issues too little, and one with slow memory moves too little."""
    job = next(Job(row, False) for row in table("32x256x56x56 bfloat16 channels_last", device="cuda"))
    facts = DEVICES["H200"]
    numbers = {name: getattr(facts, name) for name in dir(facts) if not name.startswith("_")}
    bounds = [
        predict.prediction(job, type(facts)(**numbers | other)).loss
        for other in ({"clock_mhz": 100}, {"bytes_per_us": 100_000})
    ]
    assert bounds == ["i", "m"]


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "predicted.md"
    predict.main(["--filter", SHAPES, "--device", "H100", "--device", "H200", "--markdown", str(path)])
    printed = capsys.readouterr().out
    assert "ResNet-50 BatchNorm2d 32x256x56x56" in printed and "85% forward and 80% backward" in printed
    heads, lines = predict.row_table(predict.predictions(SHAPES, ["H100", "H200"]))
    assert heads[2:] == ("H100 forward", "H100 backward", "H200 forward", "H200 backward")
    assert len(lines) == 2 * 2 * 3 + 2 * 3 and {len(cells) for _, cells in lines} == {6}
    _, families = predict.family_table(predict.predictions(SHAPES, ["H100", "H200"]))
    assert [(norm, cells[0]) for norm, cells in families] == [
        ("BatchNorm2d", "planar"), ("BatchNorm2d", "channels_last"), ("LayerNorm", "planar")
    ]  # fmt: skip
    assert path.read_text().count("| LayerNorm | planar |") == 1


NEWEST = LOG.read_text().split("\n## ")[1]


def test_the_newest_predictions_are_what_is_printed() -> None:
    """Of a table that is stale nobody can hold a GPU's first run against."""
    assert predict.markdown(predict.predictions("", predict.SHOWN_DEVICES)) in NEWEST, (
        "benchmarks/predict.py --markdown"
    )


def test_the_log_names_the_lines_that_are_missed() -> None:
    rows = [row for row in json.loads(SAVED.read_text())["rows"] if "line" in row]
    missed = [row for row in rows if row["instructions"] > row["line"]]
    assert f"{len(missed)} of {len(rows)}" in NEWEST
    expected = [(*key_of(row), f"{row['instructions']:g}", f"{row['line']:g}") for row in missed]
    found = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in NEWEST.splitlines()]
    named = [cells for cells in found if len(cells) == 7 and cells[3] in DIRECTIONS]
    assert [cells[:6] for cells in named] == expected and all(cells[6] for cells in named)


def test_a_filter_without_rows_says_so() -> None:
    with pytest.raises(SystemExit, match="no row matches"):
        predict.main(["--filter", "nothing"])
