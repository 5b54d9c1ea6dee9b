"""fastnorm.enable and the operators that torch.nn.SyncBatchNorm is made of.

torch has them for CUDA alone. Enabled, ours answer on the CPU too: they run as torch's module runs them, with two parts
of a batch for two ranks.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastnorm
from tests.common.aten_calls import Counted, described
from tests.test_enable import switched_off  # noqa: F401

EPS = 1e-5


def whole_statistics(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, 1 / sqrt(var + eps) and counts, folded by batch_norm_gather_stats_with_counts; on the CPU, where torch has
    none, as it does."""
    means, rstds = zip(*(torch.batch_norm_stats(x, EPS) for x in parts), strict=True)
    counts = torch.tensor([x.numel() // x.shape[1] for x in parts], dtype=torch.int32, device=parts[0].device)
    if parts[0].is_cuda:
        running = torch.zeros(2, parts[0].shape[1]).to(means[0])  # without them the dtype of counts would be x's
        gathered = (torch.stack(means), torch.stack(rstds), *running, 0.1, EPS, counts.to(means[0].dtype))
        mean, rstd = torch.batch_norm_gather_stats_with_counts(parts[0], *gathered)
        return mean, rstd, counts
    weights = (counts.double() / counts.sum())[:, None]
    mean = (torch.stack(means).double() * weights).sum(0)
    variances = torch.stack(rstds).double() ** -2 - EPS + (torch.stack(means).double() - mean) ** 2
    rstd = ((variances * weights).sum(0) + EPS).rsqrt()
    return mean.to(means[0].dtype), rstd.to(means[0].dtype), counts


def steps(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """What the two ranks together have after a training step."""
    parts, gradients = x.split([2, 3]), dy.split([2, 3])
    mean, rstd, counts = whole_statistics(list(parts))
    outputs = [torch.batch_norm_elemt(part, weight, bias, mean, rstd, EPS) for part in parts]
    sums = [
        torch.batch_norm_backward_reduce(d, part, mean, rstd, weight, True, True, True)
        for d, part in zip(gradients, parts, strict=True)
    ]
    sum_dy, sum_dy_xmu, dweight, dbias = (a + b for a, b in zip(*sums, strict=True))
    dx = [
        torch.batch_norm_backward_elemt(d, part, mean, rstd, weight, sum_dy, sum_dy_xmu, counts)
        for d, part in zip(gradients, parts, strict=True)
    ]
    assert outputs[0].stride() == dx[0].stride() == parts[0].stride()
    results = {"y": torch.cat(outputs), "dx": torch.cat(dx), "dweight": dweight, "dbias": dbias}
    return results | {"mean": mean, "rstd": rstd, "sum_dy": sum_dy, "sum_dy_xmu": sum_dy_xmu}


def arguments(dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> tuple[Tensor, ...]:
    """x, dy, weight, bias. Those of torch.nn.SyncBatchNorm: parameters of a half x are float32."""
    torch.manual_seed(0)
    x, dy = (torch.randn(5, 6, 4, 7).to(device, dtype).to(memory_format=layout) for _ in range(2))
    weight, bias = torch.randn(2, 6).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    return x, dy, weight, bias


LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planar", "last"])
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)


def assert_within(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    scale = max(1.0, expected.double().abs().max().item())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale, msg=what)


@LAYOUTS
@DTYPES
def test_steps_of_sync_batch_norm(
    dtype: torch.dtype, tolerance: float, layout: torch.memory_format, device: torch.device
) -> None:
    x, dy, weight, bias = arguments(dtype, layout, device)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = torch.nn.functional.batch_norm(leaves[0], None, None, *leaves[1:], training=True, eps=EPS)
    exact = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
    with fastnorm.enabled("batch_norm"):
        ours = steps(x, dy, weight, bias)
    assert ours["y"].dtype == ours["dx"].dtype == dtype
    assert ours["mean"].dtype == weight.dtype
    assert ours["y"].is_contiguous(memory_format=layout)
    for name, expected in zip(("y", "dx", "dweight", "dbias"), exact, strict=True):
        assert_within(ours[name], expected, tolerance, name)


@pytest.mark.cuda
@LAYOUTS
@DTYPES
def test_steps_are_torchs_on_a_gpu(dtype: torch.dtype, tolerance: float, layout: torch.memory_format) -> None:
    """Dtypes, shapes, strides and values of each step; those that walk x are served, the fold is torch's."""
    call = arguments(dtype, layout, torch.device("cuda"))
    torchs = steps(*call)
    with fastnorm.enabled("batch_norm"), Counted() as counted:
        ours = steps(*call)
    walks = ("batch_norm_stats", "batch_norm_elemt", "batch_norm_backward_reduce", "batch_norm_backward_elemt")
    assert +counted.served == dict.fromkeys(walks, 2)
    assert not +counted.left
    for name, expected in torchs.items():
        assert described(ours[name]) == described(expected), name
        assert_within(ours[name], expected, tolerance, name)


def test_what_is_not_wanted_is_not_given(device: torch.device) -> None:
    x = torch.randn(3, 4, 5, device=device)
    with fastnorm.enabled():
        mean, rstd = torch.batch_norm_stats(x, EPS)
        outputs = torch.batch_norm_backward_reduce(x, x, mean, rstd, None, False, False, True)
    assert [t is None for t in outputs] == [True, True, True, False]


def test_switched_off_torch_answers() -> None:
    with pytest.raises(NotImplementedError, match="batch_norm_stats"):
        torch.batch_norm_stats(torch.randn(3, 4, 5), EPS)
