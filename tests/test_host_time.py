"""benchmarks/host_time.py on two of its cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from benchmarks import host_time
from benchmarks.contestants import MODES


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = tuple(case for case in host_time.CASES if case.name in ("LayerNorm", "BatchNorm2d + add + ReLU"))
    monkeypatch.setattr(host_time, "CASES", chosen)
    host_time.main(["--budget", "0.01", "--json", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(row["layers"], row["mode"]) for row in rows] == [(case.title, mode) for case in chosen for mode in MODES]
    assert all(row[f"{name}_us"] > 0 for row in rows for name in ("torch", "convert", "enabled"))
    assert [row["layers"] for row in rows if "fuse_us" in row] == [chosen[1].title] * len(MODES)
    assert capsys.readouterr().out.count("\n| BatchNorm2d + add + ReLU 2x8x4x4 |") == len(MODES)


def test_other_values_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = host_time.Case("LayerNorm", lambda: nn.LayerNorm(64), host_time.ROWS)
    monkeypatch.setattr(host_time.fastnorm, "convert", lambda _: nn.LayerNorm(64, elementwise_affine=False, eps=1.0))
    with pytest.raises(AssertionError, match="not close"):
        host_time.race(case, "forward", 0.01)
