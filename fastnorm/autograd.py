"""Derivatives of the operators, and the one door through which every norm calls them: `apply_norm`.

Host time counts here: a layer on a small tensor costs its Python. So an eager call lets the operator check its own
arguments: its RuntimeError, like our `Unserved`, sends the caller to torch's operators.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.compiler import is_compiling, is_exporting

from . import ops, reference
from .ops import Unserved

OptTensor: TypeAlias = Tensor | None
#: running_mean, running_var, num_batches_tracked, elements per set, momentum (None: cumulative average)
RunningStats: TypeAlias = tuple[OptTensor, OptTensor, OptTensor, int, float | None]
#: kind, groups, eps, frozen, activation, activation_param
Config: TypeAlias = tuple[int, int, float, bool, int, float]
#: of dx, of dweight and dbias, of dresidual
Needs: TypeAlias = tuple[bool, bool, bool]
#: dx, dweight, dbias, dresidual
Gradients: TypeAlias = tuple[OptTensor, OptTensor, OptTensor, OptTensor]

_functorch_active = torch._C._are_functorch_transforms_active
_jit_tracing = torch._C._get_tracing_state


def require_plain(x: Tensor) -> None:
    """Raise Unserved unless x is an ordinary tensor, outside of everything that must see torch's operators."""
    if is_compiling():
        if is_exporting():
            raise Unserved("an exported program should need nothing but torch")
    elif type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        raise Unserved(f"x is a {type(x).__name__}, not a plain Tensor")
    elif _jit_tracing() is not None:
        raise Unserved("torch.jit.trace records torch's operators")
    if _functorch_active():
        raise Unserved("a torch.func transform is active")
    if forward_ad._current_level >= 0:
        raise Unserved("forward-mode differentiation is active")


def apply_norm(
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    mean: OptTensor,
    var: OptTensor,
    running: RunningStats | None,
    kind: int,
    groups: int,
    eps: float,
    activation: int,
    activation_param: float,
) -> Tensor:
    """act((x - mean) * rstd * weight + bias + residual), differentiable; then moves the running statistics.

    Arguments as `torch.ops.fastnorm.norm_forward`'s; without mean and var, the statistics are x's own. The caller has
    called `require_plain(x)`. RuntimeError, with nothing written, if the operator refuses its arguments.
    """
    compiling = is_compiling()
    if compiling:  # where the operator's refusal could not be caught
        refusal = ops.why_refused(x, weight, bias, residual, mean, var, kind, groups)
        if refusal is not None:
            raise Unserved(refusal)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        config = (kind, groups, eps, mean is not None, activation, activation_param)
        if not compiling:
            return _apply(x, weight, bias, residual, mean, var, running, config)[0]  # type: ignore[no-any-return]
        y, stats, _ = NormFunction.apply(x, weight, bias, residual, mean, var, None, config)
    else:
        y, stats, _ = ops.norm_forward(
            x, weight, bias, residual, mean, var, kind, groups, eps, activation, activation_param, False
        )
    if running is not None:
        _update(running, stats)
    return y


def _update(running: RunningStats, stats: Tensor) -> None:
    running_mean, running_var, num_batches_tracked, count, momentum = running
    ops.update_running_stats_(running_mean, running_var, num_batches_tracked, stats, count, momentum)


