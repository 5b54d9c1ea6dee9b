"""Train a small ResNet on scikit-learn's handwritten digits with several processes (gloo, on this machine).

    python examples/train_distributed.py             # 2 and 4 processes
    python examples/train_distributed.py --quick     # a few steps of each
    torchrun --nproc-per-node 2 examples/train_distributed.py --quick

The batch is the same whatever the number of processes: each takes its share. So with SyncBatchNorm the losses are those
of one process, up to rounding; with batch norms that each process takes of its own share they are not. Training
amplifies rounding, so for comparison one process trains once more with every weight nudged in its last bit. The second
table counts what a training step exchanges.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import make_console
from examples.train_digits import BATCH_SIZE, Data, accuracy, load_data, make_resnet, nudged

EPOCHS, QUICK_STEPS = 3, 3
LR = 0.02
WARM_UP = 2  # steps that are not timed


@dataclass
class Traffic:
    """The collectives of a step: calls, and bytes that this process hands over, by operator."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)


class CountCollectives(TorchDispatchMode):
    """Counts the collectives that are called inside. SyncBatchNorm's are functional ones; DistributedDataParallel's own
    reduction of the gradients is none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and isinstance(args[0], Tensor) and "wait" not in func.__name__:
            name = func.__name__.partition(".")[0]
            self.traffic.calls[name] += 1
            self.traffic.bytes[name] += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


@dataclass
class Result:
    """What a run gives, on its first process."""

    losses: list[float]
    accuracy: float
    step_ms: float
    traffic: Traffic
    channels: list[int]


def train(synchronize: bool, steps: int, nudge: bool = False) -> Result:
    """Train on this process's share of every batch. Without torch.distributed: on all of it."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    torch.manual_seed(0)
    model = make_resnet(fused=True)
    if nudge:
        model = nudged(model)
    outer: nn.Module = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    if synchronize:
        fastnorm.convert_sync_batchnorm(model)  # after DistributedDataParallel, which refuses SyncBatchNorm on the CPU
    optimizer = torch.optim.SGD(outer.parameters(), lr=LR, momentum=0.9)
    data = load_data("cpu")
    losses, seconds = [], []
    traffic = Traffic()
    for step in range(steps):
        x, y = batch_of(data, step)
        share = slice(rank * len(x) // ranks, (rank + 1) * len(x) // ranks)
        start = time.perf_counter()
        with CountCollectives() as counter:
            loss = F.cross_entropy(outer(x[share]), y[share])
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        traffic = counter.traffic
        losses.append(mean_over_ranks(loss.detach()))
    channels = [m.num_features for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    step_ms = statistics.median(seconds[WARM_UP:] or seconds) * 1e3
    return Result(losses, accuracy(model, data.test_x, data.test_y), step_ms, traffic, channels)


def batch_of(data: Data, step: int) -> tuple[Tensor, Tensor]:
    """Batch `step` of all processes together: whole batches only, so that the shares are equal."""
    whole = len(data.train_x) // BATCH_SIZE
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(step // whole))
    chosen = order[step % whole * BATCH_SIZE :][:BATCH_SIZE]
    return data.train_x[chosen], data.train_y[chosen]


def mean_over_ranks(t: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(t)
        t /= dist.get_world_size()
    return float(t)


# Processes.


def worker(rank: int, ranks: int, folder: str, steps: int) -> None:
    """A process of its own: joins the group, trains with and without synchronization; the first saves the results."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    results = [train(synchronize, steps) for synchronize in (True, False)]
    if rank == 0:
        torch.save(results, Path(folder) / "results")
    dist.destroy_process_group()


def run_processes(ranks: int, steps: int) -> list[Result]:
    """Synchronized, and each on its own."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (ranks, folder, steps), ranks)
        return torch.load(Path(folder) / "results", weights_only=False)  # type: ignore[no-any-return]


# Showing it.


def table_of(headings: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    return table


def print_results(show: Callable[[Any], None], alone: list[Result], runs: dict[int, list[Result]]) -> None:
    training = table_of(
        ("norms", "processes", "held-out\naccuracy", "last\nloss", "largest loss\ndifference", "ms/step")
    )
    rows = [("of the batch", 1, alone[0]), ("of the batch, nudged", 1, alone[1])]
    for ranks, results in runs.items():
        rows += [("synchronized", ranks, results[0]), ("of each share", ranks, results[1])]
    for name, ranks, result in rows:
        difference = max(abs(a - b) for a, b in zip(result.losses, alone[0].losses, strict=True))
        shown = "" if result is alone[0] else f"{difference:.1e}"
        training.add_row(
            name, str(ranks), f"{result.accuracy:.1%}", f"{result.losses[-1]:.4f}", shown, f"{result.step_ms:.1f}"
        )
    exchange = table_of(("collective", "processes", "calls\na step", "bytes sent\na step", "bytes\na layer", "formula"))
    for ranks, results in runs.items():
        traffic, channels = results[0].traffic, results[0].channels
        for name, formula in (("all_gather_into_tensor", "4 (3 C + 1)"), ("all_reduce", "4 (2 C)")):
            calls, sent = traffic.calls[name], traffic.bytes[name]
            exchange.add_row(name, str(ranks), str(calls), f"{sent:,}", f"{sent / len(channels):,.0f}", formula)
    show(training)
    layers = len(next(iter(runs.values()))[0].channels)
    total = sum(next(iter(runs.values()))[0].channels)
    show(f"\nWhat SyncBatchNorm exchanges, {layers} layers of {total:,} channels together, in float32:\n")
    show(exchange)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps instead of {EPOCHS} epochs")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="N", help="processes; default 2 4")
    args = parser.parse_args(arguments)
    steps = QUICK_STEPS if args.quick else EPOCHS * (len(load_data("cpu").train_x) // BATCH_SIZE)
    bad = [n for n in args.ranks if n < 2 or BATCH_SIZE % n]
    if bad:
        parser.error(f"--ranks is {bad[0]}, expected a divisor of the batch of {BATCH_SIZE}, 2 or more")

    console = make_console()
    torch.set_num_threads(1)
    alone = [train(False, steps, nudge) for nudge in (False, True)]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun: the processes are there
        dist.init_process_group("gloo")
        runs = {dist.get_world_size(): [train(True, steps), train(False, steps)]}
        first = dist.get_rank() == 0
        dist.destroy_process_group()
        if not first:
            return
    else:
        runs = {ranks: run_processes(ranks, steps) for ranks in args.ranks}
    console.print(f"{steps} steps of {BATCH_SIZE} digits, one thread a process, torch {torch.__version__}.\n")
    print_results(console.print, alone, runs)


if __name__ == "__main__":
    main()
