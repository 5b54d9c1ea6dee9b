"""Study 2: initialization, with and without batch norm.

    python examples/studies/initialization.py           # writes docs/studies/initialization.*
    python examples/studies/initialization.py --quick

A deep MLP with tanh or ReLU, its weights drawn with standard deviation 0.01, 1 or 0.05, or by Xavier's or He's rule:
how large are the activations and the gradients of each layer before the first step?
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fastnorm
from examples.studies import common
from examples.studies.common import Claim, Measured, Report, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 256
SAMPLES = 512
DEPTH = 10
#: Name -> standard deviation of a weight.
RULES = {
    "0.01": 0.01,
    "1": 1.0,
    "0.05": 0.05,
    "Xavier": math.sqrt(1 / WIDTH),
    "He": math.sqrt(2 / WIDTH),
}
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}
BINS = 41
#: Exponents of ten between which histograms of gradients lie, of their absolute values: they differ by so much.
LEAST, MOST = -11.0, 10.0
#: Of tanh: beyond it the slope is below 0.02.
SATURATED = 0.99


def network(std: float, activation: str, batch_norm: bool) -> list[nn.Module]:
    """One module a layer: linear, then the norm with the activation inside, or the activation."""
    layers = []
    for _ in range(DEPTH):
        linear = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.normal_(linear.weight, std=std)
        if batch_norm:
            layers.append(nn.Sequential(linear, fastnorm.BatchNorm1d(WIDTH, activation=activation)))
        else:
            layers.append(nn.Sequential(linear, nn.Tanh() if activation == "tanh" else nn.ReLU()))
    return layers


def run(std: float, activation: str, batch_norm: bool) -> dict[str, Any]:
    """Root mean squares of the activations behind each layer, and of the loss's gradient by them; the loss is a random
    linear function of the last activations, so that its gradient there is 1."""
    torch.manual_seed(0)
    layers = network(std, activation, batch_norm)
    x = torch.randn(SAMPLES, WIDTH, requires_grad=True)
    outputs: list[Tensor] = []
    y = x
    for layer in layers:
        y = layer(y)
        outputs.append(y)
    gradients = torch.autograd.grad(y, outputs, torch.randn_like(y))
    activations = [output.detach() for output in outputs]
    last = activations[-1]
    # Of tanh all there is; of ReLU from 0 to the largest of the last layer.
    low, high = (-1.0, 1.0) if activation == "tanh" else (0.0, max(1e-12, float(last.max())))
    return {
        "activations": [float(values.square().mean().sqrt()) for values in activations],
        "gradients": [float(values.square().mean().sqrt()) for values in gradients],
        "saturated": float((last.abs() > SATURATED).float().mean()) if activation == "tanh" else None,
        "activation_histograms": [histogram(values, low, high) for values in activations],
        "gradient_histograms": [histogram(values.abs().log10(), LEAST, MOST) for values in gradients],
    }


def histogram(values: Tensor, low: float, high: float) -> list[float]:
    """Shares of the values in BINS bins from low to high; those beyond count for the first and the last."""
    counts = torch.histc(values.clamp(low, high), BINS, low, high)
    return [round(share, 4) for share in (counts / counts.sum()).tolist()]


def measure(quick: bool) -> Measured:
    """The quick form is the whole."""
    runs = []
    for activation, rule, batch_norm in itertools.product(ACTIVATIONS, RULES, (False, True)):
        key = {"activation": activation, "rule": rule, "batch_norm": batch_norm}
        runs.append(key | run(RULES[rule], activation, batch_norm))
    return {"width": WIDTH, "depth": DEPTH, "runs": runs}


def pick(measured: Measured, activation: str, rule: str, batch_norm: bool) -> dict[str, Any]:
    return next(
        row
        for row in measured["runs"]
        if (row["activation"], row["rule"], row["batch_norm"]) == (activation, rule, batch_norm)
    )


def growth(values: list[float]) -> float:
    """The mean factor from one layer to the next."""
    first, last = max(values[0], 1e-45), max(values[-1], 1e-45)
    return float((last / first) ** (1 / (len(values) - 1)))


def report(measured: Measured) -> Report:
    show = common.show

    def get(activation: str, rule: str, batch_norm: bool = False) -> dict[str, Any]:
        return pick(measured, activation, rule, batch_norm)

    def ends(row: dict[str, Any], what: str = "activations") -> str:
        return f"{show(row[what][0])} to {show(row[what][-1])}"

    small_tanh, small_relu = get("tanh", "0.01"), get("relu", "0.01")
    large_tanh, large_relu = get("tanh", "1"), get("relu", "1")
    middle = get("tanh", "0.05")
    xavier_tanh, xavier_relu, he_relu = get("tanh", "Xavier"), get("relu", "Xavier"), get("relu", "He")
    normed = {activation: [get(activation, rule, True) for rule in RULES] for activation in ACTIVATIONS}
    spread = {
        activation: max(row["activations"][-1] for row in rows) / min(row["activations"][-1] for row in rows)
        for activation, rows in normed.items()
    }
    gradient_spread = max(
        max(row["gradients"][0] for row in rows) / min(row["gradients"][0] for row in rows) for rows in normed.values()
    )
    normed_he = get("relu", "He", True)
    backward = 1 / growth(normed_he["gradients"])
    predicted = math.sqrt(math.pi / (math.pi - 1))
    claims = [
        Claim(
            "With standard deviation 0.01 the activations of deep layers shrink to 0, and so do the gradients.",
            f"layer 1 to {DEPTH}: tanh {ends(small_tanh)}, ReLU {ends(small_relu)}; gradient at layer 1: "
            f"{show(small_tanh['gradients'][0])} and {show(small_relu['gradients'][0])} of the last layer's",
            max(row["activations"][-1] for row in (small_tanh, small_relu)) < 1e-4
            and max(row["gradients"][0] for row in (small_tanh, small_relu)) < 1e-4,
        ),
        Claim(
            "With standard deviation 1 tanh saturates at -1 and 1.",
            f"{large_tanh['saturated']:.0%} of the last layer beyond {SATURATED}",
            large_tanh["saturated"] > 0.8,
        ),
        Claim(
            "Saturated units have no slope, so the gradient vanishes.",
            f"tanh, gradient at layer 1: {show(large_tanh['gradients'][0])} times the last layer's. In the last layer "
            f"{1 - large_tanh['saturated']:.0%} of units keep a slope, and weights of deviation 1 multiply what passes",
            large_tanh["gradients"][0] < 0.1,
        ),
        Claim(
            "With standard deviation 1 ReLU explodes.",
            f"ReLU {ends(large_relu)}",
            large_relu["activations"][-1] > 1e6,
        ),
        Claim(
            "0.05 lies between: better than 0.01, the signal still shrinks.",
            f"tanh {ends(middle)} (0.01: {ends(small_tanh)}). For width {WIDTH} Xavier's rule gives "
            f"{RULES['Xavier']:.4f}, so 0.05 suits this width almost; of another it would not",
            small_tanh["activations"][-1] < middle["activations"][-1] < xavier_tanh["activations"][-1],
        ),
        Claim(
            "Xavier keeps the activations of tanh alive in all layers.",
            f"tanh {ends(xavier_tanh)}",
            xavier_tanh["activations"][-1] > 0.2,
        ),
        Claim(
            "Xavier is too small for ReLU, which halves the variance in every layer.",
            f"mean square times {growth(xavier_relu['activations']) ** 2:.3f} a layer",
            abs(growth(xavier_relu["activations"]) ** 2 - 0.5) < 0.05,
        ),
        Claim(
            "He keeps the mean square of ReLU.",
            f"times {growth(he_relu['activations']) ** 2:.3f} a layer",
            abs(growth(he_relu["activations"]) ** 2 - 1) < 0.05,
        ),
        Claim(
            "With batch norm the activations no longer depend on the initialization.",
            f"last layer, largest over smallest of the five: tanh {spread['tanh']:.3f}, ReLU {spread['relu']:.3f}",
            max(spread.values()) < 1.05,
        ),
        Claim(
            "With batch norm gradients neither vanish nor explode.",
            f"They are alike for all five (largest over smallest {gradient_spread:.3f}), and grow towards the input: "
            f"ReLU times {backward:.3f} a layer. "
            f"The mean field theory of Yang et al. has sqrt(pi / (pi - 1)) = {predicted:.3f}; over 50 layers that is "
            f"{predicted**50:.0f} times",
            abs(backward - 1) < 0.05,
        ),
        Claim(
            "Without residual connections batch norm makes gradients explode with depth (Yang et al.).",
            f"measured {backward:.3f} a layer, predicted {predicted:.3f}",
            abs(backward - predicted) < 0.05,
        ),
    ]
    rows = [
        (
            row["activation"],
            row["rule"],
            "with" if row["batch_norm"] else "without",
            *(row["activations"][i] for i in (0, DEPTH // 2, DEPTH - 1)),
            *(row["gradients"][i] for i in (0, DEPTH // 2)),
            "" if row["saturated"] is None else f"{row['saturated']:.0%}",
        )
        for row in measured["runs"]
    ]
    middle_layer = DEPTH // 2 + 1
    return Report(
        "Initialization",
        f"What becomes of activations and gradients in {DEPTH} layers of {WIDTH} units, before any training, by the "
        "standard deviation of the weights; and what batch norm (behind each linear layer, the activation inside the "
        "norm) makes of that. Inputs are standard normal. Figures are root mean squares.",
        [
            "Glorot & Bengio 2010, Understanding the difficulty of training deep feedforward neural networks",
            "He et al. 2015, Delving deep into rectifiers, https://arxiv.org/abs/1502.01852",
            "Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167",
            "Yang et al. 2019, A mean field theory of batch normalization, https://arxiv.org/abs/1902.08129",
        ],
        claims,
        [
            Table(
                "Root mean squares (the gradient at the last layer is 1)",
                (
                    "activation",
                    "initialization",
                    "batch norm",
                    "layer 1",
                    f"layer {middle_layer}",
                    f"layer {DEPTH}",
                    "gradient at layer 1",
                    f"gradient at layer {middle_layer}",
                    "saturated",
                ),
                rows,
            )
        ],
        f"Histograms of the activations and of the gradients of all layers, 1 above and {DEPTH} below; the darker, the "
        "more of the layer's values, by the root (the bin with most of them is black). Activations: tanh from -1 to 1, "
        "ReLU from 0 to the largest of the last layer. Gradients: absolute values, from "
        f"10^{LEAST:g} to 10^{MOST:g}, those beyond at the edges; the dotted line is 1. At the bottom, root mean "
        "squares of all layers.",
    )


def draw_histograms(axes: Axes, of_layers: list[list[float]]) -> None:
    """A line of pixels for each layer. Half of ReLU's values are 0: by roots of the shares the others are seen too."""
    shares = torch.tensor(of_layers)
    darkness = (shares / shares.amax(1, keepdim=True)).sqrt().numpy()
    axes.imshow(darkness, cmap="Greys", aspect="auto", interpolation="nearest")


