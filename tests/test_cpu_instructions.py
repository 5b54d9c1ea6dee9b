"""The table of instructions that the CPU kernels execute: that it is whole, and a part of it counted anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import count_cpu_instructions as counting
from benchmarks.instructions import compare, number

ROWS = counting.load()["rows"]
# `make count-cpu-instructions` counts them all; these take seconds.
COUNTED = [
    job
    for job in counting.jobs()
    if job.walk.name in ("layer of 96", "runs, batch") and (job.direction, job.dtype) == ("forward", "bfloat16")
]


@pytest.fixture(scope="module")
def driver() -> Path:
    try:
        return counting.build()
    except counting.NotCounted as reason:
        pytest.skip(str(reason))


def count(driver: Path, job: counting.Job) -> float:
    try:
        return counting.count(driver, job)
    except counting.NotCounted as reason:
        pytest.skip(str(reason))


def test_the_saved_table_is_whole() -> None:
    assert isinstance(ROWS, list)
    assert [counting.key_of(row) for row in ROWS] == [counting.key_of(job.row(0)) for job in counting.jobs()]
    assert all(number(row, "instructions") > 1 for row in ROWS)


@pytest.mark.parametrize("job", COUNTED, ids=lambda job: job.name)
def test_no_loop_has_changed(job: counting.Job, driver: Path) -> None:
    if reason := counting.why_not(counting.load()):
        pytest.skip(reason)
    saved = [row for row in ROWS if counting.key_of(row) == counting.key_of(job.row(0))]
    if saved[0].get("stale"):
        pytest.skip("the kernels have changed since, and nobody has counted on such a processor")
    found = compare(saved, [job.row(count(driver, job))], counting.key_of)
    assert not found.rises, "if it has to rise: make count-cpu-instructions ARGS=--update"
    assert not found.falls, "save what has fallen: make count-cpu-instructions ARGS=--update"


def test_a_count_is_the_same_every_time(driver: Path) -> None:
    assert count(driver, COUNTED[0]) == count(driver, COUNTED[0])


def test_a_count_is_of_the_loops(driver: Path) -> None:
    """An activation adds the instructions of its polynomials; a load of x and a store of y are the least of all."""
    by_epilogue = {job.epilogue: count(driver, job) for job in COUNTED if job.walk.name == "layer of 96"}
    assert by_epilogue["+gelu"] > by_epilogue["plain"] + 20 > 24


def test_counts_are_compared_with_the_same_compiler_alone() -> None:
    assert counting.major_of("g++ (Debian 12.2.0-14+deb12u1) 12.2.0") == "g++ 12"
    assert counting.major_of("g++ (GCC) 9.4.1 20200101") == "g++ 9"
    assert counting.why_not({"compiler": counting.compiler()}) is None
    assert str(counting.why_not({"compiler": "g++ (GCC) 1.2.3"})).startswith("the table is of g++ 1")


def test_what_could_not_be_counted_is_stale() -> None:
    """Until it is counted; rows that were not asked for stay as they are."""
    first, second, third = (job for job, _ in zip(counting.jobs(), range(3), strict=False))
    saved = [job.row(100.0) for job in (first, second, third)]
    rows = counting.updated(saved, [first.row(90.0)], [first, second])
    assert rows == [first.row(90.0), {**second.row(100.0), "stale": True}, third.row(100.0)]
    assert counting.updated(rows, [second.row(80.0)], [second]) == [first.row(90.0), second.row(80.0), third.row(100.0)]


def test_a_rise_fails_and_what_is_not_saved_rises() -> None:
    (row,) = (job.row(100.0) for job in COUNTED[:1])
    assert compare([row], [row | {"instructions": 102.0}], counting.key_of).rises == []
    assert len(compare([row], [row | {"instructions": 104.0}], counting.key_of).rises) == 1
    assert len(compare([], [row], counting.key_of).rises) == 1
    assert len(compare([row], [row | {"instructions": 90.0}], counting.key_of).falls) == 1
