"""The planner: what it promises for any geometry, and its choices for the benchmark shapes, reviewed when they change.

`python -m tests.test_plan` writes plans.txt anew.
"""

from __future__ import annotations

import random
import re
from math import prod
from pathlib import Path

import pytest

from fastnorm import _C
from tests.common.cases import BENCH, TINY, Layer

GOLDEN = Path(__file__).with_name("plans.txt")
BATCH, GROUP, LAYER = "batch", "group", "layer"
MIB = 1 << 20


def table() -> str:
    """Plans of the benchmark shapes on two threads with 1 MiB of L2 each: forward float32, backward bfloat16."""
    lines = []
    for layer in (TINY, *BENCH):
        for layout in layer.layouts:
            geometry = geometry_of(layer)
            last = layout == "channels_last"
            forward = _C.plan(*geometry, last, "float32", 1, MIB, 32 * MIB, 2).split(" | ")
            backward = _C.plan(*geometry, last, "bfloat16", 2, MIB, 32 * MIB, 2).split(" | ")
            lines += [forward[0], f"  float32 forward    {forward[1]}", f"  bfloat16 backward  {backward[1]}"]
    return "\n".join(lines) + "\n"


def geometry_of(layer: Layer) -> tuple[str, int, int, int, int]:
    """kind, N, C, S, groups"""
    n, c, *space = layer.shape
    if layer.norm == "LayerNorm":
        return LAYER, n, c, 1, 1
    return BATCH if layer.norm.startswith("Batch") else GROUP, n, c, prod(space), layer.groups


def test_benchmark_shapes() -> None:
    assert table() == GOLDEN.read_text(), "plans have changed: review, then `python -m tests.test_plan`"


def random_geometry(r: random.Random) -> tuple[str, int, int, int, int]:
    kind = r.choice((BATCH, GROUP, LAYER))
    n, s, groups, per_group = (int(2 ** r.uniform(0, bits)) for bits in (10, 16, 7, 7))
    if kind == LAYER:
        return kind, n * s, groups * per_group, 1, 1
    return kind, n, groups * per_group, s, groups if kind == GROUP else 0


@pytest.mark.parametrize("seed", range(8))
def test_promises(seed: int) -> None:
    """A single thread splits nothing; the order of sums depends on the geometry alone."""
    r = random.Random(seed)
    for _ in range(500):
        kind, n, c, s, groups = geometry = random_geometry(r)
        last = kind != LAYER and r.random() < 0.5
        dtype = r.choice(("float32", "float64", "bfloat16", "float16"))
        sums = set()
        for threads, l2_bytes, streams in ((1, MIB, 1), (2, MIB // 4, 1), (7, 2 * MIB, 2), (64, MIB, 2)):
            plan = _C.plan(*geometry, last, dtype, streams, l2_bytes, 32 * MIB, threads)
            sets, size = map(int, re.search(r"(\d+) sets of (\d+) \|", plan).groups())
            assert sets == {BATCH: c, GROUP: n * groups, LAYER: n}[kind] and sets * size == n * c * s, plan
            assert not (threads == 1 and "rows, split" in plan), plan
            if "columns" not in plan:
                assert int(re.search(r"(\d+) sets per task", plan)[1]) >= 1, plan
                continue
            chunk = int(re.search(r"chunks of (\d+) positions", plan)[1])
            assert chunk >= 1 and not (threads == 1 and "split" in plan), plan
            sums.add(chunk)
        assert len(sums) <= 1


@pytest.mark.parametrize("seed", range(8))
def test_two_threads_have_work(seed: int) -> None:
    """Above two chunks no thread is idle, whatever the number of sets."""
    r = random.Random(seed)
    for _ in range(500):
        kind, n, c, s, groups = geometry = random_geometry(r)
        sets = {BATCH: c, GROUP: n * groups, LAYER: n}[kind]
        if n * c * s < 2 * 65536 or (kind == BATCH and n * s < 32):
            continue
        last = kind != LAYER and r.random() < 0.5
        plan = _C.plan(*geometry, last, "float32", 1, MIB, 32 * MIB, 2)
        outer = 1 if kind == BATCH else n
        per_task = re.search(r"(\d+) sets per task", plan)
        tasks = -(-sets // int(per_task[1])) if per_task else outer
        assert "split" in plan or tasks >= 2, plan


def test_all_tensors_count_for_streaming() -> None:
    geometry = GROUP, 8, 64, 8192, 8  # 16 MiB of float32, and a cache of which three quarters are 48
    plans = {
        (inputs, outputs): _C.plan(*geometry, False, "float32", inputs, MIB, 64 * MIB, 2, outputs=outputs)
        for inputs in (1, 2)
        for outputs in (1, 2, 3)
    }
    assert {which for which, plan in plans.items() if "streaming" in plan} == {(1, 3), (2, 2), (2, 3)}


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"int8.*float32"):
        _C.plan(BATCH, 2, 8, 4, 0, False, "int8", 1, MIB, 32 * MIB, 2)


if __name__ == "__main__":
    GOLDEN.write_text(table())
