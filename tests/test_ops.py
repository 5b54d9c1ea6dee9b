"""torch.ops.fastnorm: results of the raw ops, and bad arguments refused before any memory is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

RELU, SILU = 1, 3
ops = torch.ops.fastnorm


def forward_args(**changes: Any) -> dict[str, Any]:
    """Valid arguments of norm_forward: a batch norm of 6 channels with frozen statistics."""
    args: dict[str, Any] = {
        "x": torch.randn(2, 6, 4, 3),
        "weight": torch.rand(6),
        "bias": torch.rand(6),
        "residual": torch.randn(2, 6, 4, 3),
        "mean": torch.rand(6),
        "var": torch.rand(6),
        "groups": 0,
        "normalized_dims": 0,
        "eps": 1e-5,
        "activation": RELU,
        "activation_param": 0.01,
        "save_mask": True,
    }
    return args | changes


def backward_args(**changes: Any) -> dict[str, Any]:
    """Valid arguments of norm_backward after forward_args in training."""
    forward = forward_args(mean=None, var=None)
    y, stats, mask = ops.norm_forward(**forward)
    names = ("x", "weight", "bias", "groups", "normalized_dims", "eps", "activation", "activation_param")
    args = {name: forward[name] for name in names}
    args |= {"dy": torch.randn_like(y), "residual": None, "stats": stats, "mask": mask}
    return args | {"frozen": False, "output_mask": [True, True, True]} | changes


def test_argument_order() -> None:
    """The schemas as fastnorm/ops.py and these tests call them."""
    forward = [a.name for a in ops.norm_forward.default._schema.arguments]
    assert forward == list(forward_args())
    backward = {a.name for a in ops.norm_backward.default._schema.arguments}
    assert backward == set(backward_args())
    assert not ops.norm_forward.default._schema.is_mutable
    assert not ops.norm_backward.default._schema.is_mutable
    assert ops.update_running_stats_.default._schema.is_mutable


BAD_FORWARD: dict[str, dict[str, Any]] = {
    "x has one dim": {"x": torch.randn(6)},
    "x is integer": {"x": torch.ones(2, 6, 4, 3, dtype=torch.int32)},
    "x is complex": {"x": torch.ones(2, 6, 4, 3, dtype=torch.complex64)},
    "x is double with float parameters": {"x": torch.randn(2, 6, 4, 3).double()},
    "weight too short": {"weight": torch.rand(5)},
    "weight too long": {"weight": torch.rand(7)},
    "weight of wrong dims": {"weight": torch.rand(6, 1)},
    "weight of another dtype": {"weight": torch.rand(6).double()},
    "weight and bias differ in dtype": {
        **{n: torch.randn(2, 6, 4, 3).bfloat16() for n in ("x", "residual")},
        "weight": torch.rand(6).bfloat16(),
    },
    "weight too narrow for x": {"weight": torch.rand(6).bfloat16(), "bias": None},
    "bias too short": {"bias": torch.rand(5)},
    "bias of another dtype": {"bias": torch.rand(6).half()},
    "residual of another shape": {"residual": torch.randn(2, 6, 3, 4)},
    "residual broadcast": {"residual": torch.randn(1, 6, 4, 3)},
    "residual of another dtype": {"residual": torch.randn(2, 6, 4, 3).bfloat16()},
    "mean without var": {"var": None},
    "var without mean": {"mean": None},
    "mean too short": {"mean": torch.rand(5)},
    "var too long": {"var": torch.rand(7)},
    "mean of another dtype": {"mean": torch.rand(6).double(), "var": torch.rand(6).double()},
    "mean and var differ in dtype": {"var": torch.rand(6).bfloat16()},
    "group norm and layer norm": {"groups": 2, "normalized_dims": 1, "mean": None, "var": None},
    "groups do not divide": {"groups": 4, "mean": None, "var": None},
    "negative groups": {"groups": -2, "mean": None, "var": None},
    "more groups than channels": {"groups": 12, "mean": None, "var": None},
    "statistics given to a group norm": {"groups": 2},
    "statistics given to a layer norm": {"normalized_dims": 1, "weight": None, "bias": None},
    "layer norm of negative dims": {"normalized_dims": -2, "mean": None, "var": None},
    "layer norm of channels in groups": {"normalized_dims": -1, "groups": 2, "mean": None, "var": None},
    "statistics given to a layer norm of channels": {"normalized_dims": -1},
    "layer norm of too many dims": {"normalized_dims": 5, "mean": None, "var": None},
    "layer norm with channel weights": {"normalized_dims": 1, "mean": None, "var": None},
    "unknown activation": {"activation": 9},
    "negative activation": {"activation": -1},
    "sparse x": {"x": torch.randn(2, 6, 4, 3).to_sparse()},
}


@pytest.mark.parametrize("changes", BAD_FORWARD.values(), ids=BAD_FORWARD.keys())
def test_forward_refuses(changes: dict[str, Any]) -> None:
    args = forward_args(**changes)
    with pytest.raises(NotImplementedError) as caught:
        ops.norm_forward(**args)
    assert "INTERNAL ASSERT" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("weight", {"weight": torch.rand(5)}),
        ("bias", {"bias": torch.rand(5)}),
        ("residual", {"residual": torch.randn(2, 6, 3, 4)}),
        ("mean", {"mean": torch.rand(5)}),
        ("var", {"var": torch.rand(5)}),
        ("groups", {"groups": 4, "mean": None, "var": None}),
        ("normalized_dims", {"normalized_dims": 7, "mean": None, "var": None}),
        ("activation", {"activation": 42}),
    ],
)
def test_message_names_the_argument(name: str, changes: dict[str, Any]) -> None:
    """The argument, what it is and what it should be."""
    with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
        ops.norm_forward(**forward_args(**changes))


def good_stats(sets: int = 6) -> Tensor:
    return torch.rand(4, sets)


BAD_BACKWARD: dict[str, dict[str, Any]] = {
    "dy of another shape": {"dy": torch.randn(2, 6, 3, 4)},
    "dy of another dtype": {"dy": torch.randn(2, 6, 4, 3).double()},
    "dy one element": {"dy": torch.randn(1)},
    "weight too short": {"weight": torch.rand(5)},
    "bias too long": {"bias": torch.rand(7)},
    "residual of another shape": {"residual": torch.randn(2, 6, 3, 4), "mask": torch.empty(0)},
    "stats of too few sets": {"stats": good_stats(5)},
    "stats of too many sets": {"stats": good_stats(12)},
    "stats of two rows": {"stats": good_stats()[:2]},
    "stats of one dim": {"stats": torch.rand(18)},
    "stats of another dtype": {"stats": good_stats().double()},
    "empty stats": {"stats": torch.empty(0)},
    "mask too short": {"mask": torch.zeros(1, dtype=torch.uint8)},
    "mask of another dtype": {"mask": torch.zeros(144)},
    "group norm and layer norm": {"groups": 2, "normalized_dims": 1},
    "groups do not divide": {"groups": 4},
    "stats of batch norm for group norm": {"groups": 3, "stats": good_stats(5)},
    "frozen group norm": {"groups": 3, "frozen": True, "stats": good_stats(6)},
    "unknown activation": {"activation": 11},
}


@pytest.mark.parametrize("changes", BAD_BACKWARD.values(), ids=BAD_BACKWARD.keys())
def test_backward_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError) as caught:
        ops.norm_backward(**backward_args(**changes))
    assert "INTERNAL ASSERT" not in str(caught.value)


def test_an_output_mask_of_two_is_no_call() -> None:
    with pytest.raises(RuntimeError, match="size 3"):
        ops.norm_backward(**backward_args(output_mask=[True, True]))


def update_args(**changes: Any) -> dict[str, Any]:
    args = {
        "running_mean": torch.rand(6),
        "running_var": torch.rand(6),
        "num_batches_tracked": torch.tensor(3),
        "stats": good_stats(),
        "count": 24,
        "momentum": 0.1,
    }
    return args | changes


SHARED = torch.rand(6)
SHARED_STATS = good_stats()
BAD_UPDATE: dict[str, dict[str, Any]] = {
    "mean too short": {"running_mean": torch.rand(5)},
    "var too long": {"running_var": torch.rand(7)},
    "mean of wrong dims": {"running_mean": torch.rand(6, 1)},
    "mean of integers": {"running_mean": torch.ones(6, dtype=torch.int64)},
    "stats of four sets": {"stats": good_stats(4)},
    "stats not a multiple": {"stats": good_stats(9)},
    "stats of two rows": {"stats": good_stats()[:2]},
    "stats of half": {"stats": good_stats().half()},
    "count of batches is float": {"num_batches_tracked": torch.tensor(3.0)},
    "count of batches has two elements": {"num_batches_tracked": torch.tensor([3, 4])},
    "negative count": {"count": -1},
    "cumulative without a count of batches": {"momentum": None, "num_batches_tracked": None},
    "mean and var are one tensor": {"running_mean": SHARED, "running_var": SHARED},
    "mean and var differ in size": {"running_var": torch.rand(3)},
    "mean is a row of stats": {"running_mean": SHARED_STATS[0], "stats": SHARED_STATS},
    "mean overlaps itself": {"running_mean": torch.rand(1).expand(6)},
}


@pytest.mark.parametrize("changes", BAD_UPDATE.values(), ids=BAD_UPDATE.keys())
def test_update_refuses_and_leaves_the_buffers(changes: dict[str, Any]) -> None:
    args = update_args(**changes)
    buffers = [args[n] for n in ("running_mean", "running_var", "num_batches_tracked")]
    before = [None if b is None else b.clone() for b in buffers]
    with pytest.raises(NotImplementedError) as caught:
        ops.update_running_stats_(**args)
    assert "INTERNAL ASSERT" not in str(caught.value)
    for buffer, value in zip(buffers, before, strict=True):
        if buffer is not None and buffer.device.type != "meta":
            assert torch.equal(buffer, value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_update(samples: int, momentum: float | None, dtype: torch.dtype) -> None:
    """Sets of the same channel are averaged, the variance made unbiased, the buffers moved in place."""
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    args = update_args(stats=torch.rand(4, 6 * samples, dtype=stats_dtype), momentum=momentum)
    mean, var, tracked = (
        args["running_mean"].to(dtype),
        args["running_var"].to(dtype),
        args["num_batches_tracked"],
    )
    args |= {"running_mean": mean, "running_var": var}
    factor = 0.25 if momentum is None else momentum  # the fourth batch
    stats = args["stats"].double().view(4, samples, 6).mean(1)
    expected_mean = torch.lerp(mean.double(), stats[0], factor)
    expected_var = torch.lerp(var.double(), stats[2] * 24 / 23, factor)
    ops.update_running_stats_(**args)
    torch.testing.assert_close(mean, expected_mean.to(dtype))
    torch.testing.assert_close(var, expected_var.to(dtype))
    assert tracked.item() == 4


def test_update_of_an_empty_batch_counts_and_nothing_else() -> None:
    args = update_args(count=0, stats=torch.full((4, 6), torch.nan))
    before = args["running_mean"].clone(), args["running_var"].clone()
    ops.update_running_stats_(**args)
    assert torch.equal(args["running_mean"], before[0])
    assert torch.equal(args["running_var"], before[1])
    assert args["num_batches_tracked"].item() == 4


def test_update_of_strided_buffers() -> None:
    """Buffers may be views of larger tensors; the rest of those stays."""
    storage = torch.rand(12, 2)
    args = update_args(running_mean=storage[::2, 0], running_var=storage[1::2, 0])
    column, dense = (
        storage[:, 1].clone(),
        update_args(
            running_mean=storage[::2, 0].clone(),
            running_var=storage[1::2, 0].clone(),
            stats=args["stats"],
        ),
    )
    ops.update_running_stats_(**args)
    ops.update_running_stats_(**dense)
    assert torch.equal(args["running_mean"], dense["running_mean"])
    assert torch.equal(args["running_var"], dense["running_var"])
    assert torch.equal(storage[:, 1], column)


def test_update_of_one_buffer() -> None:
    """Each of the three is optional."""
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        args = update_args()
        whole = {k: v.clone() if isinstance(v, Tensor) else v for k, v in args.items()}
        alone = {k: None if "running" in k or "tracked" in k else v for k, v in args.items()}
        ops.update_running_stats_(**whole)
        ops.update_running_stats_(**alone | {name: args[name]})
        assert torch.equal(args[name], whole[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 3), (2, 7, 5, 3), (3, 1, 401), (2, 3, 4, 5, 6)])
def test_moments(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 5).to(dtype)
    mean, var = ops.moments(x)
    exact = x.double().transpose(0, 1).reshape(shape[1], -1)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == var.dtype == accumulated
    torch.testing.assert_close(mean, exact.mean(1).to(accumulated))
    torch.testing.assert_close(var, exact.var(1, correction=0).to(accumulated))


def test_statistics_and_unneeded_outputs() -> None:
    """stats are mean, rstd, biased variance and the mean's lower digits; what is not asked for is empty."""
    args = forward_args(mean=None, var=None)
    y, stats, mask = ops.norm_forward(**args)
    sets = args["x"].transpose(0, 1).reshape(6, -1).double()
    var = sets.var(1, correction=0)
    expected = torch.stack([sets.mean(1), (var + 1e-5).rsqrt(), var])
    torch.testing.assert_close(stats[:3], expected.float())
    assert stats.shape[0] == 4 and float((stats[3] / stats[0]).abs().max()) < torch.finfo(torch.float32).eps
    assert mask.dtype == torch.uint8 and mask.dim() == 1 and mask.numel() > 0
    assert ops.norm_forward(**forward_args(save_mask=False))[2].numel() == 0
    assert ops.norm_forward(**forward_args(residual=None))[2].numel() == 0
    assert ops.norm_forward(**forward_args(activation=SILU))[2].numel() == 0
    for output_mask in ([True, False, False], [False, True, False], [False, False, True]):
        gradients = ops.norm_backward(**backward_args(output_mask=output_mask))
        dx, dw, db, dresidual = (g.numel() > 0 for g in gradients)
        assert [dx, dw, dresidual] == output_mask and dw == db
    assert y.shape == args["x"].shape


