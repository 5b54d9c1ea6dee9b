"""Derivatives of the operators, and the one door through which every norm calls them: `apply_norm`.

Host time counts here: a layer on a small tensor costs its Python. So an eager call is one operator, `norm`, whose
C++ checks the arguments and records the gradient (csrc/torch/autograd.cpp). Its RuntimeError, like our `Unserved`,
sends the caller to torch's operators. torch.compile sees the functional operators, and through them `NormFunction`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.compiler import is_compiling, is_exporting

from . import ops, reference
from .ops import KIND_BATCH, Unserved

OptTensor: TypeAlias = Tensor | None
#: kind, groups, eps, frozen, activation, activation_param
Config: TypeAlias = tuple[int, int, float, bool, int, float]
#: of dx, of dweight and dbias, of dresidual
Needs: TypeAlias = tuple[bool, bool, bool]
#: dx, dweight, dbias, dresidual
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]

_functorch_active = torch._C._are_functorch_transforms_active
_jit_tracing = torch._C._get_tracing_state
# What OpOverload.__call__ calls: a Python frame less.
_norm = ops.norm._op


def _transformed() -> bool:
    """A torch.func transform or forward-mode differentiation is under way."""
    return _functorch_active() or forward_ad._current_level >= 0


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
    running_mean: OptTensor,
    running_var: OptTensor,
    num_batches_tracked: OptTensor,
    kind: int,
    groups: int,
    use_input_stats: bool,
    momentum: float | None,
    eps: float,
    activation: int,
    activation_param: float,
) -> Tensor:
    """act((x - mean) * rstd * weight + bias + residual), differentiable.

    With use_input_stats the statistics are x's, and the running ones given are moved by momentum (None: so that they
    become the average over all batches); else the statistics are running_mean and running_var.
    The caller has called `require_plain(x)`. RuntimeError, with nothing written, for what the kernels do not serve.
    """
    apply = _apply_traced if is_compiling() else _norm
    return apply(
        x,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        num_batches_tracked,
        kind,
        groups,
        use_input_stats,
        momentum,
        eps,
        activation,
        activation_param,
    )


def _apply_traced(
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    running_mean: OptTensor,
    running_var: OptTensor,
    num_batches_tracked: OptTensor,
    kind: int,
    groups: int,
    use_input_stats: bool,
    momentum: float | None,
    eps: float,
    activation: int,
    param: float,
) -> Tensor:
    """apply_norm for torch.compile: functional operators, and all checks beforehand, as none could be caught."""
    refusal = ops.why_refused(x, weight, bias, residual, running_mean, running_var, kind, groups)
    if refusal is not None:
        raise Unserved(refusal)
    if not use_input_stats and running_mean is None:
        raise Unserved("there are no running statistics to use")
    if kind == KIND_BATCH and (eps < 0.0 or (use_input_stats and (eps == 0.0 or x.numel() <= x.shape[1]))):
        raise Unserved("eps is not positive, or a channel has a single value")
    if any(t is not None and t.requires_grad for t in (running_mean, running_var)):
        raise Unserved("running statistics require grad")
    mean, var = (None, None) if use_input_stats else (running_mean, running_var)
    save_mask = torch.is_grad_enabled()
    y, stats, _ = ops.norm_forward(
        x, weight, bias, residual, mean, var, kind, groups, eps, activation, param, save_mask
    )
    if use_input_stats and (running_mean is not None or num_batches_tracked is not None):
        count = x.numel() // stats.shape[1]
        ops.update_running_stats_(running_mean, running_var, num_batches_tracked, stats, count, momentum)
    return y  # type: ignore[no-any-return]


class NormFunction(Function):
    """`norm_forward` with its gradient: y, stats and mask, of which y is differentiable."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return ops.norm_forward(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, mean, _, kind, groups, eps, activation, param, _ = inputs
        _, stats, mask = output
        if activation == 0 or mask.numel() != 0:
            residual = None  # backward can do without
        ctx.mark_non_differentiable(stats, mask)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, residual, stats, mask)
        ctx.config = (kind, groups, eps, mean is not None, activation, param)

    @staticmethod
    def backward(ctx: Any, dy: OptTensor, *_: None) -> tuple[OptTensor, ...]:
        if dy is None:
            return (None,) * 12
        kind, groups, eps, frozen, activation, param = ctx.config
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        needs = [needs_x, needs_weight or needs_bias, needs_residual]
        if is_compiling() or not (torch.is_grad_enabled() or _transformed()):
            gradients = ops.norm_backward(dy, *ctx.saved_tensors, kind, groups, frozen, activation, param, needs)
        else:
            gradients = ops.norm_backward_differentiable(
                dy, *ctx.saved_tensors, kind, groups, eps, frozen, activation, param, needs
            )
        dx, dweight, dbias, dresidual = gradients
        if activation == 0:
            dresidual = dy
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            dresidual if needs_residual else None,
            *(None,) * 8,
        )


