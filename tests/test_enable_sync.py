"""fastnorm.enable and the operators that torch.nn.SyncBatchNorm is made of.

torch has them for CUDA alone. Enabled, ours answer on the CPU too: there they run as torch's module runs them, with two
parts of a batch for two ranks.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastnorm

EPS = 1e-5


def whole_statistics(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, 1 / sqrt(var + eps) and counts, folded as batch_norm_gather_stats_with_counts does."""
    means, rstds = zip(*(torch.batch_norm_stats(x, EPS) for x in parts), strict=True)
    counts = torch.tensor([x.numel() // x.shape[1] for x in parts], dtype=torch.int32)
    weights = (counts.double() / counts.sum())[:, None]
    mean = (torch.stack(means).double() * weights).sum(0)
    variances = torch.stack(rstds).double() ** -2 - EPS + (torch.stack(means).double() - mean) ** 2
    rstd = ((variances * weights).sum(0) + EPS).rsqrt()
    return mean.to(means[0].dtype), rstd.to(means[0].dtype), counts


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planar", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_steps_of_sync_batch_norm(dtype: torch.dtype, tolerance: float, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x, dy = (torch.randn(5, 6, 4, 7).to(dtype).to(memory_format=layout) for _ in range(2))
    norm = nn.BatchNorm2d(6, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    leaf = x.double().requires_grad_()
    y = norm(leaf)
    expected = [y.detach(), *torch.autograd.grad(y, [leaf, norm.weight, norm.bias], dy.double())]

    statistics_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = norm.weight.detach().to(statistics_dtype), norm.bias.detach().to(statistics_dtype)
    parts, gradients = x.split([2, 3]), dy.split([2, 3])
    with fastnorm.enabled("batch_norm"):
        mean, rstd, counts = whole_statistics(list(parts))
        assert mean.dtype == statistics_dtype
        outputs = [torch.batch_norm_elemt(part, weight, bias, mean, rstd, EPS) for part in parts]
        sums = [
            torch.batch_norm_backward_reduce(d, part, mean, rstd, weight, True, True, True)
            for d, part in zip(gradients, parts, strict=True)
        ]
        sum_dy, sum_dy_xmu, dweight, dbias = (sum(terms) for terms in zip(*sums, strict=True))
        dx = [
            torch.batch_norm_backward_elemt(d, part, mean, rstd, weight, sum_dy, sum_dy_xmu, counts)
            for d, part in zip(gradients, parts, strict=True)
        ]
    assert outputs[0].dtype == dx[0].dtype == dtype
    assert outputs[0].is_contiguous(memory_format=layout)
    for actual, exact in zip([torch.cat(outputs), torch.cat(dx), dweight, dbias], expected, strict=True):
        scale = max(1.0, exact.abs().max().item())
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=tolerance * scale)


def test_what_is_not_wanted_is_not_given() -> None:
    x = torch.randn(3, 4, 5)
    with fastnorm.enabled():
        mean, rstd = torch.batch_norm_stats(x, EPS)
        outputs = torch.batch_norm_backward_reduce(x, x, mean, rstd, None, False, False, True)
    assert [t is None for t in outputs] == [True, True, True, False]


def test_switched_off_torch_answers() -> None:
    with pytest.raises(NotImplementedError, match="batch_norm_stats"):
        torch.batch_norm_stats(torch.randn(3, 4, 5), EPS)
