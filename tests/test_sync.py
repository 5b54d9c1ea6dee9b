"""SyncBatchNorm over gloo processes against one big batch in torch.nn.BatchNorm: outputs, gradients, statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.common import ranks, sync_odd
from tests.common.numerics import assert_alike
from tests.common.sync_calls import (
    SyncCase,
    assert_like_whole,
    join,
    penalty_of_whole,
    penalty_on_rank,
    run_in_group,
    run_rank,
    run_uneven_compiled,
    run_whole,
)


@pytest.fixture(autouse=True, scope="module")
def processes() -> Iterator[None]:
    yield
    ranks.close_all()


F64, BF16, F16 = torch.float64, torch.bfloat16, torch.float16
CASES = [
    SyncCase((4, 4)),
    SyncCase((4, 4), dtype=F64, activation="relu", residual=True),
    SyncCase((4, 4), dtype=F64, activation="silu"),
    SyncCase((3, 1), activation="relu"),
    SyncCase((5, 0), activation="relu", residual=True),
    SyncCase((0, 3), activation="silu", residual=True),
    SyncCase((1, 0), rest=(3, 2)),
    SyncCase((2, 3), rest=(7,)),
    SyncCase((1, 1), rest=(7,)),
    SyncCase((16, 9), rest=(70, 3, 3), activation="leaky_relu", residual=True),
    SyncCase((2, 2), rest=(8, 30, 30), channels_last=True, activation="relu", residual=True),
    SyncCase((2, 1), rest=(3, 4, 5, 6), activation="gelu"),
    SyncCase((4, 2), dtype=BF16, activation="relu", residual=True),
    SyncCase((4, 2), dtype=BF16, param_dtype=torch.float32, channels_last=True, activation="silu"),
    SyncCase((4, 2), dtype=F16, param_dtype=torch.float32),
    SyncCase((4, 2), affine=False),
    SyncCase((4, 2), track=False, activation="relu"),
    SyncCase((4, 2), momentum=None, steps=3),
    SyncCase((4, 0), momentum=0.3, steps=3),
    SyncCase((4, 4), offset=1e4),
]
FOUR = [
    SyncCase((4, 4, 4, 4), activation="relu", residual=True),
    SyncCase((2, 0, 5, 1), activation="silu", residual=True, channels_last=True),
    SyncCase((0, 0, 3, 0), dtype=F64),
]


@pytest.mark.parametrize("case", CASES + FOUR, ids=lambda case: case.id)
def test_like_one_big_batch(case: SyncCase) -> None:
    with ranks.ranks(len(case.sizes)) as world:
        assert_like_whole(world.call(run_rank, case), case)


# ---- groups ----

HALVES = ((0, 1), (2, 3))


@pytest.mark.parametrize("compiled", [False, True])
def test_groups(compiled: bool) -> None:
    """Each group is as one big batch of its own."""
    cases = (SyncCase((4, 1), activation="relu", residual=True), SyncCase((2, 3), activation="relu", residual=True))
    with ranks.ranks(4) as world:
        results = world.call(run_in_group, cases, HALVES, compiled)
    for case, members in zip(cases, HALVES, strict=True):
        assert_like_whole([results[rank] for rank in members], case)


def test_ranks_outside_of_the_group_and_alone_in_it() -> None:
    """They have an ordinary batch norm."""
    cases = (SyncCase((4, 4)), SyncCase((5,)), SyncCase((5,)))
    with ranks.ranks(4) as world:
        results = world.call(run_in_group, cases, ((0, 2), (1,)), False)
    assert_like_whole([results[0], results[2]], cases[0])
    assert_like_whole([results[1]], cases[1])
    assert_like_whole([results[3]], cases[2])


# ---- torch.compile ----


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "case",
    [
        SyncCase((4, 2), activation="relu", residual=True),
        SyncCase((4, 2), momentum=None, steps=2, activation="silu"),
        SyncCase((3, 0), activation="relu"),
    ],
    ids=lambda case: case.id,
)
def test_compiled(case: SyncCase, compiler: str) -> None:
    """fullgraph=True: no break at a collective."""
    with ranks.ranks(2) as world:
        assert_like_whole(world.call(run_rank, case, compiler), case)


def test_compiled_with_other_batch_sizes() -> None:
    """The second size makes batch sizes dynamic, as with torch.nn; the third compiles nothing."""
    sizes = ((4, 2), (3, 3), (2, 5))
    case = SyncCase(sizes[0], rest=(6, 7, 9), activation="relu")
    with ranks.ranks(2) as world:
        answers = world.call(run_uneven_compiled, case, sizes)
    assert [graphs for _, graphs in answers] == [2, 2]
    for step, now in enumerate(sizes):
        ours = join([results[step] for results, _ in answers])
        expected = run_whole(dataclasses.replace(case, sizes=now), first_step=step)
        for name in ("y", "dx", "dweight", "dbias"):
            assert_alike(ours[name], expected[name], what=name)


# ---- second derivatives ----


@pytest.mark.parametrize(
    "case",
    [
        SyncCase((3, 2), dtype=F64),
        SyncCase((3, 2), dtype=F64, activation="silu", residual=True),
        SyncCase((4, 0), dtype=F64, activation="relu", residual=True),
        SyncCase((4, 0), dtype=F64, activation="relu", residual=True, affine=False),
        SyncCase((2, 0, 3, 1), rest=(3, 4), dtype=F64, activation="leaky_relu", residual=True),
        SyncCase((3, 2), activation="silu"),
    ],
    ids=lambda case: case.id,
)
def test_gradient_penalty(case: SyncCase) -> None:
    """A loss of gradients, whose own gradients go through the statistics of all ranks twice."""
    with ranks.ranks(len(case.sizes)) as world:
        results = world.call(penalty_on_rank, case)
    assert_alike(join(results), penalty_of_whole(case))


# ---- out of the ordinary ----


@pytest.mark.parametrize("use", sync_odd.USES, ids=lambda use: use.__name__)
def test_odd_use(use: Callable[[], None]) -> None:
    with ranks.ranks(sync_odd.RANKS) as world:
        world.call(use)
