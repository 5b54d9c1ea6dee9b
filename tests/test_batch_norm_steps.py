"""Batch norm in steps (batch_norm_partial, fold_, apply, backward_sums, backward_apply) in one process: the parts of a
batch stand for ranks."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnorm import ops
from fastnorm.activations import CODES
from tests.common.cases import make_data
from tests.common.numerics import assert_alike

EPS = 1e-4
Sizes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    rest: Sizes
    cuts: Sizes
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    activation: str | None = None
    residual: bool = False

    @property
    def id(self) -> str:
        last = "-last" if self.channels_last else ""
        return f"{self.cuts}x{self.rest}-{self.dtype}{last}-{self.activation}-{self.residual}".replace(" ", "")


def calls() -> list[Call]:
    shapes = [
        ((5, 7, 7), (4, 2)),
        ((8, 4, 4), (20, 0, 21)),
        ((3, 20, 20), (2, 1)),
        ((6,), (5, 1, 1)),
        ((70, 3, 3), (9, 8)),
    ]
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float64, torch.float16))
    epilogues = ((None, False), ("relu", True), ("silu", True), ("leaky_relu", False), ("relu", False))
    return [
        Call(rest, cuts, next(dtypes), last, activation, residual)
        for rest, cuts in shapes
        for last in ((False, True) if len(rest) == 3 else (False,))
        for activation, residual in epilogues
    ]


def make(call: Call, device: torch.device, seed: int) -> Tensor:
    t = torch.randn(sum(call.cuts), *call.rest, generator=torch.Generator().manual_seed(seed)) + seed
    if call.channels_last:
        t = t.to(memory_format=torch.channels_last)
    return t.to(device, call.dtype)


def parameters(call: Call, device: torch.device) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if call.dtype == torch.float64 else torch.float32
    channels = call.rest[0]
    return torch.linspace(0.5, 2, channels).to(device, dtype), torch.linspace(-1, 1, channels).to(device, dtype)


def parts_of(t: Tensor | None, cuts: Sizes) -> list[Any]:
    return [None] * len(cuts) if t is None else list(t.split(list(cuts)))


def fold(x: Tensor, cuts: Sizes, *running: Any, momentum: float | None = 0.1) -> tuple[Tensor, Tensor]:
    partials = torch.stack([ops.batch_norm_partial(part) for part in parts_of(x, cuts)])
    return ops.batch_norm_fold_(partials, *(running or (None,) * 3), EPS, momentum)  # type: ignore[no-any-return]


@pytest.mark.emulated
@pytest.mark.parametrize("call", calls(), ids=lambda call: call.id)
def test_like_one_call(call: Call, device: torch.device) -> None:
    x, dy = make(call, device, 1), make(call, device, 0)
    residual = make(call, device, 2) if call.residual else None
    weight, bias = parameters(call, device)
    settings = (CODES[call.activation] if call.activation else 0, 0.01)
    y, whole_stats, mask = ops.norm_forward(x, weight, bias, residual, None, None, 0, 0, EPS, *settings, True)
    whole = ops.norm_backward(
        dy, x, weight, bias, residual, whole_stats, mask, 0, 0, EPS, *settings, False, [True, True, True]
    )

    stats, count = fold(x, call.cuts)
    assert count.item() == x.numel() / x.shape[1] and count.dtype == torch.float64
    tensors = [parts_of(t, call.cuts) for t in (dy, x, residual)]
    outputs, partial_sums = [], []
    for dy_part, x_part, added in zip(*tensors, strict=True):
        outputs.append(ops.batch_norm_apply(x_part, weight, bias, added, stats, *settings, True))
        own_mask = outputs[-1][1]
        partial_sums.append(
            ops.batch_norm_backward_sums(dy_part, x_part, weight, bias, added, stats, own_mask, *settings)
        )
    sums = torch.stack(partial_sums).sum(0)
    gradients = [
        ops.batch_norm_backward_apply(
            dy_part, x_part, weight, bias, added, stats, own_mask, sums, count, *settings, [True, True]
        )
        for dy_part, x_part, added, (_, own_mask) in zip(*tensors, outputs, strict=True)
    ]
    assert_alike(stats[:3], whole_stats[:3])
    assert_alike(torch.cat([y_part for y_part, _ in outputs]), y)
    assert_alike(torch.cat([dx for dx, _ in gradients]), whole[0])
    assert_alike(sums[1].to(weight.dtype), whole[1])
    assert_alike(sums[0].to(bias.dtype), whole[2])
    if call.activation:
        assert_alike(torch.cat([dresidual for _, dresidual in gradients]), whole[3])
    else:
        assert all(dresidual.numel() == 0 for _, dresidual in gradients)


# ---- statistics ----


@pytest.mark.parametrize("channels_last", [False, True])
def test_equal_splits_of_exact_numbers_give_the_same_bits(channels_last: bool) -> None:
    """Sums of small integers are exact, whatever their order, and so are the variances of parts that are no smaller
    than these: what is left are the formulas. (The CUDA kernels have two formulas for rstd.)"""
    x = make_integers((16, 6, 8, 8), torch.device("cpu"))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    whole = ops.norm_forward(x, None, None, None, None, None, 0, 0, EPS, 0, 0.0, False)[1]
    for ranks in (1, 2, 4):
        stats, _ = fold(x, (16 // ranks,) * ranks)
        assert torch.equal(stats[:3], whole[:3]), ranks


def make_integers(shape: Sizes, device: torch.device) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).float().to(device)


@pytest.mark.emulated
@pytest.mark.parametrize("kind", ["normal", "offset"])
def test_statistics_to_a_few_ulp(kind: str, device: torch.device) -> None:
    """Against float64; the mean and its low part together have more digits than float32."""
    x = make_data(kind, (12, 5, 9, 11), torch.float32, seed=1).to(device)
    exact = x.double().transpose(0, 1).flatten(1)
    var, mean = torch.var_mean(exact, 1, correction=0)
    for cuts in ((4, 4, 4), (6, 6), (1, 11), (5, 0, 7)):
        stats, _ = fold(x, cuts)
        ulp = torch.finfo(torch.float32).eps
        assert torch.allclose(stats[0].double(), mean, rtol=ulp, atol=ulp * float(var.sqrt().max()))
        assert torch.allclose(
            stats[0].double() + stats[3].double(), mean, rtol=0, atol=2 * ulp * float(var.sqrt().max())
        )
        assert torch.allclose(stats[2].double(), var, rtol=3 * ulp, atol=0)
        assert torch.allclose(stats[1].double(), (var + EPS).rsqrt(), rtol=3 * ulp, atol=0)


@pytest.mark.emulated
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics(momentum: float | None, device: torch.device) -> None:
    """They move as update_running_stats_ moves them by one big batch."""
    x = make_integers((8, 5, 4, 4), device)
    ours, whole = (
        (torch.full((5,), 0.5, device=device), torch.full((5,), 2.0, device=device), torch.tensor(3, device=device))
        for _ in range(2)
    )
    stats, _ = fold(x, (2, 0, 6), *ours, momentum=momentum)
    ops.update_running_stats_(*whole, stats, 8 * 16, momentum)
    assert [torch.equal(a, b) for a, b in zip(ours, whole, strict=True)] == [True] * 3
    assert ours[2].item() == 4


@pytest.mark.emulated
def test_without_elements(device: torch.device) -> None:
    """Statistics are zeros, and only num_batches_tracked moves; a single value has no unbiased variance."""
    mean, var, batches = (torch.full((3,), 0.5, device=device), torch.full((3,), 2.0, device=device), None)
    batches = torch.tensor(0, device=device)
    x = torch.randn(1, 3, device=device)
    stats, count = fold(x[:0], (0, 0), mean, var, batches)
    assert not stats.any() and count.item() == 0
    assert mean.eq(0.5).all() and var.eq(2).all() and batches.item() == 1
    stats, count = fold(x, (0, 1, 0), mean, var, batches)
    assert torch.equal(stats[0], x[0]) and not stats[2].any() and count.item() == 1
    assert not mean.eq(0.5).any() and var.eq(2).all() and batches.item() == 2


@pytest.mark.emulated
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel(value: float, device: torch.device) -> None:
    x = torch.randn(4, 3, 5, device=device)
    x[3, 1, 2] = value
    stats, _ = fold(x, (2, 2))
    assert stats[:, [0, 2]].isfinite().all()
    assert stats[2, 1].isnan() and not stats[0, 1].isfinite()


# ---- arguments ----


def apply_args(**changes: Any) -> dict[str, Any]:
    x = torch.randn(2, 6, 4, 3)
    args = {"x": x, "weight": torch.rand(6), "bias": torch.rand(6), "residual": torch.randn(2, 6, 4, 3)}
    args |= {"stats": torch.rand(4, 6), "activation": 1, "activation_param": 0.01, "save_mask": True}
    return args | changes


def backward_args(**changes: Any) -> dict[str, Any]:
    args = apply_args(residual=None)
    _, mask = ops.batch_norm_apply(**apply_args())
    del args["save_mask"]
    args |= {"dy": torch.randn(2, 6, 4, 3), "mask": mask, "sums": torch.randn(2, 6)}
    args |= {"count": torch.tensor([24.0], dtype=torch.float64), "output_mask": [True, True]}
    return args | changes


def fold_args(**changes: Any) -> dict[str, Any]:
    args = {"partials": torch.rand(3, 19), "running_mean": torch.zeros(6), "running_var": torch.ones(6)}
    return args | {"num_batches_tracked": torch.tensor(0), "eps": EPS, "momentum": 0.1} | changes


BAD = [
    ("batch_norm_partial", "x", {"x": torch.rand(3)}),
    ("batch_norm_partial", "x", {"x": torch.ones(3, 2, dtype=torch.int32)}),
    ("batch_norm_apply", "stats", apply_args(stats=torch.rand(4, 5))),
    ("batch_norm_apply", "stats", apply_args(stats=torch.rand(3, 6))),
    ("batch_norm_apply", "stats", apply_args(stats=torch.rand(6, 4).t())),
    ("batch_norm_apply", "stats", apply_args(stats=torch.rand(4, 6).double())),
    ("batch_norm_apply", "weight", apply_args(weight=torch.rand(7))),
    ("batch_norm_apply", "residual", apply_args(residual=torch.rand(2, 6, 4, 4))),
    ("batch_norm_apply", "activation", apply_args(activation=99)),
    ("batch_norm_backward_apply", "sums", backward_args(sums=torch.rand(2, 5))),
    ("batch_norm_backward_apply", "sums", backward_args(sums=torch.rand(6, 2).t())),
    ("batch_norm_backward_apply", "sums", backward_args(sums=torch.rand(2, 6).bfloat16())),
    ("batch_norm_backward_apply", "count", backward_args(count=torch.tensor([24.0]))),
    ("batch_norm_backward_apply", "count", backward_args(count=torch.rand(2).double())),
    ("batch_norm_backward_apply", "mask", backward_args(mask=torch.zeros(1, dtype=torch.uint8))),
    ("batch_norm_backward_apply", "dy", backward_args(dy=torch.rand(2, 6, 4, 4))),
    ("batch_norm_fold_", "partials", fold_args(partials=torch.rand(3, 18))),
    ("batch_norm_fold_", "partials", fold_args(partials=torch.rand(19))),
    ("batch_norm_fold_", "partials", fold_args(partials=torch.rand(3, 19).half())),
    ("batch_norm_fold_", "partials", fold_args(partials=torch.rand(19, 3).t())),
    ("batch_norm_fold_", "running_mean", fold_args(running_mean=torch.zeros(5))),
    ("batch_norm_fold_", "running statistics", fold_args(running_mean=torch.zeros(3), running_var=torch.zeros(3))),
    ("batch_norm_fold_", "num_batches_tracked", fold_args(num_batches_tracked=None, momentum=None)),
]


@pytest.mark.parametrize(("name", "argument", "args"), BAD)
def test_refuses(name: str, argument: str, args: dict[str, Any]) -> None:
    """Before anything is written; the message names the argument."""
    kept = {key: value.clone() for key, value in args.items() if isinstance(value, Tensor)}
    with pytest.raises(NotImplementedError, match=argument):
        getattr(ops, name)(**args)
    assert all(torch.equal(args[key], value) for key, value in kept.items())


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual: bool) -> None:
    """Schemas, fake kernels: shapes, strides and dtypes are those of the real ones."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    added = torch.randn(2, 6, 4, 3) if residual else None
    x = torch.randn(2, 6, 4, 3).to(memory_format=torch.channels_last)
    apply, folded = apply_args(x=x, residual=added), fold_args()
    _, mask = ops.batch_norm_apply(**apply)
    backward = backward_args(x=x, mask=mask)
    sums = {key: value for key, value in backward.items() if key not in ("sums", "count", "output_mask")}
    torch.library.opcheck(ops.batch_norm_partial, (x,), test_utils=tests)
    torch.library.opcheck(ops.batch_norm_fold_, (), folded, test_utils=tests)
    torch.library.opcheck(ops.batch_norm_apply, (), apply, test_utils=tests)
    torch.library.opcheck(ops.batch_norm_backward_sums, (), sums, test_utils=tests)
    torch.library.opcheck(ops.batch_norm_backward_apply, (), backward, test_utils=tests)
