"""SyncBatchNorm where users meet it: DistributedDataParallel, FSDP2, accumulation, checkpointing, time-outs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.common import ranks
from tests.common.numerics import assert_alike
from tests.common.sync_training import bad_calls, call_unless, evaluate, train, train_alone, wrap_directly


@pytest.fixture(autouse=True, scope="module")
def processes() -> Iterator[None]:
    yield
    ranks.close_all()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("how", ["ddp", "accumulate", "fsdp", "checkpoint", "compiled"])
def test_training(how: str, size: int) -> None:
    """Parameters and running statistics after three steps as those of one process with the whole batch."""
    with ranks.ranks(size) as world:
        results = world.call(train, how)
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results), name
    assert_alike(results[0], train_alone(how))


def test_ddp_refuses_on_the_cpu() -> None:
    """torch's own rule. Should it go, the docstring of SyncBatchNorm says too much."""
    with ranks.ranks(2) as world:
        assert world.call(wrap_directly) == ["SyncBatchNorm layers only work with GPU modules"] * 2


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_rank_that_never_calls(direction: str) -> None:
    """The others get torch.distributed's own time-out."""
    world = ranks.World(2, timeout_s=3)
    try:
        _, failures = world.try_call(call_unless, 1, direction)
    finally:
        world.close()
    assert list(failures) == [0] and "Timed out waiting 3000ms" in failures[0]


def test_evaluation_and_explain_exchange_nothing() -> None:
    with ranks.ranks(2) as world:
        (y,), none = world.call(evaluate)
    assert y.shape == (2, 3) and none == []


def test_bad_input_is_refused_on_every_rank() -> None:
    with ranks.ranks(2) as world:
        one, other = world.call(bad_calls)
    assert one == other
    expected = (
        "ValueError: expected at least 2D input (got 1D input)",
        "ValueError: SyncBatchNorm number of input channels should be non-zero",
        "RuntimeError: fastnorm.SyncBatchNorm: weight has shape (3,), expected (5,)",
        "RuntimeError: fastnorm.SyncBatchNorm: weight has dtype torch.float32",
        "RuntimeError: fastnorm.SyncBatchNorm: x has dtype torch.int32",
        "RuntimeError: fastnorm.SyncBatchNorm: eps is 0.0",
        "TypeError: process_group is a str, expected a torch.distributed.ProcessGroup or None",
    )
    for text, begin in zip(one, expected, strict=True):
        assert text.startswith(begin)


# ---- examples/train_distributed.py ----

ROOT = Path(__file__).resolve().parents[1]


def run_example(*command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("launcher", ["itself", "torchrun"])
def test_example(launcher: str) -> None:
    """Synchronized, a step's loss is that of one process; the collectives are as many and as large as documented."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    text = run_example(*(torchrun if launcher == "torchrun" else ()), "examples/train_distributed.py", "--quick")
    sizes = {"2"} if launcher == "torchrun" else {"2", "4"}
    differences = {
        (name, ranks): float(difference)
        for name, ranks, difference in re.findall(r"(synchronized|of each share) +(\d) .*?(\d\.\de[+-]\d\d)", text)
    }
    assert {size for _, size in differences} == sizes
    for size in sizes:
        assert differences["synchronized", size] < 0.2 * differences["of each share", size]
        assert re.search(rf"all_gather_into_tensor +{size} +13 +7,348 ", text)
        assert re.search(rf"all_reduce +{size} +13 +4,864 ", text)
