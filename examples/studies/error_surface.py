"""Study 1: the error surface, and the learning rates that it allows.

    python examples/studies/error_surface.py            # writes docs/studies/error_surface.*
    python examples/studies/error_surface.py --quick

Two features of scales 1 and 100 under a linear model, with and without normalization; then networks on handwritten
digits, with sigmoid and ReLU, with and without batch norm, at learning rates x1, x5 and x30.
"""

from __future__ import annotations

import itertools
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
    from matplotlib.figure import Figure

SCALES = (1.0, 100.0)
POINTS = 256
TARGET_LOSS = 1e-3  # of the loss at the start
MOST_DESCENT = 200_000

HIDDEN = (64,) * 4
RATES = (0.025, 0.05, 0.1, 0.2, 0.4)  # x1 is the one that suits the ReLU net without batch norm best
FACTORS = (1, 5, 30)
TARGET = 0.9  # accuracy on the held-out digits


# Two features.


def features() -> tuple[Tensor, Tensor]:
    """x (POINTS, 2) with a column of each scale, mean 0; y = x · (1, 1/100), so that both matter alike."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(POINTS, 2, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) * torch.tensor(SCALES, dtype=torch.float64)
    return x, x @ (1 / torch.tensor(SCALES, dtype=torch.float64))


def descend(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Gradient descent on the mean squared error from w = 0, at the best constant learning rate of a quadratic."""
    hessian = 2 * x.T @ x / len(x)
    low, high = torch.linalg.eigvalsh(hessian).tolist()
    lr = 2 / (low + high)
    w = torch.zeros(2, dtype=torch.float64)
    start, steps, path = float(y.square().mean()), 0, [w.tolist()]
    while float((x @ w - y).square().mean()) > TARGET_LOSS * start and steps < MOST_DESCENT:
        w = w - lr * (2 * x.T @ (x @ w - y) / len(x))
        steps += 1
        if steps <= 40:
            path.append(w.tolist())
    return {
        "condition": high / low,
        "best_lr": lr,
        "steps": steps,
        "path": path,
        "hessian": hessian.tolist(),
        "optimum": torch.linalg.lstsq(x, y[:, None]).solution[:, 0].tolist(),
    }


def measure_features() -> dict[str, Any]:
    x, y = features()
    normalized = fastnorm.BatchNorm1d(2, affine=False, dtype=torch.float64)(x)
    return {"raw": descend(x, y), "normalized": descend(normalized, y)}


# Digits.


def network(activation: str, batch_norm: bool) -> nn.Module:
    """64-64-64-64-64-10; the activation behind each hidden layer, inside the norm where there is one."""
    layers: list[nn.Module] = [nn.Flatten()]
    size = 64
    for width in HIDDEN:
        layers.append(nn.Linear(size, width))
        if batch_norm:
            layers.append(fastnorm.BatchNorm1d(width, activation=activation))
        else:
            layers.append(nn.Sigmoid() if activation == "sigmoid" else nn.ReLU())
        size = width
    return nn.Sequential(*layers, nn.Linear(size, 10))


def run(data: common.Digits, activation: str, batch_norm: bool, lr: float, steps: int, seed: int) -> common.Training:
    torch.manual_seed(seed)
    model = network(activation, batch_norm)
    return common.train(model, data, torch.optim.SGD(model.parameters(), lr=lr), steps, 64, seed, evaluate_every=10)


def base_rate(data: common.Digits, steps: int) -> float:
    """The rate at which the ReLU net without batch norm reaches the target first: as Ioffe & Szegedy's x1 is the one
    that was found for their network without."""
    reached = {lr: run(data, "relu", False, lr, steps, seed=0).steps_to(TARGET) or steps for lr in RATES}
    return min(reached, key=lambda lr: (reached[lr], lr))


