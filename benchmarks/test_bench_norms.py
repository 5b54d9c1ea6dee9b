"""The rows of bench.py under pytest-benchmark, to compare two commits: `pytest benchmarks --benchmark-autosave`, then
`--benchmark-compare`. The quick rows by default; FASTNORM_BENCH=<regex> picks rows of the full table ('.' for all).
"""

from __future__ import annotations

import os

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.contestants import MODES, Arena, Row, quick_table, table
from benchmarks.timing import keep_memory

PATTERN = os.environ.get("FASTNORM_BENCH")
ROWS = list(table(PATTERN)) if PATTERN else list(quick_table())
WRONG_EPSILONS = 64
MAX_SECONDS = 1.0 if PATTERN else 0.1  # of timing, for one contestant


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


def test_same_values_as_torch(arena: Arena) -> None:
    """The timed calls compute the same values."""
    assert arena.disagreement() <= WRONG_EPSILONS