def test_mask_stands_in_for_the_residual() -> None:
    forward = forward_args(mean=None, var=None)
    _, stats, mask = ops.norm_forward(**forward)
    args = backward_args(x=forward["x"], weight=forward["weight"], bias=forward["bias"])
    args |= {"stats": stats, "mask": mask}
    masked = ops.norm_backward(**args)
    args |= {"residual": forward["residual"], "mask": mask[:0]}
    for a, b in zip(masked, ops.norm_backward(**args), strict=True):
        assert torch.equal(a, b)


def test_outputs_share_no_memory_with_inputs() -> None:
    args = forward_args(activation=0, weight=None, bias=None)
    outputs = ops.norm_forward(**args)
    inputs = {t.data_ptr() for t in args.values() if isinstance(t, Tensor)}
    assert not inputs & {t.data_ptr() for t in outputs if t.numel()}


def misaligned(t: Tensor) -> Tensor:
    """t's values at an address between two elements'."""
    memory = bytearray(t.nbytes + 1)
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=1).view(t.shape).copy_(t)


@pytest.mark.parametrize("name", ["x", "weight", "residual", "mean"])
def test_an_address_between_elements_is_refused(name: str) -> None:
    args = forward_args()
    with pytest.raises(RuntimeError, match=rf"\b{name} begins at .* expected a multiple of its elements' size"):
        ops.norm_forward(**args | {name: misaligned(args[name])})


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["weight", "bias", "residual", "mean", "var"])
def test_forward_refuses_another_device(name: str) -> None:
    args = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in forward_args().items()}
    with pytest.raises(RuntimeError, match=rf"\b{name} is .* on cpu, expected .* cuda:0"):
        ops.norm_forward(**args | {name: args[name].cpu()})


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_update_refuses_another_device(name: str) -> None:
    args = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in update_args().items()}
    with pytest.raises(RuntimeError, match=rf"\b{name} is .* on cpu, expected .* cuda:0"):
        ops.update_running_stats_(**args | {name: args[name].cpu()})
