"""torch.ops.fastnorm.norm, the op of an eager call: what it refuses, it refuses before a running statistic moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastnorm

ops = torch.ops.fastnorm
assert fastnorm.ops  # importing it registers the operators
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
SHARED = torch.rand(6)


def norm_args(**changes: Any) -> dict[str, Any]:
    """Valid arguments: a training step of a batch norm of 6 channels."""
    args: dict[str, Any] = {
        "x": torch.randn(2, 6, 4, 3),
        "weight": torch.rand(6),
        "bias": torch.rand(6),
        "residual": torch.randn(2, 6, 4, 3),
        "running_mean": torch.rand(6),
        "running_var": torch.rand(6),
        "num_batches_tracked": torch.tensor(3),
        "groups": 0,
        "normalized_dims": 0,
        "eps": 1e-5,
        "activation": 1,
        "activation_param": 0.01,
        "use_input_stats": True,
        "momentum": 0.1,
    }
    return args | changes


BAD: dict[str, dict[str, Any]] = {
    "x of one value per channel": {"x": torch.randn(1, 6, 1, 1), "residual": None},
    "x has one dim": {"x": torch.randn(6), "residual": None},
    "x is integer": {"x": torch.ones(2, 6, 4, 3, dtype=torch.int32)},
    "x is double": {"x": torch.randn(2, 6, 4, 3).double(), "residual": None},
    "x has other channels": {"x": torch.randn(2, 5, 4, 3), "residual": None},
    "weight too short": {"weight": torch.rand(5)},
    "bias too long": {"bias": torch.rand(7)},
    "weight and bias differ in dtype": {"weight": torch.rand(6).double()},
    "residual of another shape": {"residual": torch.randn(2, 6, 3, 4)},
    "residual of another dtype": {"residual": torch.randn(2, 6, 4, 3).half()},
    "mean too short": {"running_mean": torch.rand(5)},
    "mean divides the channels": {"running_mean": torch.rand(3), "running_var": torch.rand(3)},
    "var too long": {"running_var": torch.rand(12)},
    "mean without var": {"running_var": None},
    "var without mean": {"running_mean": None},
    "mean and var are one tensor": {"running_mean": SHARED, "running_var": SHARED},
    "mean overlaps itself": {"running_mean": torch.rand(1).expand(6)},
    "mean is half": {"running_mean": torch.rand(6).half(), "running_var": torch.rand(6).half()},
    "mean requires grad": {"running_mean": torch.rand(6, requires_grad=True)},
    "count of batches is float": {"num_batches_tracked": torch.tensor(3.0)},
    "count of batches has two elements": {"num_batches_tracked": torch.tensor([3, 4])},
    "cumulative without a count": {"momentum": None, "num_batches_tracked": None},
    "eps is zero": {"eps": 0.0},
    "group norm and layer norm": {"groups": 2, "normalized_dims": 1},
    "unknown activation": {"activation": 9},
    "statistics of a group norm": {"groups": 3},
    "statistics of a layer norm": {"normalized_dims": 1, "weight": torch.rand(3), "bias": torch.rand(3)},
    "no statistics to use": {"use_input_stats": False, "running_mean": None, "running_var": None},
    "frozen with negative eps": {"use_input_stats": False, "eps": -1.0},
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("changes", BAD.values(), ids=BAD.keys())
def test_refuses_and_leaves_the_buffers(changes: dict[str, Any], grad: bool) -> None:
    args = norm_args(**changes)
    if grad and args["x"].is_floating_point():
        args["x"] = args["x"].detach().requires_grad_()
    before = {name: args[name].clone() for name in BUFFERS if args[name] is not None}
    with pytest.raises(NotImplementedError) as caught:
        ops.norm(**args)
    assert "INTERNAL ASSERT" not in str(caught.value)
    for name, value in before.items():
        assert torch.equal(args[name], value), name


@pytest.mark.parametrize("frozen", [False, True])
def test_is_the_functional_ops_in_one(frozen: bool) -> None:
    """The same bits as norm_forward, update_running_stats_ and norm_backward."""
    args = norm_args(use_input_stats=not frozen)
    leaves = [args[name].requires_grad_() for name in ("x", "weight", "bias", "residual")]
    buffers = [args[name].clone() for name in BUFFERS]
    y = ops.norm(**args)
    dy = torch.randn_like(y)
    actual = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        x, weight, bias, residual = leaves
        mean, var = buffers[:2] if frozen else (None, None)
        expected_y, stats, mask = ops.norm_forward(x, weight, bias, residual, mean, var, 0, 0, 1e-5, 1, 0.01, True)
        common = (0, 0, 1e-5, 1, 0.01, frozen, [True, True, True])
        expected = ops.norm_backward(dy, x, weight, bias, None, stats, mask, *common)
        if not frozen:
            ops.update_running_stats_(*buffers, stats, 24, 0.1)
    assert torch.equal(y, expected_y)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(torch.equal(args[name], b) for name, b in zip(BUFFERS, buffers, strict=True))


def batch_args(**changes: Any) -> dict[str, Any]:
    """Valid arguments of batch_norm_forward_."""
    args = norm_args() | {"save_mask": True} | changes
    return {name: value for name, value in args.items() if name not in ("groups", "normalized_dims", "use_input_stats")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_batch_norm_forward_is_two_ops_in_one(momentum: float | None, dtype: torch.dtype) -> None:
    """The same bits as norm_forward and update_running_stats_; buffers may be views, and each may be absent."""
    x, residual = torch.randn(2, 2, 6, 4, 3).to(dtype).unbind()
    storage = torch.rand(5, 6, 2).to(dtype)
    weight, bias, mean, var = storage[:4, :, 0].unbind()
    for buffers in (
        [mean, var, torch.tensor(3)],
        [mean.clone(), var.clone(), torch.tensor(3)],
        [storage[2, :, 1], None, torch.tensor(3)],
        [None, None, torch.tensor(3)],
        [mean, var, None if momentum is not None else torch.tensor(0)],
    ):
        expected_buffers = [None if t is None else t.clone() for t in buffers]
        rest = storage[4].clone()
        given = {"x": x, "weight": weight, "bias": bias, "residual": residual, "momentum": momentum}
        actual = ops.batch_norm_forward_(**batch_args(**given, **dict(zip(BUFFERS, buffers, strict=True))))
        expected = ops.norm_forward(x, weight, bias, residual, None, None, 0, 0, 1e-5, 1, 0.01, True)
        ops.update_running_stats_(*expected_buffers, expected[1], 24, momentum)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        for name, a, b in zip(BUFFERS, buffers, expected_buffers, strict=True):
            assert a is b is None or torch.equal(a, b), name
        assert torch.equal(storage[4], rest)


def test_batch_norm_forward_of_an_empty_batch_counts_it() -> None:
    args = batch_args(x=torch.randn(0, 6, 4, 3), residual=None)
    before = args["running_mean"].clone(), args["running_var"].clone()
    y, stats, _ = ops.batch_norm_forward_(**args)
    assert y.shape == (0, 6, 4, 3) and not stats.any() and args["num_batches_tracked"].item() == 4
    assert torch.equal(args["running_mean"], before[0]) and torch.equal(args["running_var"], before[1])


# What `norm` alone refuses: the rules of torch.nn, and other kinds of norms.
OF_NORM_ALONE = {
    *("x of one value per channel", "mean without var", "var without mean", "mean is half", "mean requires grad"),
    *("eps is zero", "group norm and layer norm", "statistics of a group norm", "statistics of a layer norm"),
    *("no statistics to use", "frozen with negative eps"),
}


@pytest.mark.parametrize("name", [name for name in BAD if name not in OF_NORM_ALONE])
def test_batch_norm_forward_refuses_and_leaves_the_buffers(name: str) -> None:
    args = batch_args(**BAD[name])
    before = {name: args[name].clone() for name in BUFFERS if args[name] is not None}
    with pytest.raises(NotImplementedError) as caught:
        ops.batch_norm_forward_(**args)
    assert "INTERNAL ASSERT" not in str(caught.value)
    for buffer, value in before.items():
        assert torch.equal(args[buffer], value), buffer


def test_every_operator_is_known_here() -> None:
    """A new operator needs tests of what it refuses."""
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastnorm::")}
    assert names == {
        f"fastnorm::{name}"
        for name in (
            "norm",
            "norm_forward",
            "batch_norm_forward_",
            "norm_backward",
            "norm_backward_differentiable",
            "update_running_stats_",
            "moments",
            "normalize_images",  # test_images.py
            "batch_norm_partial",
            "batch_norm_fold_",
            "batch_norm_apply",
            "batch_norm_apply_synchronized",
            "batch_norm_backward_sums",
            "batch_norm_backward_apply",
        )
    }


def test_moments_refuses() -> None:
    for x in (torch.rand(3), torch.ones(2, 3, dtype=torch.int64), torch.rand(2, 3).to_sparse()):
        with pytest.raises(NotImplementedError):
            ops.moments(x)
    assert isinstance(ops.moments(torch.rand(2, 3))[0], Tensor)