class NormFunction(Function):
    """`norm_forward` with its gradient: y, stats and mask, of which y is differentiable.

    Running statistics move inside forward, before anything is saved: the recomputation of a checkpoint stops at the
    last tensor saved, and has to have moved them by then as torch.nn's norms have.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: OptTensor,
        bias: OptTensor,
        residual: OptTensor,
        mean: OptTensor,
        var: OptTensor,
        running: RunningStats | None,
        config: Config,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind, groups, eps, _, activation, param = config
        y, stats, mask = ops.norm_forward(
            x, weight, bias, residual, mean, var, kind, groups, eps, activation, param, True
        )
        if running is not None:
            _update(running, stats)
        return y, stats, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, _, _, _, config = inputs
        _, stats, mask = output
        ctx.mark_non_differentiable(stats, mask)
        ctx.set_materialize_grads(False)
        ctx.config = config
        ctx.bias = None
        if config[4] == 0:
            # Backward wants the bias's shape and the residual's not at all: both may be changed before.
            ctx.bias, bias, residual = bias, None, None
        elif mask.numel() != 0:
            residual = None
        ctx.save_for_backward(x, weight, bias, residual, stats, mask)

    @staticmethod
    def backward(ctx: Any, dy: OptTensor, *_: None) -> tuple[OptTensor, ...]:
        if dy is None:
            return (None,) * 8
        x, weight, bias, residual, stats, mask = ctx.saved_tensors
        config = ctx.config
        if config[4] == 0:
            bias = ctx.bias
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        needs = (needs_x, needs_weight or needs_bias, needs_residual)
        backward = _backward
        if not is_compiling():
            if _functorch_active() or forward_ad._current_level >= 0:
                backward = _reference_backward
            elif torch.is_grad_enabled():
                backward = _apply_backward
        dx, dweight, dbias, dresidual = backward(dy, x, weight, bias, residual, stats, mask, config, needs)
        if config[4] == 0:
            dresidual = dy
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            dresidual if needs_residual else None,
            *(None,) * 4,
        )


class NormBackwardFunction(Function):
    """`norm_backward` with its gradient: that of `reference.norm_backward`, differentiable for ever."""

    @staticmethod
    def forward(*args: Any) -> Gradients:
        return _backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:7])
        ctx.config, ctx.needs = inputs[7:]

    @staticmethod
    def backward(ctx: Any, *gradients: OptTensor) -> tuple[OptTensor, ...]:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views: a derivative by x ends there, and does not go on to what dy was made of.
            inputs: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            outputs = _reference_backward(*inputs, ctx.config, ctx.needs)
        used = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if output is not None and output.requires_grad and gradient is not None
        ]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        result: list[OptTensor] = [None] * 9
        if used:
            derivatives = torch.autograd.grad(
                [output for output, _ in used],
                [inputs[i] for i in wanted],
                [gradient for _, gradient in used],
                create_graph=create_graph,
                allow_unused=True,
            )
            for i, derivative in zip(wanted, derivatives, strict=True):
                result[i] = derivative
        return tuple(result)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    stats: Tensor,
    mask: Tensor,
    config: Config,
    needs: Needs,
) -> Gradients:
    """By the operator; gradients that are not needed are empty."""
    kind, groups, _, frozen, activation, param = config
    return ops.norm_backward(  # type: ignore[no-any-return]
        dy, x, weight, bias, residual, stats, mask, kind, groups, frozen, activation, param, needs
    )


def _reference_backward(
    dy: Tensor,
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    stats: Tensor,
    mask: Tensor,
    config: Config,
    needs: Needs,
) -> Gradients:
    """The same in torch's operators: differentiable again, and right under every transform."""
    kind, groups, eps, frozen, activation, param = config
    if mask.numel() != 0:
        # Only the operator reads masks. What it makes of ones is the activation's slope.
        ones = torch.ones_like(x)
        slope = _backward(ones, x, None, None, None, stats, mask, config, (False, False, True))[3]
        dy = dy.to(stats.dtype)
        dy = torch.where(slope == 1, dy, dy * param if activation == ops.LEAKY_RELU else 0.0)
        residual, activation = None, 0
    mean, var = (stats[0], stats[2]) if frozen else (None, None)
    return reference.norm_backward(
        dy, x, weight, bias, residual, mean, var, kind, groups, eps, activation, param
    )


# What Function.apply comes down to outside of torch.func. It would first bind the arguments with inspect.signature,
# which takes longer than all the rest that a small layer does.
_apply: Any = super(Function, NormFunction).apply
_apply_backward: Any = super(Function, NormBackwardFunction).apply
