"""Train two small networks on scikit-learn's handwritten digits: with torch.nn's norms, and with fastnorm's.

    python examples/train_digits.py            # under three minutes on two cores; saves demo.png
    python examples/train_digits.py --quick    # under one

Each network is trained from the same weights on the same batches: as it is (torch.nn), after
`fastnorm.convert(model)` (one line), and with activation and residual add inside the norm (fused). For
comparison it is trained once more with torch.nn, every weight nudged in its last bit: training amplifies
rounding, so two runs that differ in nothing else drift apart as well.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import fastnorm
from fastnorm import _C
from fastnorm.__main__ import cpu_model

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench
from benchmarks.tables import make_console, print_results
from examples.demo_figure import save_picture

BATCH_SIZE = 64
HELD_OUT = 360  # of 1797 images
MAX_LR = 0.05
EPOCHS, QUICK_EPOCHS = 12, 4
NETWORK_S, QUICK_NETWORK_S = 50.0, 12.0  # at most, about, to train one network: a slow machine has fewer epochs
TABLE_S, QUICK_TABLE_S = 28.0, 10.0  # for the table of layers
IMAGE_SIZE = 16  # the digits are 8 x 8; enlarged, so that a layer has some work


# (a) A small ResNet: written with torch.nn, then with fastnorm's fused modules.


class Bottleneck(nn.Module):
    """The block of ResNet-50: BN+ReLU, BN+ReLU, BN+add+ReLU."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels // 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels // 4)
        self.conv2 = nn.Conv2d(out_channels // 4, out_channels // 4, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels // 4)
        self.conv3 = nn.Conv2d(out_channels // 4, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class FusedBottleneck(Bottleneck):
    """The same block with the same parameters. ReLU and add are part of the norm: they cost no pass over memory."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__(channels, out_channels, stride)
        self.bn1 = fastnorm.BatchNorm2d(out_channels // 4, activation="relu")
        self.bn2 = fastnorm.BatchNorm2d(out_channels // 4, activation="relu")
        self.bn3 = fastnorm.BatchNorm2d(out_channels, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.bn3(self.conv3(out), self.shortcut(x))


def make_resnet(fused: bool) -> nn.Module:
    block = FusedBottleneck if fused else Bottleneck
    stem = [fastnorm.BatchNorm2d(32, activation="relu")] if fused else [nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
    blocks = [block(32, 64, 1), block(64, 64, 1), block(64, 128, 2), block(128, 128, 1)]
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), *stem),
        *blocks,
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
    )


# (b) A small net of GroupNorm + SiLU, the residual blocks of diffusion UNets.


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(out)))


class FusedResBlock(ResBlock):
    """The same, with SiLU inside the norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.norm1 = fastnorm.GroupNorm(8, channels, activation="silu")
        self.norm2 = fastnorm.GroupNorm(8, channels, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x))))


def make_groupnorm_net(fused: bool) -> nn.Module:
    block = FusedResBlock if fused else ResBlock
    last = [fastnorm.GroupNorm(8, 48, activation="silu")] if fused else [nn.GroupNorm(8, 48), nn.SiLU()]
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1),
        block(24),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        block(48),
        nn.Sequential(*last),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)),
    )


# Training: the variants of a network take turns, an epoch each, so that a busy machine slows all of them alike.


@dataclass
class Variant:
    """One way to run a network, and the record of its training."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)  # of every step
    epoch_seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    @property
    def seconds(self) -> float:
        """Median seconds of an epoch."""
        return statistics.median(self.epoch_seconds)

    def loss_difference(self, other: Variant) -> list[float]:
        """The difference of losses at every step."""
        return [abs(a - b) for a, b in zip(self.losses, other.losses, strict=True)]


@dataclass
class Data:
    """Digits as (N, 1, 16, 16) float32 images and (N,) labels."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train_x) // BATCH_SIZE)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch: every training image once, in an order that the seed decides."""
        order = torch.randperm(len(self.train_x), generator=torch.Generator().manual_seed(seed))
        for chosen in order.to(self.train_x.device).split(BATCH_SIZE):
            yield self.train_x[chosen], self.train_y[chosen]


def load_data(device: str) -> Data:
    """scikit-learn's digits (they ship inside its wheel), enlarged and scaled to mean 0, deviation 1."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    x = F.interpolate(x, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    x = ((x - x.mean()) / x.std()).to(device)
    y = torch.tensor(labels).to(device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(device)
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return Data(x[train], y[train], x[test], y[test])


def nudged(model: nn.Module) -> nn.Module:
    """A copy with every weight changed in its last bit: it shows the effect of rounding alone."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + torch.finfo(weight.dtype).eps)
    return model


def make_models(make: Callable[[bool], nn.Module], device: str) -> dict[str, nn.Module]:
    """The network in each of its variants, with equal weights."""
    torch.manual_seed(0)
    plain = make(False).to(device)
    converted = fastnorm.convert(copy.deepcopy(plain))  # the one line
    fused = make(True).to(device)
    fused.load_state_dict(plain.state_dict())  # the same names: checkpoints go both ways
    return {"torch.nn": plain, "converted": converted, "fused": fused, "nudged": nudged(plain)}


