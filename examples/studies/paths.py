"""How long the paths through a residual net are, by the share of the variance that comes through them: by a formula, by
drawing paths at random, and by carrying the part of every length through a net by itself. Study 3 shows it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from examples.studies import common

BLOCKS = 10_000
SHORT = 15  # residual branches
LONGEST = 24  # path lengths that are told apart; longer ones count as the last
AT_ONCE = 100  # blocks that all random paths go through in one step


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


def mean_length(shares: Sequence[float]) -> float:
    """Residual branches on a path, by shares of the variance."""
    return sum(k * share for k, share in enumerate(shares))


def short(shares: Sequence[float]) -> float:
    """The share of paths through SHORT branches at most."""
    return sum(shares[: SHORT + 1])


def walked(probabilities: Sequence[float], paths: int) -> dict[str, Any]:
    """Random paths, which take each branch with its share of the variance behind the block: the shares of path lengths,
    and the standard error of `short`. Where branches are independent, it is what all paths give."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.zeros(paths, dtype=torch.long)
    for some in torch.tensor(probabilities).split(AT_ONCE):
        lengths += (torch.rand(paths, len(some), generator=generator) < some).sum(1)
    counts = lengths.clamp(max=LONGEST).bincount(minlength=LONGEST + 1)
    shares: list[float] = (counts / paths).tolist()
    part = short(shares)
    return {"paths": paths, "shares": shares, "error": math.sqrt(part * (1 - part) / paths)}


@torch.no_grad()
def carried(blocks: int, width: int, each_unit: bool, seed: int) -> tuple[list[float], float]:
    """The shares in a linear residual net with random weights and normalized branches, which carries the part of every
    path length by itself; and the sum of the parts' variances over that of the output.

    The inputs are standard normal, all there are: parts (LONGEST + 1, width, width) are the maps from the inputs. Each
    unit is normalized by its own variance, as by batch norm; or all by their mean, which the variances of the units are
    in a net of infinite width.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = torch.zeros(LONGEST + 1, width, width)
    parts[0] = torch.eye(width)
    for _ in range(blocks):
        var = parts.sum(0).square().sum(0)
        deviation = (var if each_unit else var.mean()).sqrt()
        # The norm is a linear map of the sum; so it divides each part by the sum's deviation.
        branch = parts / deviation @ (torch.randn(width, width, generator=generator) / math.sqrt(width))
        parts[-1] += branch[-1]
        parts[1:] += branch[:-1]
    powers = parts.square().sum((1, 2)).double()
    return (powers / powers.sum()).tolist(), float(powers.sum() / parts.sum(0).square().sum())


def simulated(blocks: int, each_unit: bool, width: int, seeds: int) -> dict[str, Any]:
    """`carried` of several nets: means, and the standard errors of what is claimed of them."""
    runs = [carried(blocks, width, each_unit, seed) for seed in range(seeds)]
    shares = [of_net for of_net, _ in runs]
    return {
        "width": width,
        "each_unit": each_unit,
        "nets": seeds,
        "shares": [sum(of_length) / seeds for of_length in zip(*shares, strict=True)],
        "short": common.estimate([short(of_net) for of_net in shares]),
        "mean_length": common.estimate([mean_length(of_net) for of_net in shares]),
        "excess": sum(excess for _, excess in runs) / seeds,
    }
