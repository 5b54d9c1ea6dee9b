"""Study 3: why deep residual nets train.

    python examples/studies/deep_residual.py            # writes docs/studies/deep_residual.*
    python examples/studies/deep_residual.py --quick

Variance on the skip path and on the branches of a deep residual net before training, with batch norm and without; how
much of the variance comes from short paths, by a formula and by simulation; and training on handwritten digits at
depths up to 1,000 with batch norm, without, and with SkipInit.
"""

from __future__ import annotations

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
from examples.studies.paths import (
    BLOCKS,
    LONGEST,
    SHORT,
    mean_length,
    path_shares,
    poisson_shares,
    short,
    simulated,
    walked,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 64
WIDE = 256  # units, and samples, where nothing is trained: in narrow nets variances stray from their expectations
VARIANTS = ("batch norm", "no norm", "SkipInit 1", "SkipInit 1/sqrt(d)", "SkipInit 0")
RATES = (0.1, 0.01, 0.001)
SEEDS = 3  # where no rate trains with the first
TRAINED, CHANCE = 0.8, 0.2  # accuracies: at least, and at most where nothing was learned, which is 10% on average
FAILS_FROM = 100  # blocks, from which De & Smith have no net train without norms or with alpha = 1
PATHS = 40_000
#: Of the nets that carry all lengths: units, and nets. They are narrow, so that they are many.
NORMED, ONE_VARIANCE = ((32, 4), (64, 4), (128, 2)), (64, 4)
QUICK_NORMED, QUICK_ONE_VARIANCE = ((8, 2), (16, 2)), (32, 3)


class Block(nn.Module):
    """x + branch(x), the branch being a norm (or none), ReLU and a linear layer drawn by He's rule, which keeps the
    variance of a normalized input: so the branch's is that of what goes in."""

    def __init__(self, variant: str, depth: int, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = fastnorm.BatchNorm1d(width, activation="relu") if variant == "batch norm" else nn.ReLU()
        self.linear = nn.Linear(width, width)
        nn.init.normal_(self.linear.weight, std=math.sqrt(2 / width))
        nn.init.zeros_(self.linear.bias)
        alphas = {"SkipInit 1": 1.0, "SkipInit 1/sqrt(d)": depth**-0.5, "SkipInit 0": 0.0}
        self.skip = fastnorm.SkipInit(alphas[variant]) if variant in alphas else None

    def branch(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch(x)
        return x + branch if self.skip is None else self.skip(x, branch)  # type: ignore[no-any-return]


def network(variant: str, depth: int) -> nn.Sequential:
    """`depth` residual blocks of WIDTH units between two linear layers."""
    last = [fastnorm.BatchNorm1d(WIDTH)] if variant == "batch norm" else []
    blocks = [Block(variant, depth) for _ in range(depth)]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), *blocks, *last, nn.Linear(WIDTH, 10))


# Before training.


@torch.no_grad()
def variances(variant: str, depth: int) -> dict[str, list[float]]:
    """Of the skip path in front of every block, and of every branch, averaged over units: over the data and the random
    weights, as De & Smith have it, which is the mean square; and over the data alone, as batch norm has it."""
    torch.manual_seed(0)
    x = torch.randn(WIDE, WIDE)
    skip, branches, of_data = [], [], []
    for _ in range(depth):
        block = Block(variant, depth, WIDE)
        branch = block.branch(x)
        squares = [float(t.square().mean()) for t in (x, branch)]
        if not all(map(math.isfinite, squares)):
            break
        skip.append(squares[0])
        branches.append(squares[1])
        of_data.append(float(fastnorm.moments(branch)[1].mean()))
        x = x + branch if block.skip is None else block.skip(x, branch)
    return {"skip": skip, "branch": branches, "branch_of_data": of_data}


# Training.


def train(variant: str, depth: int, lr: float, seed: int, steps: int, data: common.Digits) -> dict[str, Any]:
    """accuracy: 0 where the loss was not finite."""
    torch.manual_seed(seed)
    model = network(variant, depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    run = common.train(model, data, optimizer, steps, batch=64, seed=seed)
    last = run.losses[-10:]
    return {
        "variant": variant,
        "depth": depth,
        "lr": lr,
        "accuracy": 0.0 if run.diverged else run.best,
        "loss": None if run.diverged else sum(last) / len(last),
        "diverged": run.diverged,
    }


def best_of(variant: str, depth: int, steps: int, data: common.Digits) -> dict[str, Any]:
    """The run at the best of RATES; where none trains, the best of SEEDS more tries. tried: how many they were, and
    diverged_of_tried how many of them had a loss that was not finite."""
    tried = [train(variant, depth, lr, 0, steps, data) for lr in RATES]
    if not any(map(trains, tried)):
        tried += [train(variant, depth, lr, seed, steps, data) for seed in range(1, SEEDS) for lr in RATES]
    best = max(tried, key=lambda run: run["accuracy"])
    return best | {"tried": len(tried), "diverged_of_tried": sum(run["diverged"] for run in tried)}


def measure(quick: bool) -> Measured:
    depths, steps = ((4, FAILS_FROM), 30) if quick else ((4, 16, 100, 1000), 60)
    growth = 200 if quick else 1000
    data = common.load()
    runs = [best_of(variant, depth, steps, data) for depth in depths for variant in VARIANTS]
    blocks = BLOCKS // 50 if quick else BLOCKS
    variance = {"batch norm": variances("batch norm", blocks), "no norm": variances("no norm", growth)}
    normed = zip(variance["batch norm"]["skip"], variance["batch norm"]["branch"], strict=True)
    return {
        "growth": {name: {key: values[:growth] for key, values in of.items()} for name, of in variance.items()},
        "blocks": blocks,
        "exact": path_shares(BLOCKS),
        "poisson": poisson_shares(BLOCKS),
        "exact_simulated_blocks": path_shares(blocks),
        "walked": walked([branch / (skip + branch) for skip, branch in normed], PATHS),
        "one_variance": simulated(BLOCKS, False, *(QUICK_ONE_VARIANCE if quick else ONE_VARIANCE)),
        "normed": [simulated(BLOCKS, True, *nets) for nets in (QUICK_NORMED if quick else NORMED)],
        "steps": steps,
        "runs": runs,
    }


def trains(run: dict[str, Any]) -> bool:
    """Far better than chance, 10%."""
    return bool(run["accuracy"] >= TRAINED)


def fails(run: dict[str, Any]) -> bool:
    """Every rate and seed diverges or learns nothing."""
    return bool(run["accuracy"] <= CHANCE and run["tried"] == SEEDS * len(RATES))


def plus_minus(estimated: list[float], digits: str = ".1%") -> str:
    """A mean and its standard error."""
    return " ± ".join(format(value, digits) for value in estimated)


def at_infinite_width(nets: list[dict[str, Any]]) -> tuple[float, float]:
    """The mean path length and its standard error, by a line through the two widest in 1 / width: the last is twice as
    wide."""
    (narrow, narrow_error), (wide, wide_error) = (net["mean_length"] for net in nets[-2:])
    return 2 * wide - narrow, math.hypot(2 * wide_error, narrow_error)


def report(measured: Measured) -> Report:
    skip = measured["growth"]["batch norm"]["skip"]
    branch = measured["growth"]["batch norm"]["branch"]
    bare = measured["growth"]["no norm"]
    depth = len(skip)
    slope = (skip[-1] - skip[0]) / (depth - 1)
    tail = branch[depth // 10 :]
    of_data = measured["growth"]["batch norm"]["branch_of_data"]
    doubling = (bare["skip"][20] / bare["skip"][0]) ** (1 / 20)
    runs = {(run["variant"], run["depth"]): run for run in measured["runs"]}
    depths = sorted({run["depth"] for run in measured["runs"]})
    shallow = depths[0]

    def of(variant: str) -> str:
        reached = (
            f"{d}: {'not finite' if runs[variant, d]['diverged'] else format(runs[variant, d]['accuracy'], '.1%')}"
            for d in depths
        )
        return f"accuracy at depth {', '.join(reached)}"

    def failures(variant: str) -> str:
        diverged, tried = (sum(runs[variant, d][key] for d in failing) for key in ("diverged_of_tried", "tried"))
        return (
            f"{of(variant)}. From {FAILS_FROM} blocks {diverged} of {tried} tries, all rates and seeds, have a loss "
            "that is not finite"
        )

    exact, formula = short(measured["exact"]), short(measured["exact_simulated_blocks"])
    walks, one_variance, blocks = measured["walked"], measured["one_variance"], measured["blocks"]
    normed = measured["normed"]
    widest = normed[-1]
    failing = [d for d in depths if d >= FAILS_FROM]
    claims = [
        Claim(
            "With normalized branches the variance on the skip path grows like depth.",
            f"{skip[0]:.2f} in front of block 1, {skip[-1]:.0f} in front of block {depth}: {slope:.2f} a block",
            0.8 < slope < 1.2,
        ),
        Claim(
            "The variance of every branch stays near 1.",
            f"{min(tail):.2f} to {max(tail):.2f}, mean {sum(tail) / len(tail):.2f} over data and weights (over data "
            f"alone {sum(of_data) / len(of_data):.2f}; 1 - 1/pi is 0.68: ReLU leaves each unit a mean of its own)",
            min(tail) > 0.7 and max(tail) < 1.4,
        ),
        Claim(
            "Without norms the variance doubles in every block.",
            f"times {doubling:.2f} a block, {common.show(bare['skip'][-1])} in front of block {len(bare['skip'])}"
            + (", then not finite" if len(bare["skip"]) < depth else ""),
            1.8 < doubling < 2.2,
        ),
        Claim(
            f"In a net of {BLOCKS:,} normalized blocks 97% of the variance comes from paths through {SHORT} or fewer "
            "residual branches.",
            f"{exact:.1%} exactly; {short(measured['poisson']):.1%} by a Poisson distribution of mean ln d, the limit, "
            "which may be what the source rounds",
            exact >= 0.97,
        ),
        Claim(
            "The same, simulated: random paths.",
            f"{short(walks['shares']):.2%} ± {walks['error']:.2%} of {walks['paths']:,} paths, which take each branch "
            "with its share of the variance, as measured in a random ReLU net with batch norm of "
            f"{blocks:,} blocks, {WIDE} units wide (the formula: {formula:.2%})",
            short(walks["shares"]) >= 0.97,
        ),
        Claim(
            "The same, simulated: a linear net that carries the sum over all paths of each length by itself.",
            f"{plus_minus(one_variance['short'], '.2%')} in {one_variance['nets']} nets of {BLOCKS:,} blocks, "
            f"{one_variance['width']} units wide, where one variance normalizes all units, as it does in nets of "
            "infinite width, which the formula is of",
            one_variance["short"][0] >= 0.97,
        ),
        Claim(
            "The same in narrow nets, where batch norm divides each unit by its own variance.",
            f"{plus_minus(widest['short'])} in {widest['nets']} nets {widest['width']} units wide. Their paths are "
            "longer, and cancel in part: the variances of the parts add up to "
            f"{widest['excess']:.2f} times the output's. It is an effect of width: the mean path has "
            + ", ".join(f"{net['mean_length'][0]:.2f} branches at {net['width']}" for net in normed)
            + f", so {plus_minus(at_infinite_width(normed), '.2f')} at infinite width; by the formula "
            f"{mean_length(measured['exact']):.2f}",
            widest["short"][0] >= 0.97,
        ),
        Claim(
            "With batch norm very deep nets train.",
            of("batch norm"),
            all(trains(runs["batch norm", d]) for d in depths),
        ),
        Claim(
            "Without norms deep ones do not.",
            failures("no norm"),
            all(fails(runs["no norm", d]) for d in failing),
        ),
        Claim(
            f"SkipInit with alpha = 1 fails like no norm, from {FAILS_FROM} blocks (of 16 the source does not say so).",
            failures("SkipInit 1"),
            all(fails(runs["SkipInit 1", d]) for d in failing),
        ),
        Claim(
            "SkipInit with alpha = 1/sqrt(d) trains at any depth.",
            of("SkipInit 1/sqrt(d)"),
            all(trains(runs["SkipInit 1/sqrt(d)", d]) for d in depths),
        ),
        Claim(
            "SkipInit with alpha = 0 trains at any depth.",
            of("SkipInit 0"),
            all(trains(runs["SkipInit 0", d]) for d in depths),
        ),
        Claim(
            f"It is depth that needs it: {shallow} blocks train without.",
            f"no norm, {shallow} blocks: {runs['no norm', shallow]['accuracy']:.1%}",
            trains(runs["no norm", shallow]),
        ),
    ]
    rows = [
        (
            run["depth"],
            run["variant"],
            run["lr"],
            f"{run['accuracy']:.1%}",
            run["loss"] or "not finite",
            f"{run['diverged_of_tried']} of {run['tried']}",
        )
        for run in measured["runs"]
    ]
    lengths = (0, 5, 10, SHORT, 20)
    shares = [
        (f"at most {k}", *(f"{sum(measured[name][: k + 1]):.2%}" for name in ("exact", "poisson"))) for k in lengths
    ]
    return Report(
        "Why deep residual nets train",
        "De & Smith explain it by the size of the residual branches: batch norm makes a branch small beside its skip "
        "path, so a deep net begins near the identity, as a sum over mostly short paths; and a learned scalar, "
        f"SkipInit, does the same without norms. Blocks here are x + linear(relu(norm(x))) of {WIDTH} units, drawn by "
        "He's rule.",
        [
            "De & Smith 2020, Batch normalization biases residual blocks towards the identity function in deep "
            "networks, https://arxiv.org/abs/2002.10444",
            "Veit et al. 2016, Residual networks behave like ensembles of relatively shallow networks, "
            "https://arxiv.org/abs/1605.06431",
        ],
        claims,
        [
            Table(
                f"Digits after {measured['steps']} steps of 64, SGD with momentum 0.9, the better of the rates "
                f"{' and '.join(map(str, RATES))} (loss: of the last ten steps); where none of them reaches "
                f"{TRAINED:.0%}, the best of {SEEDS} seeds of each",
                ("blocks", "variant", "learning rate", "held-out accuracy", "loss", "tries that diverged"),
                rows,
            ),
            Table(
                f"Linear nets of {BLOCKS:,} blocks that carry the part of every path length, with standard errors",
                ("normalized by", "units", "nets", "branches on the mean path", f"of at most {SHORT}", "sum of parts"),
                [
                    (
                        "each unit's variance" if net["each_unit"] else "one variance",
                        net["width"],
                        net["nets"],
                        plus_minus(net["mean_length"], ".2f"),
                        plus_minus(net["short"], ".2%"),
                        f"{net['excess']:.2f}",
                    )
                    for net in (*normed, one_variance)
                ]
                + [("formula", "", "", f"{mean_length(measured['exact']):.2f}", f"{exact:.2%}", 1)],
            ),
            Table(
                f"Share of the variance of {BLOCKS:,} blocks by path length",
                ("residual branches", "exactly", "Poisson, mean ln d"),
                shares,
            ),
        ],
        "The formula: in front of block l the variance is l and the branch has 1, so a path through the set S of "
        "branches has variance prod 1/l over S, all paths have prod (1 + 1/l) = d + 1, and the number of branches on a "
        "path is distributed as a sum of independent choices of probability 1/(l + 1). Sum of parts: of their "
        "variances, over the variance of the output; it is 1 where parts of different lengths are independent. Batch "
        "norm of each unit makes it more, the narrower the net: it enlarges units in which parts happen to cancel.",
    )


def draw(figure: Figure, measured: Measured) -> None:
    axes = figure.subplots(1, 3)
    growth = measured["growth"]
    axes[0].plot(growth["batch norm"]["skip"], label="skip path, batch norm", color="#0b3d6b")
    axes[0].plot(growth["batch norm"]["branch"], label="branch, batch norm", color="#9fc5e8")
    axes[0].plot(growth["no norm"]["skip"], label="skip path, no norm", color="#d1495b")
    axes[0].plot(range(1, len(growth["batch norm"]["skip"])), range(1, len(growth["batch norm"]["skip"])), "k:", lw=1)
    axes[0].set(xscale="log", yscale="log", ylim=(0.3, 1e6), xlabel="block", title="variance before training")
    axes[0].legend(frameon=False)
    lengths = range(LONGEST + 1)
    axes[1].bar(lengths, measured["exact"], color="#9fc5e8", label=f"formula, {BLOCKS:,} blocks")
    walks = f"random paths, {measured['blocks']:,} blocks"
    axes[1].plot(lengths, measured["walked"]["shares"], ".", color="#0b3d6b", label=walks)
    axes[1].plot(lengths, measured["one_variance"]["shares"], color="#2e8b57", label="carried, one variance")
    for net, style in zip(measured["normed"], ("--", "-", ":"), strict=False):
        axes[1].plot(lengths, net["shares"], style, color="#edae49", label=f"carried, {net['width']} units")
    axes[1].axvline(SHORT + 0.5, color="grey", ls=":")
    axes[1].set(xlim=(-0.5, 25), xlabel="residual branches on the path", title="share of the variance")
    axes[1].legend(frameon=False, fontsize=7)
    colours = dict(zip(VARIANTS, ("#0b3d6b", "#7f7f7f", "#d1495b", "#edae49", "#2e8b57"), strict=True))
    depths = sorted({run["depth"] for run in measured["runs"]})
    for variant in VARIANTS:
        reached = [run["accuracy"] for run in measured["runs"] if run["variant"] == variant]
        axes[2].plot(depths, reached, "o-", color=colours[variant], label=variant, alpha=0.8)
    axes[2].axhline(0.1, color="grey", ls=":", lw=1)
    axes[2].set(xscale="log", ylim=(-0.03, 1.03), xlabel="blocks", title="accuracy on digits (0: not finite)")
    axes[2].legend(frameon=False, fontsize=7, loc="center left")


if __name__ == "__main__":
    common.main(sys.modules[__name__], (12, 3.8))
