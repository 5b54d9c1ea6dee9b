"""Study 4: which axes a norm reduces over, and what that means for small batches.

    python examples/studies/which_axes.py               # writes docs/studies/which_axes.*
    python examples/studies/which_axes.py --quick

Batch, layer, instance and group norm on one tensor, drawn from the Geometry that the kernels use; and the accuracy of a
small network with batch norm and with group norm, by the batch size it is trained with.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

NORMS = ("batch norm", "group norm")
SIZES, QUICK_SIZES = (2, 4, 8, 16, 32, 64, 128), (8, 32)
USUAL = 32  # what the others are compared with
EPOCHS, QUICK_EPOCHS = 18, 2  # for every size, as in Wu & He; 18 are as many as batches of 128 need
SEEDS = 5
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


def network(norm: str, seeds: int) -> nn.Module:
    """Three convolutions, a norm with ReLU behind each, and a linear layer; `seeds` of these side by side, as groups of
    channels of which none sees another: so they take the time of little more than one. x: (N, seeds, H, W), an image
    for each of them; logits: (N, seeds, 10)."""

    def make(channels: int) -> nn.Module:
        if norm == "batch norm":
            return fastnorm.BatchNorm2d(channels, activation="relu")
        return fastnorm.GroupNorm(channels // 4, channels, activation="relu")

    channels = [seeds * c for c in (1, CHANNELS, CHANNELS, 2 * CHANNELS)]
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise(channels)):
        stride = 2 if i == 1 else 1
        layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False, groups=seeds), make(after)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels[-1], seeds * 10, 1, groups=seeds)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Unflatten(1, (seeds, 10)))


def steps_of(size: int, epochs: int, data: common.Digits) -> int:
    return epochs * len(data.train_x) // size


def train(norm: str, size: int, epochs: int, seeds: int, data: common.Digits) -> list[float]:
    """Accuracies on the held-out digits, of each seed: of its weights and of the order of its images. All sizes see the
    same number of images."""
    torch.manual_seed(0)
    model = network(norm, seeds)
    steps, lr = steps_of(size, epochs, data), LR * size / USUAL
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    batches = [data.batches(size, seed) for seed in range(seeds)]
    for _ in range(steps):
        images, labels = zip(*map(next, batches), strict=True)
        logits = model(torch.cat(images, 1))
        # The sum of the losses of all seeds: each has the gradients that it would have by itself.
        loss = F.cross_entropy(logits.flatten(0, 1), torch.stack(labels, 1).flatten()) * seeds
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return accuracies(model, seeds, data)


@torch.no_grad()
def accuracies(model: nn.Module, seeds: int, data: common.Digits) -> list[float]:
    found = model.eval()(data.test_x.expand(-1, seeds, -1, -1)).argmax(2)
    return (found == data.test_y[:, None]).float().mean(0).tolist()  # type: ignore[no-any-return]


def measure(quick: bool) -> Measured:
    data = common.load()
    sizes, epochs = (QUICK_SIZES, QUICK_EPOCHS) if quick else (SIZES, EPOCHS)
    runs: list[dict[str, Any]] = []
    for size, norm in itertools.product(sizes, NORMS):
        reached = train(norm, size, epochs, SEEDS, data)
        mean, error = common.estimate(reached)
        steps = steps_of(size, epochs, data)
        runs.append({"norm": norm, "batch": size, "steps": steps, "accuracies": reached, "mean": mean, "error": error})
    geometries = {
        name: {
            "text": str(geometry),
            "sets": geometry.sets,
            "set_size": geometry.set_size,
            "as_measured": same_partition(sets(geometry), measured_sets(name)),
        }
        for name, geometry in GEOMETRIES.items()
    }
    return {"geometries": geometries, "epochs": epochs, "seeds": SEEDS, "runs": runs}


def difference(worse: dict[str, Any], better: dict[str, Any]) -> tuple[float, float]:
    """By how much the one run's error on held-out digits is above the other's, and the standard error of that."""
    return better["mean"] - worse["mean"], math.hypot(worse["error"], better["error"])


def is_beyond_noise(found: tuple[float, float]) -> bool:
    """By two standard errors, in the direction that is claimed."""
    return found[0] > 2 * found[1]


def in_words(found: tuple[float, float]) -> str:
    size = "beyond" if abs(found[0]) > 2 * found[1] else "within"
    return f"{found[0]:+.1%} with a standard error of {found[1]:.1%}, {size} two of these"


def report(measured: Measured) -> Report:
    runs = {(run["norm"], run["batch"]): run for run in measured["runs"]}
    sizes = sorted({run["batch"] for run in measured["runs"]})
    smallest, largest = sizes[0], sizes[-1]
    small, usual = ({norm: runs[norm, size] for norm in NORMS} for size in (smallest, USUAL))
    growth = {norm: difference(small[norm], usual[norm]) for norm in NORMS}
    better = {"group norm": difference(*(small[norm] for norm in NORMS))}
    better["batch norm"] = difference(usual["group norm"], usual["batch norm"])
    geometries = measured["geometries"]

    def error(run: dict[str, Any]) -> str:
        return f"{1 - run['mean']:.1%}"

    def both(norm: str) -> str:
        return f"{norm}: {error(small[norm])} at {smallest}, {error(usual[norm])} at {USUAL}; {in_words(growth[norm])}"

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
            f"{both('batch norm')}. An image is {1 / common.HELD_OUT:.1%}",
            is_beyond_noise(growth["batch norm"]),
        ),
        Claim(
            "Group norm's does not (24.1% at 32 and at 2).",
            both("group norm"),
            not is_beyond_noise(growth["group norm"]),
        ),
        Claim(
            f"At a batch of {smallest} group norm is better than batch norm.",
            f"error {error(small['group norm'])} against {error(small['batch norm'])}: "
            + in_words(better["group norm"]),
            is_beyond_noise(better["group norm"]),
        ),
        Claim(
            f"At a batch of {USUAL} batch norm is a little better.",
            f"error {error(usual['batch norm'])} against {error(usual['group norm'])}: "
            + in_words(better["batch norm"]),
            is_beyond_noise(better["batch norm"]),
        ),
    ]
    rows = [
        (
            size,
            runs[NORMS[0], size]["steps"],
            *(f"{runs[norm, size]['mean']:.1%} ± {runs[norm, size]['error']:.1%}" for norm in NORMS),
            *(", ".join(f"{a:.1%}" for a in runs[norm, size]["accuracies"]) for norm in NORMS),
        )
        for size in sizes
    ]
    fewest = runs[NORMS[0], largest]["steps"]
    return Report(
        "Which axes",
        "Which elements share a mean and a variance, as fastnorm's kernels have it; and what it means that those of "
        "batch norm reach over the batch: a network of three convolutions on handwritten digits. What is the same for "
        f"all batch sizes is what Wu & He hold: the number of images, {measured['epochs']} epochs, and the learning "
        f"rate of an image, one cycle up to {LR:g} for a batch of {USUAL} and in proportion for others; momentum 0.9. "
        "So large batches take fewer steps; the epochs are so many that those suffice (last line of the table).",
        [
            "Wu & He 2018, Group Normalization, https://arxiv.org/abs/1803.08494",
            "Ba et al. 2016, Layer Normalization, https://arxiv.org/abs/1607.06450",
            "Ulyanov et al. 2016, Instance Normalization, https://arxiv.org/abs/1607.08022",
        ],
        claims,
        [
            Table(
                f"Accuracy on held-out digits, mean of {measured['seeds']} seeds with its standard error, and each of "
                "them",
                ("batch", "steps", *NORMS, *(f"{norm}, each" for norm in NORMS)),
                rows,
            ),
            Table("Geometry", ("norm", "as the kernels print it"), [(k, g["text"]) for k, g in geometries.items()]),
        ],
        "Above: one set in blue, the others in greys, of a tensor of samples (N), channels (C) and positions "
        f"(upwards). Below: error by batch size, every seed a dot. Batches of {largest} take {fewest} steps.",
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
    axes.set(xlabel="batch size", ylabel="error in %", ylim=(0, None), title="error on held-out digits")
    axes.legend(frameon=False)


if __name__ == "__main__":
    common.main(sys.modules[__name__], (11, 6))
