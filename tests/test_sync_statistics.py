"""How far the statistics of equal parts of a batch, folded, are from those of the whole batch: what docs/distributed.md
says of it, in one process (batch_norm_partial and batch_norm_fold_ are what SyncBatchNorm exchanges with).

Units: for means epsilon times the standard deviation, because next to 0 a unit in the last place of a mean says
nothing; for variances units in the last place.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastnorm import ops

EPS = 1e-5
ULP = torch.finfo(torch.float32).eps
SHAPES = ((8, 32, 28, 28), (16, 16, 56, 56), (64, 64, 7, 7), (8, 256, 100), (256, 300))
#: Measured 1.2 and 6 (docs/distributed.md, over more shapes and seeds than here).
MEANS_APART, VARIANCES_APART = 1.5, 8


def of_whole(x: Tensor) -> Tensor:
    stats: Tensor = ops.norm_forward(x, None, None, None, None, None, 0, 0, EPS, 0, 0.0, False)[1]
    return stats


def of_parts(x: Tensor, parts: int) -> Tensor:
    partials = torch.stack([ops.batch_norm_partial(part) for part in x.chunk(parts)])
    assert len(partials) == parts
    stats: Tensor = ops.batch_norm_fold_(partials, None, None, None, EPS, 0.1)[0]
    return stats


def mean_of(stats: Tensor) -> Tensor:
    """With what rounding has cut off."""
    return stats[0].double() + stats[3].double()


def ulps_apart(a: Tensor, b: Tensor) -> int:
    """Of positive float32: how many numbers lie between."""
    return int((a.contiguous().view(torch.int32).long() - b.contiguous().view(torch.int32).long()).abs().max())


def batches(offset: float) -> list[Tensor]:
    made = []
    for seed, shape in itertools.product(range(2), SHAPES):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + offset
        made.append(x.float())
        if len(shape) == 4:
            made.append(x.float().to(memory_format=torch.channels_last))
    return made


@pytest.mark.parametrize("offset", [0.0, 1.0, 3.0, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("parts", [2, 8])
def test_parts_are_as_near_to_the_whole_as_documented(parts: int, offset: float) -> None:
    for x in batches(offset):
        exact_var, exact_mean = torch.var_mean(x.double().transpose(0, 1).flatten(1), 1, correction=0)
        unit = ULP * exact_var.sqrt()
        whole, folded = of_whole(x), of_parts(x, parts)
        what = f"{tuple(x.shape)} {x.stride()}"
        assert ((mean_of(folded) - mean_of(whole)) / unit).abs().max() <= MEANS_APART, what
        assert ((mean_of(folded) - exact_mean) / unit).abs().max() <= MEANS_APART, what
        # Rounded to float32 they are a unit in the last place of the mean apart besides.
        rounded = (folded[0].double() - whole[0].double()).abs()
        assert (rounded <= MEANS_APART * unit + ULP * whole[0].double().abs()).all(), what
        assert ulps_apart(folded[2], whole[2]) <= VARIANCES_APART, what


def test_some_bits_differ() -> None:
    """So that nobody promises equal ones: on data of mean 0 hardly a mean is the same."""
    x = batches(0.0)[0]
    whole, folded = of_whole(x), of_parts(x, 2)
    assert (whole[0] == folded[0]).double().mean() < 0.5
    assert (whole[2] == folded[2]).double().mean() < 1
