"""The rows of bench.py under pytest-benchmark, to compare two commits:

    pytest benchmarks --benchmark-only --benchmark-autosave       # on the first
    pytest benchmarks --benchmark-only --benchmark-compare        # on the second: both in each group's table

A test's name is that of bench.py's row, its group is the row and the mode: the contestants of a layer, now and before.
The quick rows by default; FASTNORM_BENCH=<regex> picks rows of the full table ('.' for all), FASTNORM_PRESET=unet,vae
those of presets.
"""

from __future__ import annotations

import os

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.contestants import MODES, Arena, Row, quick_table, table
from benchmarks.presets import PRESETS
from benchmarks.timing import keep_memory
from benchmarks.validation import faults

PATTERN, NAMES = os.environ.get("FASTNORM_BENCH", ""), os.environ.get("FASTNORM_PRESET", "")
LAYERS = [layer for name in NAMES.split(",") if name for layer in PRESETS[name]]
ROWS = list(table(PATTERN, layers=LAYERS)) if PATTERN or NAMES else list(quick_table())
MAX_SECONDS = 1.0 if PATTERN or NAMES else 0.1  # of timing, for one contestant


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name.replace(" ", "-"))
def arena(request: pytest.FixtureRequest) -> Arena:
    keep_memory()
    return Arena(request.param)


@pytest.mark.parametrize("contestant", ["fastnorm", "torch", "clone"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.benchmark(max_time=MAX_SECONDS, min_rounds=3, warmup=False)
def test_norm(arena: Arena, mode: str, contestant: str, benchmark: BenchmarkFixture) -> None:
    row: Row = arena.row
    benchmark.group = f"{row.name}, {mode}"
    benchmark.extra_info["bytes"] = row.nbytes
    call = arena.calls(mode)[contestant]
    call()
    benchmark(call)


@pytest.mark.parametrize("mode", MODES)
def test_same_values_as_torch(arena: Arena, mode: str) -> None:
    """The timed calls compute the same values."""
    assert faults(arena.calls(mode), lambda: arena.exact(mode)) == []
