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
from collections.abc import Iterable
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

WIDTH = 64
WIDE = 256  # units, and samples, where nothing is trained: in narrow nets variances stray from their expectations
NARROW = 128  # units of the net that carries every path length by itself
BLOCKS = 10_000  # of the analysis of paths
SHORT = 15  # residual branches
LONGEST = 30  # path lengths that are told apart; longer ones count as the last
VARIANTS = ("batch norm", "no norm", "SkipInit 1", "SkipInit 1/sqrt(d)", "SkipInit 0")
RATES = (0.1, 0.01, 0.001)


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


def path_shares(blocks: int) -> list[float]:
    """The share of the output's variance that comes from paths through k residual branches, k = 0 to LONGEST.

    In front of block l the variance is l, and its branch, normalized, has variance 1: so the branch passes each part of
    x on with 1/l of its variance. A path through the branches of a set S has variance prod(1/l for l in S); all of them
    have prod(1 + 1/l) = blocks + 1. Their shares are the probabilities of a sum of independent yes-or-no choices, of
    probability (1/l) / (1 + 1/l) = 1 / (l + 1): block by block, the sum's distribution moves on by one.
    """
    return shares_of(1 / (block + 1) for block in range(1, blocks + 1))


def shares_of(probabilities: Iterable[float]) -> list[float]:
    """How a sum of independent yes-or-no choices is distributed; the last entry has all the rest."""
    shares = [1.0] + [0.0] * LONGEST
    for p in probabilities:
        moved = [share * p for share in shares]
        shares = [share * (1 - p) for share in shares]
        shares[-1] += moved[-1]
        for k in range(LONGEST):
            shares[k + 1] += moved[k]
    return shares


def poisson_shares(blocks: int) -> list[float]:
    """The same by the Poisson distribution of mean ln(blocks), which is its limit."""
    mean = math.log(blocks)
    return [math.exp(-mean + k * math.log(mean) - math.lgamma(k + 1)) for k in range(LONGEST + 1)]


@torch.no_grad()
def carried_shares(blocks: int, samples: int = 96, width: int = NARROW) -> list[float]:
    """The same of a linear residual net with random weights and normalized branches, which carries the part of every
    path length by itself: parts (LONGEST + 1, samples, width)."""
    torch.manual_seed(0)
    parts = torch.zeros(LONGEST + 1, samples, width)
    parts[0] = torch.randn(samples, width)
    for _ in range(blocks):
        var = fastnorm.moments(parts.sum(0))[1]
        # The norm is an affine map of the sum; so it normalizes each part by the sum's deviation.
        centred = parts - parts.mean(1, keepdim=True)
        branch = centred * (var + 1e-5).rsqrt() @ (torch.randn(width, width) / math.sqrt(width))
        parts[-1] += branch[-1]
        parts[1:] += branch[:-1]
    powers = parts.square().mean((1, 2)).double()
    return (powers / powers.sum()).tolist()  # type: ignore[no-any-return]


# Training.