def measure_digits(data: common.Digits, base: float, quick: bool) -> list[dict[str, Any]]:
    steps, seeds = (200, 1) if quick else (2000, 5)
    rows = []
    for activation, batch_norm, factor in itertools.product(("relu", "sigmoid"), (False, True), FACTORS):
        runs = [run(data, activation, batch_norm, base * factor, steps, seed) for seed in range(seeds)]
        middle = sorted(runs, key=lambda run: run.best)[seeds // 2]
        rows.append(
            {
                "activation": activation,
                "batch_norm": batch_norm,
                "factor": factor,
                "steps": common.median([run.steps_to(TARGET) for run in runs]),
                "best": middle.best,
                "diverged": sum(run.diverged for run in runs),
                "curve": middle.accuracies,
            }
        )
    return rows


def measure(quick: bool) -> Measured:
    data = common.load()
    base = base_rate(data, 250)
    return {"features": measure_features(), "base": base, "digits": measure_digits(data, base, quick)}


def pick(measured: Measured, activation: str, batch_norm: bool, factor: int) -> dict[str, Any]:
    return next(
        row
        for row in measured["digits"]
        if (row["activation"], row["batch_norm"], row["factor"]) == (activation, batch_norm, factor)
    )


def in_steps(steps: int | None) -> str:
    return f"never reaches {TARGET:.0%}" if steps is None else f"{steps} steps to {TARGET:.0%}"


def fewer(a: int | None, b: int | None) -> bool:
    """a steps are fewer than b, where None is never."""
    return a is not None and (b is None or a < b)


def fastest(measured: Measured, activation: str, batch_norm: bool) -> dict[str, Any]:
    rows = [pick(measured, activation, batch_norm, factor) for factor in FACTORS]
    return min(rows, key=lambda row: float("inf") if row["steps"] is None else row["steps"])


def report(measured: Measured) -> Report:
    raw, normalized = measured["features"]["raw"], measured["features"]["normalized"]
    show = common.show
    relu = {(bn, factor): pick(measured, "relu", bn, factor) for bn in (False, True) for factor in FACTORS}
    sigmoid = [pick(measured, "sigmoid", False, factor) for factor in FACTORS]
    sigmoid_bn = [pick(measured, "sigmoid", True, factor) for factor in FACTORS]
    plain_best, norm_best = fastest(measured, "relu", False), fastest(measured, "relu", True)
    claims = [
        Claim(
            "Features of different scales stretch the loss into a ravine; normalized, its contours are round.",
            f"condition number {show(raw['condition'])} raw, {show(normalized['condition'])} normalized",
            raw["condition"] > 100 * normalized["condition"],
        ),
        Claim(
            "On the round surface gradient descent takes larger steps and arrives sooner.",
            f"to {TARGET_LOSS:g} of the first loss: {raw['steps']} steps at learning rate {show(raw['best_lr'])} raw, "
            f"{normalized['steps']} at {show(normalized['best_lr'])} normalized",
            normalized["steps"] < raw["steps"] and normalized["best_lr"] > raw["best_lr"],
        ),
        Claim(
            "At the same learning rate a network with batch norm needs less than half the steps "
            "(Ioffe & Szegedy: 13.3 against 31.0 million).",
            f"ReLU, x1: with, {in_steps(relu[True, 1]['steps'])}; without, {in_steps(relu[False, 1]['steps'])}",
            fewer(2 * (relu[True, 1]["steps"] or 10**9), relu[False, 1]["steps"]),
        ),
        Claim(
            "Five times the learning rate trains it faster still (2.1 million steps, 14 times fewer than without).",
            f"ReLU with: x1 {in_steps(relu[True, 1]['steps'])}, x5 {in_steps(relu[True, 5]['steps'])}; without, x1 "
            f"{in_steps(relu[False, 1]['steps'])}",
            fewer(relu[True, 5]["steps"], relu[True, 1]["steps"]),
        ),
        Claim(
            "Thirty times the learning rate still trains with batch norm, somewhat slower at first than x5 "
            "(2.7 million steps).",
            f"ReLU with: x30 {in_steps(relu[True, 30]['steps'])}, best {relu[True, 30]['best']:.1%}; x5 "
            f"{in_steps(relu[True, 5]['steps'])}. Sigmoid with, x30: {in_steps(sigmoid_bn[-1]['steps'])}",
            fewer(relu[True, 5]["steps"], relu[True, 30]["steps"]) and relu[True, 30]["steps"] is not None,
        ),
        Claim(
            "Without batch norm the larger learning rates break the network (x5 did at once).",
            f"ReLU without: x5 {in_steps(relu[False, 5]['steps'])}, best {relu[False, 5]['best']:.1%}; "
            f"x30 {in_steps(relu[False, 30]['steps'])}, best {relu[False, 30]['best']:.1%}",
            relu[False, 5]["steps"] is None and relu[False, 30]["steps"] is None,
        ),
        Claim(
            "With sigmoid, batch norm trains what does not train without (69.8% against 0.1% on ImageNet).",
            f"at the best rate of each: with, {in_steps(fastest(measured, 'sigmoid', True)['steps'])}; without, "
            f"{in_steps(fastest(measured, 'sigmoid', False)['steps'])} "
            f"(accuracies {max(row['best'] for row in sigmoid_bn):.1%} and {max(row['best'] for row in sigmoid):.1%}; "
            "chance: 10%)",
            all(row["steps"] is None for row in sigmoid) and any(row["steps"] is not None for row in sigmoid_bn),
        ),
        Claim(
            "At the best learning rate of each, batch norm needs fewer steps.",
            f"ReLU: with, {in_steps(norm_best['steps'])} at x{norm_best['factor']}; without, "
            f"{in_steps(plain_best['steps'])} at x{plain_best['factor']}",
            fewer(norm_best["steps"], plain_best["steps"]),
        ),
    ]
    rows = [
        (
            row["activation"],
            "with" if row["batch_norm"] else "without",
            f"x{row['factor']}",
            row["steps"],
            f"{row['best']:.1%}",
            row["diverged"],
        )
        for row in measured["digits"]
    ]
    return Report(
        "Error surface and learning rate",
        "Does normalization make the error surface rounder, and does a network train at learning rates that it cannot "
        "bear without? Two features of scales 1 and 100 under a linear model, where the surface can be drawn; then "
        f"networks of {len(HIDDEN)} hidden layers of {HIDDEN[0]} on handwritten digits, plain SGD, batches of 64, "
        f"x1 = {measured['base']:g}, which of {', '.join(map(str, RATES))} trains ReLU without batch norm fastest.",
        [
            "Ioffe & Szegedy 2015, Batch Normalization, section 4.2, https://arxiv.org/abs/1502.03167",
            "LeCun et al. 1998, Efficient BackProp, section 4.3 (normalized inputs and the condition of the Hessian)",
        ],
        claims,
        [
            Table(
                f"Steps to {TARGET:.0%} of the held-out digits (median of the seeds)",
                ("activation", "batch norm", "learning rate", "steps", "best accuracy", "runs that diverged"),
                rows,
            )
        ],
        "Above: the loss over the two weights, and the first steps of gradient descent at the best constant rate. "
        "Below: accuracy on the held-out digits.",
    )


def draw(figure: Figure, measured: Measured) -> None:
    grid = figure.add_gridspec(2, 4)
    for place, name in enumerate(("raw", "normalized")):
        case = measured["features"][name]
        axes = figure.add_subplot(grid[0, 2 * place : 2 * place + 2])
        optimum, hessian = torch.tensor(case["optimum"]), torch.tensor(case["hessian"])
        # The same window for both weights: a ravine is one only where the axes are alike.
        reach = 1.4 * float(optimum.abs().max())
        line = torch.linspace(-reach, reach, 161)
        w = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1) + optimum - torch.tensor([0.0, 0.0])
        off = w - optimum
        loss = torch.einsum("xyi,ij,xyj->xy", off, hessian, off) / 2
        levels = torch.logspace(-4, 0, 13) * float(loss.max())
        axes.contourf(w[..., 0], w[..., 1], loss, levels=[0.0, *levels.tolist()], cmap="Blues_r")
        path = torch.tensor(case["path"])
        axes.plot(path[:, 0], path[:, 1], ".-", color="#d1495b", lw=1, ms=4)
        axes.plot(*optimum.tolist(), "x", color="black")
        features = "features of scales 1 and 100" if name == "raw" else "normalized features"
        axes.set_title(f"{features}: {case['steps']} steps")
        axes.set_xlabel("first weight")
        axes.set_ylabel("second weight")
    colours = dict(zip(FACTORS, ("#9fc5e8", "#3d85c6", "#0b3d6b"), strict=True))
    panels = itertools.product(("relu", "sigmoid"), (False, True))
    for place, (activation, batch_norm) in enumerate(panels):
        axes = figure.add_subplot(grid[1, place], ylim=(0, 1.02), xlabel="step")
        axes.axhline(TARGET, color="grey", lw=0.7, ls=":")
        for factor in FACTORS:
            curve = pick(measured, activation, batch_norm, factor)["curve"]
            axes.plot([s for s, _ in curve], [a for _, a in curve], label=f"x{factor}", color=colours[factor], lw=1.3)
        axes.set_title(f"{activation}, {'with' if batch_norm else 'without'} batch norm")
        if place == 0:
            axes.set_ylabel("accuracy")
            axes.legend(frameon=False, loc="center right")


if __name__ == "__main__":
    common.main(sys.modules[__name__], (12, 6.5))
