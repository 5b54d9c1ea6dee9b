"""On a GPU: SyncBatchNorm's calls wait for nothing, whatever the batches of the ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.common.sync_calls import SyncCase, gather_results, leaf, make_sync, whole_batch
from tests.common.waiting import host_goes_on

pytestmark = pytest.mark.cuda

CASES = (
    SyncCase((4,), rest=(16, 9, 7), activation="relu", residual=True),
    SyncCase((4,), rest=(16, 9, 7), activation="silu", residual=True, channels_last=True),
    SyncCase((16,), rest=(64, 56, 56)),
    SyncCase((4,), rest=(16, 9, 7), momentum=None),
    SyncCase((0,), rest=(16, 9, 7), activation="relu", residual=True),  # torch.nn waits to learn of this one
)


@pytest.fixture
def rank_of_two() -> Iterator[None]:
    """A rank of two without the other: torch's fake group takes what it is given and answers at once, with numbers that
    mean nothing. One GPU will do."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def step(module: nn.Module, x: Tensor, residual: Tensor | None, grad: Tensor) -> None:
    y = module(x) if residual is None else module(x, residual)
    gather_results(module, x, residual, y, grad)


@pytest.mark.usefixtures("rank_of_two")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_host_waits_for_nothing(case: SyncCase) -> None:
    module, batch = make_sync(case).to("cuda"), whole_batch(case)
    x, residual, grad = leaf(batch.x.to("cuda")), batch.residual, batch.grad.to("cuda")
    assert x is not None
    residual = None if residual is None else leaf(residual.to("cuda"))
    step(module, x, residual, grad)
    with host_goes_on():
        step(module, x, residual, grad)