@torch.library.impl("fastnorm::norm_forward", "Autograd")
def _forward_with_gradient(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The functional operator is differentiable by itself: torch.compile takes it for one node, and traces into the
    Function further down. (In dynamo's own trace a Function fails where sizes are dynamic and norms form a chain.)"""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4]):
        return NormFunction.apply(*args)  # type: ignore[no-any-return]
    return NormFunction.forward(*args)


class NormBackwardFunction(Function):
    """`norm_backward` with its gradient: that of `reference.norm_backward`, differentiable for ever."""

    @staticmethod
    def forward(*args: Any) -> Gradients:
        *tensors, kind, groups, _, frozen, activation, param, needs = args
        return ops.norm_backward(*tensors, kind, groups, frozen, activation, param, needs)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:7])
        ctx.config = inputs[7:]

    @staticmethod
    def backward(ctx: Any, *gradients: OptTensor) -> tuple[OptTensor, ...]:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases: a derivative by x ends there, and does not go on to what dy was made of.
            inputs: list[Any] = [None if t is None else torch.ops.aten.alias(t) for t in ctx.saved_tensors]
            outputs = _reference_backward(*inputs, *ctx.config)
        used = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if output.requires_grad and gradient is not None
        ]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        result: list[OptTensor] = [None] * len(ctx.needs_input_grad)
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


@torch.library.impl("fastnorm::norm_backward_differentiable", "CompositeImplicitAutograd")
def _differentiable_backward(*args: Any) -> Gradients:
    if _transformed():
        return _reference_backward(*args)
    return NormBackwardFunction.apply(*args)  # type: ignore[no-any-return]


def _reference_backward(
    dy: Tensor,
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    stats: Tensor,
    mask: Tensor,
    kind: int,
    groups: int,
    eps: float,
    frozen: bool,
    activation: int,
    param: float,
    needs: Needs,
) -> Gradients:
    """`norm_backward` in torch's operators: differentiable again, and right under every transform."""
    if mask.numel() != 0:
        # Only the operator reads masks. What it makes of ones is the activation's slope.
        only_residual = (False, False, True)
        slope = ops.norm_backward(
            torch.ones_like(x), x, None, None, None, stats, mask, kind, groups, frozen, activation, param, only_residual
        )[3]
        dy = dy.to(stats.dtype)
        dy = torch.where(slope == 1, dy, dy * param if activation == ops.LEAKY_RELU else 0.0)
        residual, activation = None, 0
    mean, var = (stats[0], stats[2]) if frozen else (None, None)
    gradients = reference.norm_backward(dy, x, weight, bias, residual, mean, var, kind, groups, eps, activation, param)
    dx, dweight, dbias, dresidual = gradients
    none = x.new_empty(0)
    return dx, none if dweight is None else dweight, none if dbias is None else dbias, dresidual
