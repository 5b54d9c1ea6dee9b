"""Study 5: statistics for inference: the running average, and the exact ones of the population.

    python examples/studies/inference.py                # writes docs/studies/inference.*
    python examples/studies/inference.py --quick

A small network with batch norm on handwritten digits. In evaluation its norms take running averages of the statistics
of the batches it was trained with; `fastnorm.calibrate` puts the exact statistics of the training data in their place,
or those of data from elsewhere.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fastnorm
from examples.studies import common
from examples.studies.common import Claim, Measured, Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES, QUICK_SIZES = (2, 4, 8, 32, 128), (4, 32)
CHANNELS = 16
#: How an image becomes another: darker paper and less contrast; no knowledge of the label is in it.
CONTRAST, BRIGHTNESS = 0.4, 1.0
WAYS = ("running average", "update_bn", "calibrate", "calibrate, layer by layer")
CALIBRATION_BATCH = 64


def network() -> nn.Module:
    channels = (1, CHANNELS, CHANNELS, 2 * CHANNELS)
    layers: list[nn.Module] = []
    for i in range(3):
        conv = nn.Conv2d(channels[i], channels[i + 1], 3, stride=2 if i == 1 else 1, padding=1, bias=False)
        layers += [conv, fastnorm.BatchNorm2d(channels[i + 1], activation="relu")]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))


def shifted(x: Tensor) -> Tensor:
    return CONTRAST * x + BRIGHTNESS


def calibrated(model: nn.Module, way: str, x: Tensor) -> nn.Module:
    """A copy with statistics of x, by each of WAYS; x in batches as it comes, the last of another size."""
    model = copy.deepcopy(model)
    batches = [part for part in x.split(CALIBRATION_BATCH) if len(part) > 1]
    if way == "update_bn":
        update_bn(batches, model)
    elif way != "running average":
        fastnorm.calibrate(model, batches, layer_by_layer="layer" in way, progress=False)
    return model


def variance_error(model: nn.Module, reference: nn.Module) -> float:
    """The mean relative difference of the running variances of all norms from the reference's."""
    errors = [
        ((ours.running_var - exact.running_var) / exact.running_var).abs()
        for ours, exact in zip(norms(model), norms(reference), strict=True)
    ]
    return float(torch.cat(errors).mean())


def norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, fastnorm.BatchNorm2d)]