def make_variant(name: str, model: nn.Module, steps: int) -> Variant:
    """A model with its optimizer and a learning rate that rises and falls over `steps`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=MAX_LR, momentum=0.9, nesterov=True, weight_decay=1e-4)
    return Variant(name, model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LR, total_steps=steps))


def train_epoch(variant: Variant, data: Data, epoch: int) -> None:
    """One pass over the training images; notes the loss of every step and the time of the epoch."""
    variant.model.train()
    start = time.perf_counter()
    losses = []
    for x, y in data.batches(seed=epoch):
        loss = F.cross_entropy(variant.model(x), y)
        variant.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        variant.optimizer.step()
        variant.schedule.step()
        losses.append(loss.detach())
    variant.losses += torch.stack(losses).tolist()  # waits for the device
    variant.epoch_seconds.append(time.perf_counter() - start)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    return float((model(x).argmax(1) == y).float().mean())


def epochs_within(seconds: float, models: dict[str, nn.Module], data: Data, most: int) -> int:
    """The number of epochs of all models that fit into `seconds`, 2 to `most`, by one epoch of a copy of the first."""
    trial = make_variant("trial", copy.deepcopy(models["torch.nn"]), data.steps_per_epoch)
    train_epoch(trial, data, epoch=0)
    return max(2, min(most, int(seconds / trial.seconds / len(models))))


def train(title: str, models: dict[str, nn.Module], data: Data, epochs: int) -> list[Variant]:
    """Train all models for `epochs`, with a progress bar."""
    variants = [make_variant(name, model, epochs * data.steps_per_epoch) for name, model in models.items()]
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    status = (TimeElapsedColumn(), TextColumn("[dim]{task.fields[status]}"))
    # No refreshing in the background: its thread would take time from the timed calls.
    with Progress(*columns, *status, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task(title, total=epochs * len(variants), status="")
        for epoch in range(epochs):
            for variant in variants if epoch % 2 else reversed(variants):
                train_epoch(variant, data, epoch)
                text = f"{variant.name}: loss {variant.losses[-1]:.4f}"
                progress.update(task, advance=1, status=text, refresh=True)
    for variant in variants:
        variant.accuracy = accuracy(variant.model, data.test_x, data.test_y)
    return variants


# Showing it.


def print_training(console: Console, networks: dict[str, list[Variant]]) -> None:
    """Accuracy, agreement of the loss curves and speed, side by side."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("\nnetwork")
    table.add_column("\nnorms")
    for heading in (
        "held-out\naccuracy",
        "last\nloss",
        "largest loss\ndifference",
        "seconds\nper epoch",
        "\nspeed",
    ):
        table.add_column(heading, justify="right")
    for title, variants in networks.items():
        reference = variants[0]
        for variant in variants:
            is_first = variant is reference
            speed = reference.seconds / variant.seconds
            is_timed = variant.name != "nudged"
            table.add_row(
                f"[cyan]{title}" if is_first else "",
                variant.name,
                f"{variant.accuracy:.1%}",
                f"{variant.losses[-1]:.4f}",
                "" if is_first else f"{max(variant.loss_difference(reference)):.1e}",
                f"{variant.seconds:.3f}" if is_timed else "",
                "" if is_first or not is_timed else f"[{'bold green' if speed > 1 else 'yellow'}]{speed:.2f}x",
            )
    console.print(table)
    console.print("nudged: torch.nn with every weight changed in its last bit, for comparison", style="dim")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer epochs, and a shorter table of layers")
    parser.add_argument("--epochs", type=int, help=f"default {EPOCHS}, quick {QUICK_EPOCHS}; fewer when slow")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU when there is one")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="for demo.png; default: here")
    args = parser.parse_args(arguments)

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cpu = f"{cpu_model()}, {torch.get_num_threads()} threads, {_C.cpu_capability()}"
    machine = torch.cuda.get_device_name() if device == "cuda" else cpu
    where = f"fastnorm {fastnorm.__version__}, torch {torch.__version__}, device {device}: {machine}"
    console = make_console()
    console.print(where, style="bold")
    bench.warn_when_busy(console, device)

    data = load_data(device)
    console.print(f"{len(data.train_x)} handwritten digits; all start from the same weights and see the same batches.")
    networks = {}
    for title, make in {"ResNet": make_resnet, "GroupNorm + SiLU": make_groupnorm_net}.items():
        models = make_models(make, device)
        console.print(f"{title}: {str(fastnorm.report(models['fused'])).splitlines()[-1]}")
        most, seconds = (QUICK_EPOCHS, QUICK_NETWORK_S) if args.quick else (EPOCHS, NETWORK_S)
        epochs = args.epochs or epochs_within(seconds, models, data, most)
        networks[title] = train(title, models, data, epochs)
    console.print()
    print_training(console, networks)

    console.print("\n[bold]The layers of large models[/], fastnorm against torch.nn:\n")
    bench.keep_memory()
    results = list(bench.measure_with_bar([*bench.quick_table()], QUICK_TABLE_S if args.quick else TABLE_S, device))
    print_results(console, results)
    path = args.out / "demo.png"
    save_picture(path, networks, results, where)
    console.print(f"\nSaved [bold]{path}[/]")


if __name__ == "__main__":
    main()
