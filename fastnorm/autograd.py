"""Derivatives of the operators, and the one door through which every norm calls them: `apply_norm`.

Host time counts here: a layer on a small tensor costs its Python. So an eager call lets the operator
check its own arguments: its RuntimeError, like our `Unserved`, sends the caller to torch's operators.
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
#: running_mean, running_var, num_batches_tracked, elements per set, momentum (None: cumulative)
RunningStats: TypeAlias = tuple[OptTensor, OptTensor, OptTensor, int, float | None]
#: kind, groups, eps, frozen, activation, activation_param
Config: TypeAlias = tuple[int, int, float, bool, int, float]
#: x, weight, bias, residual, stats, mask
Saved: TypeAlias = tuple[Tensor, OptTensor, OptTensor, OptTensor, Tensor, Tensor]
#: dx, dweight, dbias, dresidual
Gradients: TypeAlias = tuple[OptTensor, OptTensor, OptTensor, OptTensor]

_is_grad_enabled = torch.is_grad_enabled
_functorch_active = torch._C._are_functorch_transforms_active
_jit_tracing = torch._C._get_tracing_state
# What OpOverload.__call__ calls, less a Python frame (0.3 us).
_norm_forward = ops.norm_forward._op
_norm_backward = ops.norm_backward._op
_update_running_stats = ops.update_running_stats_._op


def require_plain(x: Tensor) -> None:
    """Raise Unserved unless x is an ordinary tensor, outside of all that needs torch's operators."""
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
    """act((x - mean) * rstd * weight + bias + residual), differentiable; moves running statistics.

    Arguments as `torch.ops.fastnorm.norm_forward`'s; without mean and var, x's own statistics. The
    caller has called `require_plain(x)`. RuntimeError, with nothing written, if the operator refuses.
    """
    compiling = is_compiling()
    if compiling:  # where the operator's refusal could not be caught
        refusal = ops.why_refused(x, weight, bias, residual, mean, var, kind, groups)
        if refusal is not None:
            raise Unserved(refusal)
    if _is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        config = (kind, groups, eps, mean is not None, activation, activation_param)
        if not compiling:
            return _apply_eager(x, weight, bias, residual, mean, var, running, config)
        y, stats, _ = NormFunction.apply(x, weight, bias, residual, mean, var, config)
    else:
        forward = ops.norm_forward if compiling else _norm_forward
        y, stats, _ = forward(
            x, weight, bias, residual, mean, var, kind, groups, eps, activation, activation_param, False
        )
    if running is not None:
        update = ops.update_running_stats_ if compiling else _update_running_stats
        running_mean, running_var, num_batches_tracked, count, momentum = running
        update(running_mean, running_var, num_batches_tracked, stats, count, momentum)
    return y
