"""Batch norm over the elements of several ranks: the exchange of statistics through torch.distributed.

    group_to_join(process_group)     the group to exchange with; None where this process is alone
    batch_norm(group, x, ...)        one call, differentiable: act((x - mean) * rstd * weight + bias + residual)

Forward, every rank takes the mean, variance and count of its own elements, gathers those of all ranks (one all_gather
of 3 C + 1 numbers) and merges them in the order of ranks (Chan, Golub & LeVeque 1979), so that all ranks have the same
statistics to the bit. Backward, it adds up the two sums per channel that dx depends on (one all_reduce of 2 C numbers).
The gradients of weight and bias are those of this rank's elements: DistributedDataParallel averages them, as it does
for torch.nn.SyncBatchNorm.

A rank whose batch is empty takes part in both. Its count is 0 on the device, where the merge leaves it out: no host
waits to learn it. Every rank has to make the same calls in the same order; one that does not makes the others wait
until torch.distributed's time-out.

The collectives are torch's functional ones, which torch.compile traces; eager calls make the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function

from . import ops, reference
from .autograd import (
    Gradients,
    OutputMask,
    differentiate,
    gradients_of_inputs,
    output_mask_of,
    reference_gradients,
    wants_differentiable_backward,
)
from .dispatch import Unsupported, check_call
from .ops import OptTensor

__all__ = ["batch_norm", "group_to_join"]

Group: TypeAlias = Any  # dist.ProcessGroup, of which a build without torch.distributed has none
_AVAILABLE = dist.is_available()


def group_to_join(process_group: Group | None) -> Group | None:
    """The group to exchange statistics with, `process_group` or (None) that of all processes. None where there is
    nobody else in it, torch.distributed is not initialized, or this process is no member. TypeError for anything but a
    group."""
    if not _AVAILABLE or not dist.is_initialized():
        return None
    group = dist.group.WORLD if process_group is None else process_group
    if group is None or group == dist.GroupMember.NON_GROUP_MEMBER:
        return None
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group is a {type(group).__name__}, expected a torch.distributed.ProcessGroup or None")
    return group if group.size() > 1 else None


def batch_norm(
    group: Group,
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    running_mean: OptTensor,
    running_var: OptTensor,
    num_batches_tracked: OptTensor,
    *call: Any,
) -> Tensor:
    """A batch norm in training over all ranks of `group`; its other arguments are those of a dispatch.Entry.

    x is (N, C, *) with the same C on all ranks and any N and *. Running statistics move once, by those of all elements.
    Where the kernels refuse: Unsupported, for torch.nn's own to take over, or RuntimeError on the CPU, where torch.nn
    has none; nothing is exchanged or written before.
    """
    groups, normalized_dims, eps, activation, param, _, momentum = call
    try:
        if eps <= 0:
            raise Unsupported(f"eps is {eps}, expected a positive one")
        settings = (groups, normalized_dims, eps, activation, param)
        check_call(x, weight, bias, residual, running_mean, running_var, settings)
    except Unsupported as refusal:
        if x.device.type != "cpu":
            raise
        raise RuntimeError(f"fastnorm.SyncBatchNorm: {refusal}") from None
    partial = ops.batch_norm_partial(x.detach())
    partials = all_gather(partial, group.size(), group.group_name)
    stats, count = ops.batch_norm_fold_(partials, running_mean, running_var, num_batches_tracked, eps, momentum)
    save_mask = torch.is_grad_enabled()
    y, _ = ops.batch_norm_apply_synchronized(
        x, weight, bias, residual, stats, count, eps, activation, param, save_mask, group.group_name
    )
    return y  # type: ignore[no-any-return]


# ---- the collectives, by the name of a group ----

_c10d = torch.ops._c10d_functional


def all_gather(t: Tensor, ranks: int, group: str) -> Tensor:
    """t (n,) of all ranks: (ranks, n)."""
    gathered: Tensor = _c10d.wait_tensor(_c10d.all_gather_into_tensor(t, ranks, group))
    return gathered.view(ranks, -1)


def all_reduce(t: Tensor, group: str) -> Tensor:
    """The sum of t over all ranks."""
    return _c10d.wait_tensor(_c10d.all_reduce(t, "sum", group))  # type: ignore[no-any-return]


class AllReduce(Function):
    """The same, differentiable any number of times: what a rank adds enters the result of every rank."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: str) -> Tensor:
        ctx.group = group
        return all_reduce(t.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return AllReduce.apply(gradient, ctx.group), None


# ---- the gradient ----


class SynchronizedApply(Function):
    """`batch_norm_apply` whose gradient by x goes through the statistics of all ranks: y and mask."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        x, weight, bias, residual, stats, _, _, activation, param, save_mask, _ = args
        with torch._C._AutoDispatchBelowAutograd():
            return ops.batch_norm_apply(  # type: ignore[no-any-return]
                x, weight, bias, residual, stats, activation, param, save_mask
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, residual, stats, count, eps, activation, param, save_mask, group = inputs
        _, mask = output
        # Of an empty batch the mask is empty, too: its rank joins in the collectives of the others.
        masked = save_mask and residual is not None and activation in ops.TWO_SIDED
        if activation == 0 or masked:
            residual = None  # backward can do without
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, residual, stats, mask if masked else None, count)
        ctx.config = (eps, activation, param, group)

    @staticmethod
    def backward(ctx: Any, dy: OptTensor, _: None) -> tuple[OptTensor, ...]:
        if dy is None:
            return (None,) * 11
        differentiable = wants_differentiable_backward()
        run: Callable[..., Gradients] = SynchronizedBackward.apply if differentiable else synchronized_backward
        gradients = run(dy, *ctx.saved_tensors, *ctx.config, output_mask_of(ctx))
        return gradients_of_inputs(ctx, dy, gradients, ctx.config[1])


@torch.library.impl("fastnorm::batch_norm_apply_synchronized", "Autograd")
def _apply_with_gradient(*args: Any) -> tuple[Tensor, Tensor]:
    """See autograd.py: torch.compile takes the operator for one node, and traces into the Function further down."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4]):
        return SynchronizedApply.apply(*args)  # type: ignore[no-any-return]
    return SynchronizedApply.forward(*args)


@torch.library.impl("fastnorm::batch_norm_apply_synchronized", "CompositeExplicitAutograd")
def _apply_without_gradient(*args: Any) -> tuple[Tensor, Tensor]:
    return SynchronizedApply.forward(*args)


def synchronized_backward(
    dy: Tensor,
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    stats: Tensor,
    mask: OptTensor,
    count: Tensor,
    eps: float,
    activation: int,
    param: float,
    group: str,
    output_mask: OutputMask,
) -> Gradients:
    """dx, dweight, dbias and dresidual; what is not wanted is empty."""
    wants_dx, wants_params, wants_dresidual = output_mask
    none = x.new_empty(0)
    call = (dy, x, weight, bias, residual, stats, none.to(torch.uint8) if mask is None else mask)
    dx = dweight = dbias = dresidual = none
    sums = ops.batch_norm_backward_sums(*call, activation, param) if wants_dx or wants_params else stats[:2]
    if wants_params and weight is not None:
        dweight = sums[1].to(weight.dtype, copy=True)
    if wants_params and bias is not None:
        dbias = sums[0].to(bias.dtype, copy=True)
    if wants_dx:
        sums = all_reduce(sums, group)
    if wants_dx or wants_dresidual:
        masks = [wants_dx, wants_dresidual]
        dx, dresidual = ops.batch_norm_backward_apply(*call, sums, count, activation, param, masks)
    return dx, dweight, dbias, dresidual


class SynchronizedBackward(Function):
    """`synchronized_backward` with its gradient: that of the same as a formula, differentiable any number of times."""

    @staticmethod
    def forward(*args: Any) -> Gradients:
        return synchronized_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:8])
        ctx.config = inputs[8:]

    @staticmethod
    def backward(ctx: Any, *gradients: OptTensor) -> tuple[OptTensor, ...]:
        return differentiate(_reference_backward, ctx, gradients)


def _reference_backward(
    dy: Tensor,
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    stats: Tensor,
    mask: OptTensor,
    count: Tensor,
    eps: float,
    activation: int,
    param: float,
    group: str,
    _: OutputMask,
) -> Gradients:
    """`synchronized_backward` in torch's operators and differentiable collectives."""
    ranks = reference.Ranks(lambda t: AllReduce.apply(t, group), count)
    settings = (0, 0, eps, activation, param)
    return reference_gradients(dy, x, weight, bias, residual, stats, mask, settings, ranks=ranks)
