"""Train two small networks on scikit-learn's handwritten digits: with torch.nn's norms, and with fastnorm's.

    python examples/train_digits.py            # under three minutes on two cores; saves demo.png
    python examples/train_digits.py --quick    # under one

Each network is trained from the same weights on the same batches: as it is (torch.nn), after
`fastnorm.convert(model)` (one line), and with activation and residual add inside the norm (fused). For
comparison it is trained once more with torch.nn, every weight nudged in its last bit: training amplifies
rounding, and two runs that differ by no more than that drift apart as well.
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
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import fastnorm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench
from figures import draw_panels, plt, style
from machine import cpu_model, fastnorm_capability
from results import Result
from tables import make_console, print_results

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

BATCH_SIZE = 64
HELD_OUT = 360  # of 1797 images
MAX_LR = 0.05
EPOCHS, QUICK_EPOCHS = 12, 4
TABLE_S, QUICK_TABLE_S = 28.0, 10.0  # for the table of layers
IMAGE_SIZE = 16  # the digits are 8 x 8; enlarged, so that a layer has some work


# (a) A small ResNet. First as one writes it with torch.nn, then with fastnorm's fused modules.


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


def make_resnet(block: type[Bottleneck], fused: bool) -> nn.Module:
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


def make_groupnorm_net(block: type[ResBlock], fused: bool) -> nn.Module:
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
    """One way to run a network, and what its training showed."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)  # of every step
    epoch_seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    @property
    def seconds(self) -> float:
        """Of an epoch."""
        return statistics.median(self.epoch_seconds)

    def loss_difference(self, other: Variant) -> list[float]:
        """Of every step."""
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
    """A copy with every weight changed in its last bit: what rounding alone makes of a training."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + torch.finfo(weight.dtype).eps)
    return model


def make_variant(name: str, model: nn.Module, steps: int) -> Variant:
    optimizer = torch.optim.SGD(model.parameters(), lr=MAX_LR, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LR, total_steps=steps)
    return Variant(name, model, optimizer, schedule)


def make_variants(
    make: Callable[..., nn.Module], block: type, fused_block: type, device: str, steps: int
) -> list[Variant]:
    """torch.nn, converted and fused, with equal weights."""
    torch.manual_seed(0)
    plain = make(block, fused=False).to(device)
    converted = fastnorm.convert(copy.deepcopy(plain))  # the one line
    fused = make(fused_block, fused=True).to(device)
    fused.load_state_dict(plain.state_dict())  # the same names: checkpoints go both ways
    models = {"torch.nn": plain, "converted": converted, "fused": fused, "nudged": nudged(plain)}
    return [make_variant(name, model, steps) for name, model in models.items()]


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


def train(title: str, variants: list[Variant], data: Data, epochs: int) -> None:
    """Train all variants for `epochs`, with a progress bar."""
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"),
               TimeElapsedColumn(), TextColumn("{task.fields[status]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=epochs * len(variants), status="")
        for epoch in range(epochs):
            for variant in variants if epoch % 2 else reversed(variants):
                train_epoch(variant, data, epoch)
                progress.update(task, advance=1, status=f"[dim]{variant.name}: loss {variant.losses[-1]:.4f}")
    for variant in variants:
        variant.accuracy = accuracy(variant.model, data.test_x, data.test_y)


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


LOOKS: dict[str, dict[str, Any]] = {
    "torch.nn": {"color": "#b8b8b8", "lw": 5, "alpha": 0.7},
    "converted": {"color": "#e8964c", "lw": 2, "ls": "--"},
    "fused": {"color": "#1f4e8c", "lw": 1},
    "nudged": {"color": "#b8b8b8"},
}


def draw_training(figure: SubFigure, networks: dict[str, list[Variant]]) -> None:
    """Loss curves, below them their differences from torch.nn's, and the seconds per epoch."""
    grid = figure.add_gridspec(2, 3, height_ratios=(2, 1), width_ratios=(1, 1, 0.8))
    bars = figure.add_subplot(grid[:, 2], title="seconds per epoch")
    for place, (title, variants) in enumerate(networks.items()):
        curves = figure.add_subplot(grid[0, place], title=f"{title}: training loss", yscale="log")
        differences = figure.add_subplot(grid[1, place], sharex=curves, yscale="log", xlabel="step")
        differences.set_title("difference from torch.nn", size=9, weight="normal")
        for i, variant in enumerate(variants):
            reference, look = variants[0], LOOKS[variant.name]
            if variant is not reference:
                visible = [max(difference, 1e-8) for difference in variant.loss_difference(reference)]
                differences.plot(visible, label=variant.name, **look | {"lw": 1.2})
            if variant.name == "nudged":
                continue
            curves.plot(variant.losses, label=variant.name, **look)
            bar = bars.bar(place + (i - 1) * 0.27, variant.seconds, 0.25, color=look["color"])
            speed = "" if variant is reference else f"\n{reference.seconds / variant.seconds:.2f}x"
            bars.bar_label(bar, [f"{variant.seconds:.2f}{speed}"], size=8, padding=2)
        for axes in (curves, differences):
            axes.legend(frameon=False, fontsize=8)
        curves.tick_params(labelbottom=False)
        curves.yaxis.set_major_formatter("{x:g}")
        curves.yaxis.set_minor_formatter("")
        for axes in (curves, differences):
            axes.grid(alpha=0.25)
    bars.set_xticks(range(len(networks)), list(networks))
    bars.margins(y=0.12)


def save_picture(path: Path, networks: dict[str, list[Variant]], results: list[Result], where: str) -> None:
    """The training above, the layers of large models below."""
    style()
    figure = plt.figure(figsize=(13, 10), layout="constrained")
    figure.suptitle(where, x=0.01, ha="left", size=9, color="#444444")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1), hspace=0.03)
    draw_training(top, networks)
    draw_panels(bottom, results, ("forward", "step"))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer epochs, and a shorter table of layers")
    parser.add_argument("--epochs", type=int, help=f"default {EPOCHS}, quick {QUICK_EPOCHS}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU when there is one")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="for demo.png; default: here")
    args = parser.parse_args(arguments)

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()}, {torch.get_num_threads()} threads"
    where = f"fastnorm {fastnorm.__version__} ({fastnorm_capability()} kernels), torch {torch.__version__}, on {where}"
    console = make_console()
    console.print(f"[bold]{where}[/] [dim](device: {device})")

    data = load_data(device)
    epochs = args.epochs or (QUICK_EPOCHS if args.quick else EPOCHS)
    steps = epochs * data.steps_per_epoch
    networks = {
        "ResNet": make_variants(make_resnet, Bottleneck, FusedBottleneck, device, steps),
        "GroupNorm + SiLU": make_variants(make_groupnorm_net, ResBlock, FusedResBlock, device, steps),
    }
    console.print(f"Training on {len(data.train_x)} handwritten digits, from equal weights, on equal batches.\n")
    for title, variants in networks.items():
        train(title, variants, data, epochs)
    console.print()
    print_training(console, networks)

    console.print("\n[bold]The layers of large models[/], fastnorm against torch.nn:\n")
    bench.keep_memory()
    results = bench.measure_with_bar(list(bench.quick_table()), QUICK_TABLE_S if args.quick else TABLE_S, device)
    print_results(console, results)
    path = args.out / "demo.png"
    save_picture(path, networks, results, where)
    console.print(f"\nSaved [bold]{path}[/]")


if __name__ == "__main__":
    main()
