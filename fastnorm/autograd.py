"""Derivatives of the functional operators, first and higher. (Those of an eager call are csrc/torch/autograd.cpp's.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.compiler import is_compiling

from . import ops, reference
from .activations import CODES
from .ops import OptTensor, Settings

_LEAKY_RELU = CODES["leaky_relu"]

#: dx, dweight, dbias, dresidual
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
#: dx, dweight and dbias, dresidual
OutputMask: TypeAlias = tuple[bool, bool, bool]


def wants_differentiable_backward() -> bool:
    """Whether a backward that runs now is to be differentiated again."""
    return not is_compiling() and (torch.is_grad_enabled() or _transformed())


def _transformed() -> bool:
    """A torch.func transform or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class NormFunction(Function):
    """`norm_forward` with its gradient: y, stats and mask, of which y is differentiable."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return ops.norm_forward(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, mean, _, *settings, _ = inputs
        _, stats, mask = output
        activation = settings[3]
        if activation == 0 or mask.numel() != 0:
            residual = None  # backward can do without
        ctx.mark_non_differentiable(stats, mask)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, residual, stats, mask)
        ctx.settings = tuple(settings)
        ctx.frozen = mean is not None

    @staticmethod
    def backward(ctx: Any, dy: OptTensor, *_: None) -> tuple[OptTensor, ...]:
        if dy is None:
            return (None,) * 12
        op = ops.norm_backward_differentiable if wants_differentiable_backward() else ops.norm_backward
        gradients = op(dy, *ctx.saved_tensors, *ctx.settings, ctx.frozen, output_mask_of(ctx))
        return gradients_of_inputs(ctx, dy, gradients, ctx.settings[3])


def output_mask_of(ctx: Any) -> OutputMask:
    """What the backward of a Function of (x, weight, bias, residual, ...) has to compute."""
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    return needs_x, needs_weight or needs_bias, needs_residual


def gradients_of_inputs(ctx: Any, dy: Tensor, gradients: Gradients, activation: int) -> tuple[OptTensor, ...]:
    """What such a backward returns. Without an activation dresidual is dy, which the operators do not copy."""
    dx, dweight, dbias, dresidual = gradients
    every = (dx, dweight, dbias, dresidual if activation else dy)
    needed = (gradient if needs else None for gradient, needs in zip(every, ctx.needs_input_grad[:4], strict=True))
    return *needed, *(None,) * (len(ctx.needs_input_grad) - 4)


@torch.library.impl("fastnorm::norm_forward", "Autograd")
def _forward_with_gradient(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The functional operator is differentiable by itself: torch.compile takes it for one node, and traces into the
    Function further down. (In dynamo's own trace a Function fails where sizes are dynamic and norms form a chain.)"""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4]):
        return NormFunction.apply(*args)  # type: ignore[no-any-return]
    return NormFunction.forward(*args)


class MomentsFunction(Function):
    """`moments` with its gradient."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return ops.moments(x)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, dmean: OptTensor, dvar: OptTensor) -> OptTensor:
        """dx = dmean / n + (x - mean) * 2 dvar / n: of constants, an affine map, which a norm is that is frozen at
        variance 1."""
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        shift = torch.zeros_like(mean) if dmean is None else dmean / count
        slope = torch.zeros_like(mean) if dvar is None else dvar * (2 / count)
        if not is_compiling() and not wants_differentiable_backward():
            return ops.norm_forward(x, slope, shift, None, mean, torch.ones_like(mean), 0, 0, 0.0, 0, 0.0, False)[0]  # type: ignore[no-any-return]
        wide = (-1, *[1] * (x.dim() - 2))
        dx: Tensor = (x.to(mean.dtype) - mean.view(wide)) * slope.view(wide) + shift.view(wide)
        return dx.to(x.dtype)


@torch.library.impl("fastnorm::moments", "Autograd")
def _moments_with_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and x.requires_grad:
        return MomentsFunction.apply(x)  # type: ignore[no-any-return]
    return MomentsFunction.forward(x)


class NormBackwardFunction(Function):
    """`norm_backward` with its gradient: that of `reference.norm_backward`, differentiable any number of times."""

    @staticmethod
    def forward(*args: Any) -> Gradients:
        return ops.norm_backward(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:7])
        ctx.config = inputs[7:]

    @staticmethod
    def backward(ctx: Any, *gradients: OptTensor) -> tuple[OptTensor, ...]:
        return differentiate(_reference_backward, ctx, gradients)


def differentiate(
    reference: Callable[..., tuple[Tensor, ...]], ctx: Any, gradients: tuple[OptTensor, ...]
) -> tuple[OptTensor, ...]:
    """The backward of a Function that computes what `reference` does. ctx has saved its tensors, which come first, and
    `config`, which follows."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: a derivative by x ends there, and does not go on to what dy was made of.
        inputs: list[Any] = [None if t is None else torch.ops.aten.alias(t) for t in ctx.saved_tensors]
        outputs = reference(*inputs, *ctx.config)
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
    *rest: Any,
) -> Gradients:
    """`norm_backward` in torch's operators: differentiable again, and right under every transform."""
    *settings, frozen, _ = rest
    saved = mask if mask.numel() != 0 else None
    return reference_gradients(dy, x, weight, bias, residual, stats, saved, (*settings,), frozen)


def reference_gradients(
    dy: Tensor,
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    stats: Tensor,
    mask: OptTensor,
    settings: Settings,
    frozen: bool = False,
    ranks: reference.Ranks | None = None,
) -> Gradients:
    """`reference.norm_backward` of a call whose operator has saved a mask, or None; what has no parameter is empty."""
    if mask is not None:
        dy, settings = _apply_mask(dy, x, stats, mask, settings)
        residual = None
    mean, var = (stats[0], stats[2]) if frozen else (None, None)
    dx, dweight, dbias, dresidual = reference.norm_backward(dy, x, weight, bias, residual, mean, var, settings, ranks)
    none = x.new_empty(0)
    return dx, none if dweight is None else dweight, none if dbias is None else dbias, dresidual


def _apply_mask(dy: Tensor, x: Tensor, stats: Tensor, mask: Tensor, settings: Settings) -> tuple[Tensor, Settings]:
    """d = dy * act' by the mask, and the settings of the call without its activation."""
    groups, normalized_dims, eps, activation, param = settings
    # Only the operator reads masks. What it makes of ones is the activation's slope.
    only_residual: OutputMask = (False, False, True)
    ones = torch.ones_like(x)
    slope = ops.norm_backward(ones, x, None, None, None, stats, mask, *settings, False, only_residual)[3]
    dy = dy.to(stats.dtype)
    lower = dy * param if activation == _LEAKY_RELU else 0.0
    return torch.where(slope == 1, dy, lower), (groups, normalized_dims, eps, 0, param)
