"""The models of end_to_end.py under pytest-benchmark, on few small pictures: torch.nn beside each way to fastnorm. To
compare two commits as test_bench_norms.py says; FASTNORM_MODELS=resnet18,unet picks models of models.MODELS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.end_to_end import MODES, WAYS, Contestant, Outcome, Setup, compare, contestants
from benchmarks.models import why_absent
from benchmarks.timing import keep_memory

NAMES = os.environ.get("FASTNORM_MODELS", "resnet18,convnext").split(",")
SHAPE = (4, 3, 64, 64)


@pytest.fixture(scope="module", params=[(name, mode) for name in NAMES for mode in MODES], ids="-".join)
def row(request: pytest.FixtureRequest) -> Iterator[tuple[Setup, dict[str, Contestant]]]:
    name, mode = request.param
    reason = why_absent(name)
    if reason:
        pytest.skip(reason)
    keep_memory()
    setup = Setup(name, SHAPE, mode=mode)
    found, outcome = dict(contestants(setup, compiled=False)), Outcome(setup)
    compare(found, outcome)
    assert not outcome.faults
    yield setup, found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.benchmark(max_time=1.0, min_rounds=3, warmup=False)
def test_model(row: tuple[Setup, dict[str, Contestant]], way: str, benchmark: BenchmarkFixture) -> None:
    setup, found = row
    benchmark.group = setup.name
    benchmark.extra_info["images"] = setup.shape[0]
    found[way].step()
    benchmark(found[way].step)
