"""Norms under torch.distributed: DDP, FSDP2 and DTensor, on one process with gloo."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor

import fastnorm
from tests.common.numerics import assert_alike


@pytest.fixture(autouse=True, scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{Path(store)}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model(namespace: ModuleType) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), namespace.BatchNorm2d(8), nn.ReLU(), namespace.GroupNorm(2, 8), namespace.LayerNorm(6)
    )


def plain(t: Tensor) -> Tensor:
    return t.full_tensor().detach() if isinstance(t, DTensor) else t.detach()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_training(how: str) -> None:
    """Three steps of SGD: parameters and running statistics as with torch.nn."""
    results = []
    for namespace in (fastnorm, nn):
        inner = model(namespace)
        if how == "ddp":
            outer: nn.Module = nn.parallel.DistributedDataParallel(inner)
        else:
            outer = fully_shard(inner, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD(outer.parameters(), lr=0.1)
        for seed in range(3):
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            outer(x).square().mean().backward()
            optimizer.step()
        results.append({key: plain(value) for key, value in inner.state_dict().items()})
    assert_alike(*results)


@pytest.mark.fallback(r"DTensor")
def test_dtensor() -> None:
    """Sharded along the batch: torch's own operators serve it, with its placements."""
    mesh = init_device_mesh("cpu", (1,))
    results = []
    for namespace in (fastnorm, nn):
        module = distribute_module(namespace.LayerNorm(8), mesh)
        x = distribute_tensor(torch.linspace(0, 1, 32).view(4, 8), mesh, [Shard(0)]).requires_grad_()
        y = module(x)
        assert isinstance(y, DTensor) and y.placements == (Shard(0),)
        y.exp().sum().backward()
        results.append([plain(y), plain(x.grad), plain(module.weight.grad)])
    assert_alike(*results)