def train(variant: str, depth: int, lr: float, steps: int, data: common.Digits) -> dict[str, Any]:
    torch.manual_seed(0)
    model = network(variant, depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    run = common.train(model, data, optimizer, steps, batch=64, seed=0)
    trained = not run.diverged
    last = run.losses[-10:]
    return {
        "variant": variant,
        "depth": depth,
        "lr": lr,
        "accuracy": run.best if trained else 0.0,
        "loss": sum(last) / len(last) if trained else None,
        "losses": [round(loss, 5) for loss in run.losses],
        "diverged": run.diverged,
    }


def mean_length(shares: list[float]) -> float:
    """Residual branches on a path, by shares of the variance."""
    return sum(k * share for k, share in enumerate(shares))


def measure(quick: bool) -> Measured:
    depths, steps = ((4, 64), 30) if quick else ((4, 16, 100, 1000), 60)
    growth = 200 if quick else 1000
    data = common.load()
    runs = []
    for depth in depths:
        for variant in VARIANTS:
            tried = [train(variant, depth, lr, steps, data) for lr in RATES]
            runs.append(max(tried, key=lambda run: run["accuracy"]))
    blocks = BLOCKS // 50 if quick else BLOCKS
    variance = {"batch norm": variances("batch norm", blocks), "no norm": variances("no norm", growth)}
    normed = zip(variance["batch norm"]["skip"], variance["batch norm"]["branch"], strict=True)
    return {
        "growth": {name: {key: values[:growth] for key, values in of.items()} for name, of in variance.items()},
        "blocks": blocks,
        "exact": path_shares(BLOCKS),
        "poisson": poisson_shares(BLOCKS),
        "exact_simulated_blocks": path_shares(blocks),
        "simulated": shares_of(branch / (skip + branch) for skip, branch in normed),
        "carried": carried_shares(blocks),
        "widths": {
            "blocks": blocks // 10,
            "formula": mean_length(path_shares(blocks // 10)),
            "carried": {width: mean_length(carried_shares(blocks // 10, width=width)) for width in (32, 64, NARROW)},
        },
        "steps": steps,
        "runs": runs,
    }


def short(shares: list[float]) -> float:
    """The share of paths through SHORT branches at most."""
    return sum(shares[: SHORT + 1])


def trains(run: dict[str, Any]) -> bool:
    """Far better than chance, 10%."""
    return bool(run["accuracy"] >= 0.8)


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

    def of(variant: str, which: list[int]) -> str:
        return ", ".join(
            f"{d}: {'not finite' if runs[variant, d]['diverged'] else format(runs[variant, d]['accuracy'], '.1%')}"
            for d in which
        )

    exact, formula = short(measured["exact"]), short(measured["exact_simulated_blocks"])
    simulated, carried, blocks = short(measured["simulated"]), short(measured["carried"]), measured["blocks"]
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
            "The same, simulated.",
            f"{simulated:.1%}, with the variances of the skip path and branches of a random net of {blocks:,} blocks, "
            f"{WIDE} units wide (the formula: {formula:.1%})",
            simulated >= 0.97,
        ),
        Claim(
            "The same, in a linear net that carries the sum over all paths of each length by itself.",
            f"{carried:.1%} in one of {blocks:,} blocks, {NARROW} units wide; the mean path has "
            f"{mean_length(measured['carried']):.2f} branches, by the formula "
            f"{mean_length(measured['exact_simulated_blocks']):.2f}. The formula is that of infinitely wide nets: "
            "narrow ones have longer paths",
            carried >= 0.97,
        ),
        Claim(
            "With batch norm very deep nets train.",
            f"accuracy at depth {of('batch norm', depths)}",
            all(trains(runs["batch norm", d]) for d in depths),
        ),
        Claim(
            "Without norms deep ones do not.",
            f"accuracy at depth {of('no norm', depths)}",
            not any(trains(runs["no norm", d]) for d in depths[1:]),
        ),
        Claim(
            "SkipInit with alpha = 1 fails like no norm.",
            f"accuracy at depth {of('SkipInit 1', depths)}",
            not any(trains(runs["SkipInit 1", d]) for d in depths[1:]),
        ),
        Claim(
            "SkipInit with alpha = 1/sqrt(d) trains at any depth.",
            f"accuracy at depth {of('SkipInit 1/sqrt(d)', depths)}",
            all(trains(runs["SkipInit 1/sqrt(d)", d]) for d in depths),
        ),
        Claim(
            "SkipInit with alpha = 0 trains at any depth.",
            f"accuracy at depth {of('SkipInit 0', depths)}",
            all(trains(runs["SkipInit 0", d]) for d in depths),
        ),
        Claim(
            f"It is depth that needs it: {shallow} blocks train without.",
            f"no norm, {shallow} blocks: {runs['no norm', shallow]['accuracy']:.1%}",
            trains(runs["no norm", shallow]),
        ),
    ]
    rows = [
        (run["depth"], run["variant"], run["lr"], f"{run['accuracy']:.1%}", run["loss"] or "not finite")
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
                f"{' and '.join(map(str, RATES))} (loss: of the last ten steps)",
                ("blocks", "variant", "learning rate", "held-out accuracy", "loss"),
                rows,
            ),
            Table(
                f"Branches on the mean path of {measured['widths']['blocks']:,} blocks, carried by themselves",
                ("units", "branches"),
                [*measured["widths"]["carried"].items(), ("formula", measured["widths"]["formula"])],
            ),
            Table(
                f"Share of the variance of {BLOCKS:,} blocks by path length",
                ("residual branches", "exactly", "Poisson, mean ln d"),
                shares,
            ),
        ],
        "The formula: in front of block l the variance is l and the branch has 1, so a path through the set S of "
        "branches has variance prod 1/l over S, all paths have prod (1 + 1/l) = d + 1, and the number of branches on a "
        "path is distributed as a sum of independent choices of probability 1/(l + 1).",
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
    blocks = f"{measured['blocks']:,} blocks"
    axes[1].bar(lengths, measured["exact_simulated_blocks"], color="#9fc5e8", label=f"formula, {blocks}")
    axes[1].plot(lengths, measured["simulated"], ".-", color="#0b3d6b", label=f"simulated, {WIDE} units")
    axes[1].plot(lengths, measured["carried"], ".-", color="#edae49", label=f"carried, {NARROW} units")
    axes[1].axvline(SHORT + 0.5, color="grey", ls=":")
    axes[1].set(xlim=(-0.5, 25), xlabel="residual branches on the path", title="share of the variance")
    axes[1].legend(frameon=False)
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
