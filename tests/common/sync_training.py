"""Training of a small network with SyncBatchNorm on several ranks, and of the same in one process with torch.nn.
Imports no pytest: ranks import it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastnorm

BATCH = 8  # of all ranks together
STEPS = 3


class Net(nn.Module):
    """Convolutions, batch norms of two and one dimensions, and a block that may be checkpointed."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None), nn.ReLU())
        self.linear = nn.Linear(8, 6)
        self.last = nn.BatchNorm1d(6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.last(self.linear(x.mean((2, 3))))


def make_net(checkpointed: bool) -> Net:
    torch.manual_seed(1)
    return Net(checkpointed)


def batch(step: int) -> Tensor:
    return torch.randn(BATCH, 3, 7, 7, generator=torch.Generator().manual_seed(step))


def loss_of(y: Tensor) -> Tensor:
    return (y - torch.linspace(-1, 1, 6)).square().mean() + y.pow(3).mean()


def whole(t: Tensor) -> Tensor:
    return t.full_tensor().detach() if isinstance(t, DTensor) else t.detach()


def train(how: str) -> dict[str, Tensor]:
    """Parameters and buffers after some steps. how: "ddp", "accumulate" (two micro-batches a step, one reduction of the
    gradients), "fsdp", "checkpoint", "compiled". On a rank."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    net = make_net(how == "checkpoint")
    outer: nn.Module
    if how == "fsdp":
        fastnorm.convert_sync_batchnorm(net)
        outer = fully_shard(net, mesh=init_device_mesh("cpu", (ranks,)))
    else:
        outer = nn.parallel.DistributedDataParallel(net)
        fastnorm.convert_sync_batchnorm(net)  # after: see the docstring of SyncBatchNorm
    assert [type(m) for m in net.modules()].count(fastnorm.SyncBatchNorm) == 3
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.05)
    call: nn.Module = torch.compile(outer, backend="aot_eager") if how == "compiled" else outer  # type: ignore[assignment]
    for step in range(STEPS):
        micro_batches = batch(step).chunk(2) if how == "accumulate" else (batch(step),)
        optimizer.zero_grad()
        for i, micro_batch in enumerate(micro_batches):
            mine = micro_batch.chunk(ranks)[rank]
            if how == "accumulate" and i == 0:
                with outer.no_sync():  # type: ignore[operator]
                    loss_of(call(mine)).backward()
            else:
                loss_of(call(mine)).backward()
        optimizer.step()
    return {name: whole(value) for name, value in net.state_dict().items()}


def train_alone(how: str) -> dict[str, Tensor]:
    """The same on the whole batch with torch.nn's batch norms."""
    net = make_net(how == "checkpoint")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro_batch in batch(step).chunk(2) if how == "accumulate" else (batch(step),):
            loss_of(net(micro_batch)).backward()
        optimizer.step()
    return {name: value.detach() for name, value in net.state_dict().items()}


def wrap_directly() -> str:
    """What DistributedDataParallel says to a SyncBatchNorm on the CPU."""
    try:
        nn.parallel.DistributedDataParallel(nn.Sequential(fastnorm.SyncBatchNorm(3)))
    except ValueError as error:
        return str(error)
    return ""


def call_unless(rank: int, direction: str) -> None:
    """All ranks but `rank` call a layer forward, or all do and that one does not go backward."""
    norm = fastnorm.SyncBatchNorm(3)
    x = torch.randn(4, 3, requires_grad=True)
    if dist.get_rank() != rank or direction == "backward":
        y = norm(x)
        if dist.get_rank() != rank:
            y.sum().backward()


def evaluate() -> list[Tensor]:
    """In evaluation ranks may call as they please: rank 0 alone does."""
    norm = fastnorm.SyncBatchNorm(3, activation="relu")
    norm(torch.randn(4, 3, generator=torch.Generator().manual_seed(dist.get_rank())))
    if dist.get_rank() == 0:
        assert fastnorm.explain(torch.randn(4, 3), norm).startswith("fastnorm: ")
        assert fastnorm.explain(torch.randn(4, 5), norm).startswith("torch: ")
    norm.eval()
    return [norm(torch.ones(2, 3))] if dist.get_rank() == 0 else []


def bad_calls() -> list[str]:
    """What the layer says to input that it cannot take: on every rank alike, before anything is exchanged."""
    said = []
    for x, norm in (
        (torch.randn(4), fastnorm.SyncBatchNorm(3)),
        (torch.randn(4, 0), fastnorm.SyncBatchNorm(3)),
        (torch.randn(4, 5), fastnorm.SyncBatchNorm(3)),
        (torch.randn(4, 3).double(), fastnorm.SyncBatchNorm(3)),
        (torch.ones(4, 3, dtype=torch.int32), fastnorm.SyncBatchNorm(3)),
        (torch.randn(4, 3), fastnorm.SyncBatchNorm(3, eps=0.0)),
        (torch.randn(4, 3), fastnorm.SyncBatchNorm(3, process_group="all")),
    ):
        before = [b.clone() for b in norm.buffers()]
        try:
            norm(x)
            said.append("nothing")
        except (RuntimeError, TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
        assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True))
    return said
