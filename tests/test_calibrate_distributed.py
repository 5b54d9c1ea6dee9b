"""calibrate on several ranks: the statistics are those of all ranks' data, the same bits everywhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from fastnorm import calibrate
from tests.test_calibrate import assert_within_ulps, deep_net, exact_statistics, norms_of

RANKS = 3
#: Batches of each rank: uneven, and the first rank has none.
SIZES: tuple[tuple[int, ...], ...] = ((), (5, 2), (4, 4, 3))


def data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    total = sum(map(sum, SIZES))
    return torch.randn(total, 3, 8, 8, generator=generator) + torch.arange(total).view(-1, 1, 1, 1)


def rank_batches(rank: int) -> list[Tensor]:
    first = sum(map(sum, SIZES[:rank]))
    return list(data()[first : first + sum(SIZES[rank])].split(SIZES[rank])) if SIZES[rank] else []


def buffers(model: nn.Module) -> list[Tensor]:
    return [b.clone() for norm in norms_of(model) for b in (norm.running_mean, norm.running_var)]


def work(rank: int, store: str, results: str) -> None:
    """One rank."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for name in ("one_pass", "layer_by_layer"):
        model = nn.parallel.DistributedDataParallel(deep_net())
        calibrate(model, rank_batches(rank), layer_by_layer=name == "layer_by_layer", progress=rank == 1)
        found[name] = buffers(model.module)
        found[f"{name} count"] = int(norms_of(model)[0].num_batches_tracked)
    pair = dist.new_group([1, 2])
    if rank == 0:
        with pytest.raises(ValueError, match="process_group does not contain this process"):
            calibrate(deep_net(), rank_batches(rank), process_group=pair, progress=False)
    else:
        found["pair"] = buffers(calibrate(deep_net(), rank_batches(rank), process_group=pair, progress=False))
    # All ranks alike find that there is nothing.
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(deep_net(), [], progress=False)
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path / "store"), str(tmp_path)), RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    x = data()
    alone = deep_net()
    calibrate(alone, [part for rank in range(RANKS) for part in rank_batches(rank)], progress=False)
    deep = deep_net()
    calibrate(deep, [x], layer_by_layer=True, progress=False)
    for found in ranks:
        assert found["one_pass count"] == found["layer_by_layer count"] == 5
        mean, var = exact_statistics(deep_net()[0](x).detach())
        assert_within_ulps(found["one_pass"][0], mean, 8)
        assert_within_ulps(found["one_pass"][1], var, 8)
        for name, model in (("one_pass", alone), ("layer_by_layer", deep)):
            assert all(torch.equal(a, b) for a, b in zip(found[name], ranks[0][name], strict=True))
            torch.testing.assert_close(found[name], buffers(model), rtol=1e-5, atol=1e-5)
    for found in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found["pair"], found["one_pass"], strict=True))
