"""Study 4: which axes a norm reduces over, and what that means for small batches.

    python examples/studies/which_axes.py               # writes docs/studies/which_axes.*
    python examples/studies/which_axes.py --quick

Batch, layer, instance and group norm on one tensor, drawn from the Geometry that the kernels use; and the accuracy of a
small network with batch norm and with group norm, by the batch size it is trained with.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fastnorm
from examples.studies import common
from examples.studies.common import Claim, Measured, Report, Table
from fastnorm._C import Geometry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N, C, S = 4, 6, 5  # of the picture; S: height times width
GROUPS = 2
#: Instance norm is group norm with a group for each channel, layer norm of (C, H, W) group norm with one group.
GEOMETRIES = {
    "batch norm": Geometry("batch", N, C, S),
    "layer norm": Geometry("group", N, C, S, 1),
    "instance norm": Geometry("group", N, C, S, C),
    "group norm": Geometry("group", N, C, S, GROUPS),
}

SIZES, QUICK_SIZES = (2, 4, 8, 16, 32, 128), (4, 32)
CHANNELS = 16
LR = 0.1  # for a batch of 32, in proportion to the batch as in Wu & He


def sets(geometry: Geometry) -> Tensor:
    """The set of every element, (N, C, S): the elements of one number share mean and variance."""
    n, c, _ = torch.meshgrid(*(torch.arange(size) for size in (geometry.N, geometry.C, geometry.S)), indexing="ij")
    return c if geometry.kind == "batch" else n * geometry.G + c // geometry.D


def measured_sets(name: str) -> Tensor:
    """The same, found out: elements whose outputs change when one input changes are of its set."""
    torch.manual_seed(0)
    x = torch.randn(N, C, S)
    norms: dict[str, nn.Module] = {
        "batch norm": fastnorm.BatchNorm1d(C),
        "layer norm": fastnorm.LayerNorm((C, S)),
        "instance norm": fastnorm.InstanceNorm1d(C),
        "group norm": fastnorm.GroupNorm(GROUPS, C),
    }
    norm = norms[name]
    found = torch.full((N, C, S), -1)
    for number in range(GEOMETRIES[name].sets):
        first = (found < 0).nonzero()[0].tolist()
        changed = x.clone()
        changed[tuple(first)] += 1
        found[norm(changed) != norm(x)] = number
    return found


def same_partition(a: Tensor, b: Tensor) -> bool:
    """Whether the two number the same sets, in whatever order."""
    pairs = set(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    return len(pairs) == len(a.unique()) == len(b.unique())


def network(norm: str) -> nn.Module:
    """Three convolutions, a norm with ReLU behind each."""

    def make(channels: int) -> nn.Module:
        if norm == "batch norm":
            return fastnorm.BatchNorm2d(channels, activation="relu")
        return fastnorm.GroupNorm(channels // 4, channels, activation="relu")

    channels = [1, CHANNELS, CHANNELS, 2 * CHANNELS]
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise(channels)):
        layers += [nn.Conv2d(before, after, 3, stride=2 if i == 1 else 1, padding=1, bias=False), make(after)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))


def train(norm: str, size: int, epochs: int, seed: int, data: common.Digits) -> float:
    """Accuracy on the held-out digits after the same number of images, whatever the batch size."""
    torch.manual_seed(seed)
    model = network(norm)
    steps = epochs * len(data.train_x) // size
    optimizer = torch.optim.SGD(model.parameters(), lr=LR * size / 32, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR * size / 32, total_steps=steps)
    return common.train(model, data, optimizer, steps, size, seed, schedule=schedule).best


def measure(quick: bool) -> Measured:
    data = common.load()
    sizes, epochs, seeds = (QUICK_SIZES, 2, 1) if quick else (SIZES, 6, 3)
    runs: list[dict[str, Any]] = []
    for size in sizes:
        for norm in ("batch norm", "group norm"):
            reached = [train(norm, size, epochs, seed, data) for seed in range(seeds)]
            runs.append({"norm": norm, "batch": size, "accuracies": reached, "mean": sum(reached) / seeds})
    geometries = {
        name: {
            "text": str(geometry),
            "sets": geometry.sets,
            "set_size": geometry.set_size,
            "as_measured": same_partition(sets(geometry), measured_sets(name)),
        }
        for name, geometry in GEOMETRIES.items()
    }
    return {"geometries": geometries, "epochs": epochs, "seeds": seeds, "runs": runs}


def report(measured: Measured) -> Report:
    errors = {(run["norm"], run["batch"]): 1 - run["mean"] for run in measured["runs"]}
    sizes = sorted({run["batch"] for run in measured["runs"]})
    smallest, usual = sizes[0], 32
    loss = {norm: errors[norm, smallest] - errors[norm, usual] for norm in ("batch norm", "group norm")}
    geometries = measured["geometries"]

    def both(norm: str) -> str:
        return f"{errors[norm, smallest]:.1%} at {smallest}, {errors[norm, usual]:.1%} at {usual}"

    seeds = [run["accuracies"] for run in measured["runs"] if run["batch"] in (smallest, usual)]
    differ = [max(reached) - min(reached) for reached in seeds]
    spread = [errors["group norm", size] for size in sizes if size <= usual]
    claims = [
        Claim(
            "Batch norm shares statistics over the batch and the positions of a channel, layer norm over all of a "
            "sample, instance norm over a channel of a sample, group norm over some channels of a sample.",
            "; ".join(f"{name}: {g['sets']} sets of {g['set_size']}" for name, g in geometries.items())
            + f", of {N} samples of {C} channels of {S}. A change of one input changes outputs of its set alone",
            all(g["as_measured"] for g in geometries.values()),
        ),
        Claim(
            "Batch norm's error grows as the batch shrinks (Wu & He: 23.6% at 32, 34.7% at 2 on ImageNet).",
            f"batch norm: {both('batch norm')}; an image is {1 / common.HELD_OUT:.1%}, and the seeds differ by up to "
            f"{max(differ):.1%} there",
            loss["batch norm"] > 0.01,
        ),
        Claim(
            "Group norm's does not (24.1% at 32 and at 2).",
            f"group norm: {both('group norm')}, {min(spread):.1%} to {max(spread):.1%} up to {usual}",
            loss["group norm"] < 0.01,
        ),
        Claim(
            f"At a batch of {smallest} group norm is better than batch norm.",
            f"error {errors['group norm', smallest]:.1%} against {errors['batch norm', smallest]:.1%}",
            errors["group norm", smallest] < errors["batch norm", smallest],
        ),
        Claim(
            "At a batch of 32 batch norm is a little better.",
            f"error {errors['batch norm', usual]:.1%} against {errors['group norm', usual]:.1%}",
            errors["batch norm", usual] < errors["group norm", usual],
        ),
    ]
    rows = [
        (
            size,
            *(f"{1 - errors[norm, size]:.1%}" for norm in ("batch norm", "group norm")),
            *(
                ", ".join(f"{a:.1%}" for a in run["accuracies"])
                for norm in ("batch norm", "group norm")
                for run in measured["runs"]
                if (run["norm"], run["batch"]) == (norm, size)
            ),
        )
        for size in sizes
    ]
    return Report(
        "Which axes",
        "Which elements share a mean and a variance, as fastnorm's kernels have it; and what it means that those of "
        "batch norm reach over the batch: a network of three convolutions on handwritten digits, "
        f"{measured['epochs']} epochs, one cycle up to learning rate {LR:g} for a batch of 32 and in proportion for "
        "others, momentum 0.9.",
        [
            "Wu & He 2018, Group Normalization, https://arxiv.org/abs/1803.08494",
            "Ba et al. 2016, Layer Normalization, https://arxiv.org/abs/1607.06450",
            "Ulyanov et al. 2016, Instance Normalization, https://arxiv.org/abs/1607.08022",
        ],
        claims,
        [
            Table(
                f"Accuracy on held-out digits, mean of {measured['seeds']} seeds, and each of them",
                ("batch", "batch norm", "group norm", "batch norm, each", "group norm, each"),
                rows,
            ),
            Table("Geometry", ("norm", "as the kernels print it"), [(k, g["text"]) for k, g in geometries.items()]),
        ],
        "Above: one set in blue, the others in greys, of a tensor of samples (N), channels (C) and positions "
        f"(upwards). Below: error by batch size, every seed a dot. Batches of {sizes[-1]} are few steps, "
        f"{measured['epochs'] * (1797 - common.HELD_OUT) // sizes[-1]} in all, which suffice for neither norm.",
    )


def draw_cube(axes: Axes, title: str, geometry: Geometry) -> None:
    """A box for every element; the set of the corner in front in blue."""
    found = sets(geometry)
    shades = ("#f2f2f2", "#dcdcdc")
    blue = found == found[-1, 0, -1]
    # Samples to the right, channels to the back, positions upwards, as in Wu & He.
    colours = [[[("#3d85c6" if blue[n, c, s] else shades[int(found[n, c, s]) % 2]) for s in range(S)]
                for c in range(C)] for n in range(N)]  # fmt: skip
    axes.voxels(numpy.ones((N, C, S), bool), facecolors=numpy.array(colours), edgecolor="#8a8a8a", lw=0.3, shade=False)
    axes.view_init(elev=22, azim=-38)
    axes.set(xlabel="N", ylabel="C", zlabel="H x W", xticks=[], yticks=[], zticks=[], box_aspect=(N, C, S))
    axes.set_title(title, loc="center", y=0.93)


def draw(figure: Figure, measured: Measured) -> None:
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    for place, (name, geometry) in enumerate(GEOMETRIES.items()):
        draw_cube(above.add_subplot(1, 4, place + 1, projection="3d"), name, geometry)
    axes = below.subplots()
    for norm, colour in (("batch norm", "#d1495b"), ("group norm", "#0b3d6b")):
        runs = [run for run in measured["runs"] if run["norm"] == norm]
        sizes = [run["batch"] for run in runs]
        axes.plot(sizes, [100 * (1 - run["mean"]) for run in runs], "-", color=colour, label=norm)
        for run in runs:
            errors = [100 * (1 - a) for a in run["accuracies"]]
            axes.plot([run["batch"]] * len(errors), errors, "o", color=colour, alpha=0.5, ms=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel="batch size", ylabel="error in %", yscale="log", title="error on held-out digits")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)


if __name__ == "__main__":
    common.main(sys.modules[__name__], (11, 6))
