"""SyncBatchNorm over gloo processes against one big batch in torch.nn.BatchNorm: outputs, gradients, statistics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.common import ranks
from tests.common.sync_calls import SyncCase, assert_like_whole, run_rank


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