def draw(figure: Figure, measured: Measured) -> None:
    panels = list(itertools.product(("activation", "gradient"), ACTIVATIONS, (False, True)))
    grid = figure.add_gridspec(len(panels) + 1, len(RULES) * 4, height_ratios=[1] * len(panels) + [2.4])
    one = -LEAST / (MOST - LEAST) * BINS - 0.5  # where gradients are 1
    for row, (what, activation, batch_norm) in enumerate(panels):
        for column, rule in enumerate(RULES):
            axes = figure.add_subplot(grid[row, 4 * column : 4 * column + 4], xticks=[], yticks=[])
            draw_histograms(axes, pick(measured, activation, rule, batch_norm)[f"{what}_histograms"])
            if what == "gradient":
                axes.axvline(one, color="#d1495b", ls=":", lw=1)
            if row == 0:
                axes.set_title(f"std {RULES[rule]:.3g}" + ("" if rule[0].isdigit() else f" ({rule})"))
            if column == 0:
                axes.set_ylabel(f"{what}s\n{activation}\n{'with' if batch_norm else 'without'} BN", size=7)
    colours = dict(zip(RULES, ("#7f7f7f", "#d1495b", "#edae49", "#3d85c6", "#2e8b57"), strict=True))
    width = len(RULES) * 4 // 4
    places = itertools.product(("activations", "gradients"), ACTIVATIONS)
    for place, (what, activation) in enumerate(places):
        axes = figure.add_subplot(grid[-1, place * width : (place + 1) * width], yscale="log", xlabel="layer")
        for rule, batch_norm in itertools.product(RULES, (False, True)):
            values = pick(measured, activation, rule, batch_norm)[what]
            look: dict[str, Any] = {"ls": "--", "lw": 2.2, "alpha": 0.6} if batch_norm else {"lw": 1.3}
            label = rule if not batch_norm else None
            axes.plot(range(1, len(values) + 1), values, color=colours[rule], label=label, **look)
        axes.set_title(f"{activation}: {what}")
        axes.set_ylim(1e-12, 1e12)
        if place == 0:
            axes.legend(frameon=False, fontsize=7, ncols=2, title="dashed: with BN", title_fontsize=7)


if __name__ == "__main__":
    common.main(sys.modules[__name__], (12, 11))