def evaluate(model: nn.Module, population: Tensor, x: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
    """By each of WAYS with statistics of `population`: accuracy on x, and the error of the variances against all of
    `population` in one batch, layer by layer."""
    exact = copy.deepcopy(model)
    fastnorm.calibrate(exact, [population], layer_by_layer=True, progress=False)
    results = {}
    for way in WAYS:
        other = calibrated(model, way, population)
        results[way] = {"accuracy": common.accuracy(other, x, y), "error": variance_error(other, exact)}
    return results


def train(size: int, epochs: int, seed: int, data: common.Digits) -> nn.Module:
    torch.manual_seed(seed)
    model = network()
    steps = epochs * len(data.train_x) // size
    lr = 0.1 * size / 32
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    common.train(model, data, optimizer, steps, size, seed)
    return model


def averaged(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {way: {key: sum(run[way][key] for run in runs) / len(runs) for key in runs[0][way]} for way in runs[0]}


def measure(quick: bool) -> Measured:
    """Small batches: the same number of images in batches of each size, at a constant learning rate, then statistics of
    the training images. Shift: a network trained with batches of 32 meets other light."""
    data = common.load()
    sizes, epochs, seeds = (QUICK_SIZES, 2, 1) if quick else (SIZES, 5, 3)
    small: dict[str, Any] = {}
    shift: list[dict[str, dict[str, float]]] = []
    for size in sizes:
        models = [train(size, epochs, seed, data) for seed in range(seeds)]
        small[str(size)] = averaged([evaluate(m, data.train_x, data.test_x, data.test_y) for m in models])
        if size == 32:
            shift = [evaluate(m, shifted(data.train_x), shifted(data.test_x), data.test_y) for m in models]
    return {
        "epochs": epochs,
        "seeds": seeds,
        "small": small,
        "shift": averaged(shift),
    }


def report(measured: Measured) -> Report:
    small, shift = measured["small"], measured["shift"]
    sizes = sorted(map(int, small))
    least, usual = small[str(sizes[0])], small["32"]
    most, running, exact = small[str(sizes[-1])], WAYS[0], WAYS[3]
    claims = [
        Claim(
            "In evaluation a network should use the statistics of the population; a running average estimates them.",
            f"after batches of 32 the running variances are off by {usual[running]['error']:.1%} on average, accuracy "
            f"{usual[running]['accuracy']:.1%} with them, {usual[exact]['accuracy']:.1%} with exact ones",
            usual[running]["error"] < 0.25 and abs(usual[running]["accuracy"] - usual[exact]["accuracy"]) < 0.03,
        ),
        Claim(
            "With small batches the running average is a poor estimate (Wu & Johnson).",
            f"batches of {sizes[0]}: off by {least[running]['error']:.1%}",
            least[running]["error"] > 2 * usual[running]["error"],
        ),
        Claim(
            "Then exact statistics give a better accuracy.",
            f"batches of {sizes[0]}: {least[running]['accuracy']:.1%} with the running average, "
            f"{least['calibrate']['accuracy']:.1%} calibrated, {least[exact]['accuracy']:.1%} layer by layer",
            least[exact]["accuracy"] > least[running]["accuracy"] + 0.005,
        ),
        Claim(
            "While the weights still change fast the running average lags behind them, and exact statistics do not.",
            f"batches of {sizes[-1]}, so the fewest steps and the largest learning rate: variances off by "
            f"{most[running]['error']:.1%}, {most[running]['accuracy']:.1%} with the running average, "
            f"{most[exact]['accuracy']:.1%} with exact statistics",
            most[exact]["accuracy"] > most[running]["accuracy"] + 0.005,
        ),
        Claim(
            "Merged over batches of any size, the statistics are those of all data at once.",
            f"layer by layer, in batches of {CALIBRATION_BATCH}, the variances differ by {usual[exact]['error']:.0e} "
            f"from one batch of all; in one pass by {usual['calibrate']['error']:.1e}, as norms behind the first see "
            f"other inputs; update_bn's by {usual['update_bn']['error']:.1e}",
            usual[exact]["error"] < 1e-4 and usual[exact]["error"] < usual["update_bn"]["error"],
        ),
        Claim(
            "Averaging the variances of batches (update_bn) is less exact, as it leaves out how their means differ.",
            f"batches of {CALIBRATION_BATCH}, well mixed: off by {usual['update_bn']['error']:.1e}, calibrate in one "
            f"pass by {usual['calibrate']['error']:.1e}",
            usual["update_bn"]["error"] > usual["calibrate"]["error"],
        ),
        Claim(
            "Where the inputs shift, the statistics of training are wrong, and those of the new inputs mend it.",
            f"other light: {shift[running]['accuracy']:.1%} with the running average, {shift[exact]['accuracy']:.1%} "
            f"with the new inputs' statistics, without labels; {usual[exact]['accuracy']:.1%} in the light of training",
            shift[exact]["accuracy"] > shift[running]["accuracy"] + 0.05,
        ),
    ]
    rows = [
        (f"batches of {size}", way, f"{values['accuracy']:.1%}", f"{values['error']:.2g}")
        for size in sizes
        for way, values in small[str(size)].items()
    ]
    rows += [
        ("other light", way, f"{values['accuracy']:.1%}", f"{values['error']:.2g}") for way, values in shift.items()
    ]
    return Report(
        "Statistics for inference",
        f"Three convolutions with batch norm on handwritten digits, {measured['epochs']} epochs at a constant learning "
        "rate, in batches of several sizes; then evaluated with the running averages, with torch's update_bn, and with "
        f"`fastnorm.calibrate`. Other light: every pixel times {CONTRAST} plus {BRIGHTNESS} (deviations), in the "
        "evaluation alone.",
        [
            "Ioffe & Szegedy 2015, algorithm 2, https://arxiv.org/abs/1502.03167",
            "Wu & Johnson 2021, Rethinking 'Batch' in BatchNorm, https://arxiv.org/abs/2105.07576",
            "Li et al. 2016, Revisiting batch normalization for practical domain adaptation, "
            "https://arxiv.org/abs/1603.04779",
        ],
        claims,
        [
            Table(
                f"Mean of {measured['seeds']} seeds; error: mean relative difference of the running variances from "
                "those of one batch of all images",
                ("trained with", "statistics", "held-out accuracy", "error of the variances"),
                rows,
            )
        ],
        "Left: accuracy by the batch size of the training. Middle: error of the running variances. Right: the same "
        "network in other light (dotted: in the light of training).",
    )


def draw(figure: Figure, measured: Measured) -> None:
    colours = dict(zip(WAYS, ("#d1495b", "#edae49", "#6ba3d6", "#0b3d6b"), strict=True))
    left, middle, right = figure.subplots(1, 3)
    sizes = sorted(map(int, measured["small"]))
    for way, colour in colours.items():
        of_size = [measured["small"][str(size)][way] for size in sizes]
        left.plot(sizes, [100 * v["accuracy"] for v in of_size], "o-", color=colour, label=way)
        middle.plot(sizes, [max(v["error"], 1e-8) for v in of_size], "o-", color=colour)
    for axes in (left, middle):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("batch size in training")
    left.set_title("held-out accuracy in %")
    left.legend(frameon=False, fontsize=8)
    middle.set(yscale="log", title="error of the running variances")
    bars = [100 * measured["shift"][way]["accuracy"] for way in WAYS]
    right.bar(range(len(WAYS)), bars, color=list(colours.values()))
    right.axhline(100 * measured["small"]["32"][WAYS[-1]]["accuracy"], color="grey", ls=":")
    right.set_xticks(range(len(WAYS)), ["running\naverage", "update_bn", "calibrate", "layer\nby layer"])
    right.set_title("accuracy in other light, in %")


if __name__ == "__main__":
    common.main(sys.modules[__name__], (12, 3.8))
