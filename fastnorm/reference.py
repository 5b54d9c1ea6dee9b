"""The operators' contract in torch's own operators: slow, differentiable any number of times, vmap-able.

Serves double backward and whatever autograd asks for under a transform, and is what tests compare with.
Everything is computed in float32 (float64 for float64) and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import ACTIVATIONS, KIND_BATCH, KIND_GROUP, KIND_LAYER, accumulation_dtype

aten = torch.ops.aten

# act(z, param)
_ACTIVATE: dict[str | None, Callable[[Tensor, float], Tensor]] = {
    None: lambda z, param: z,
    "relu": lambda z, param: F.relu(z),
    "leaky_relu": lambda z, param: F.leaky_relu(z, param),
    "silu": lambda z, param: F.silu(z),
    "gelu": lambda z, param: F.gelu(z),
    "gelu_tanh": lambda z, param: F.gelu(z, approximate="tanh"),
    "hardswish": lambda z, param: F.hardswish(z),
    "sigmoid": lambda z, param: torch.sigmoid(z),
    "tanh": lambda z, param: torch.tanh(z),
}

# dy * act'(z), by torch's own derivatives: they settle what happens at kinks and at NaN.
_ACTIVATE_BACKWARD: dict[str | None, Callable[[Tensor, Tensor, float], Tensor]] = {
    None: lambda dy, z, param: dy,
    "relu": lambda dy, z, param: aten.threshold_backward(dy, z, 0),
    "leaky_relu": lambda dy, z, param: aten.leaky_relu_backward(dy, z, param, False),
    "silu": lambda dy, z, param: dy * _silu_slope(z),
    "gelu": lambda dy, z, param: aten.gelu_backward(dy, z),
    "gelu_tanh": lambda dy, z, param: aten.gelu_backward(dy, z, approximate="tanh"),
    "hardswish": lambda dy, z, param: aten.hardswish_backward(dy, z),
    "sigmoid": lambda dy, z, param: aten.sigmoid_backward(dy, torch.sigmoid(z)),
    "tanh": lambda dy, z, param: aten.tanh_backward(dy, torch.tanh(z)),
}


def _silu_slope(z: Tensor) -> Tensor:
    """aten.silu_backward has no derivative of its own."""
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


_NAMES = {code: name for name, code in ACTIVATIONS.items()}


def activate(z: Tensor, activation: int, activation_param: float) -> Tensor:
    """act(z), in z's dtype."""
    return _ACTIVATE[_NAMES[activation]](z, activation_param)


def epilogue(normalized: Tensor, residual: Tensor | None, activation: int, activation_param: float) -> Tensor:
    """act(normalized + residual): what follows a norm of torch's own."""
    z = normalized if residual is None else normalized + residual
    return activate(z, activation, activation_param)


class _Sets:
    """How x splits into sets: a view of x, and the dimensions of that view that a set spans."""

    def __init__(self, x: Tensor, kind: int, groups: int) -> None:
        self.kind = kind
        self.groups = groups
        self.shape = x.shape
        dims = x.dim() + (kind == KIND_GROUP)  # group norm splits the channels in two
        if kind == KIND_LAYER:
            self.dims = tuple(range(dims - groups, dims))
            self.parameter_dims = tuple(range(dims - groups))
        else:
            self.dims = tuple(range(2, dims)) if kind == KIND_GROUP else (0, *range(2, dims))
            self.parameter_dims = (0, *range(2, x.dim()))

    def split(self, x: Tensor) -> Tensor:
        if self.kind != KIND_GROUP:
            return x
        view: Tensor = x.unflatten(1, (self.groups, self.shape[1] // self.groups))
        return view

    def join(self, view: Tensor) -> Tensor:
        return view.flatten(1, 2) if self.kind == KIND_GROUP else view

    def mean(self, view: Tensor) -> Tensor:
        return view.mean(self.dims, keepdim=True)

    def expand_parameter(self, parameter: Tensor) -> Tensor:
        """Shaped so that it broadcasts against x."""
        if self.kind == KIND_LAYER:
            return parameter
        return parameter.view(-1, *[1] * (len(self.shape) - 2))

    def reduce_to_parameter(self, d: Tensor) -> Tensor:
        return d.sum(self.parameter_dims) if self.parameter_dims else d


def _normalize(x: Tensor, mean: Tensor | None, var: Tensor | None, eps: float, sets: _Sets) -> tuple[Tensor, Tensor]:
    """(x - mean) * rstd and rstd, both shaped like `sets.split(x)`; x in the accumulation dtype."""
    view = sets.split(x)
    if mean is None or var is None:
        var, mean = torch.var_mean(view, sets.dims, correction=0, keepdim=True)
    else:
        mean = sets.expand_parameter(mean.to(x.dtype))
        var = sets.expand_parameter(var.to(x.dtype))
    rstd = (var + eps).rsqrt()
    return (view - mean) * rstd, rstd


def _pre_activation(
    xhat: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, sets: _Sets
) -> Tensor:
    """xhat * weight + bias + residual; xhat shaped like x."""
    z = xhat
    if weight is not None:
        z = z * sets.expand_parameter(weight.to(z.dtype))
    if bias is not None:
        z = z + sets.expand_parameter(bias.to(z.dtype))
    return z if residual is None else z + residual.to(z.dtype)


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    kind: int,
    groups: int,
    eps: float,
    activation: int,
    activation_param: float,
) -> Tensor:
    """y = act((x - mean) * rstd * weight + bias + residual), in x's dtype; arguments as `norm_forward`'s."""
    sets = _Sets(x, kind, groups)
    xhat, _ = _normalize(x.to(accumulation_dtype(x)), mean, var, eps, sets)
    z = _pre_activation(sets.join(xhat), weight, bias, residual, sets)
    return activate(z, activation, activation_param).to(x.dtype)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    kind: int,
    groups: int,
    eps: float,
    activation: int,
    activation_param: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """dx, dweight, dbias, dresidual of `norm` as a formula, so that it can be differentiated again.

    mean and var are constants; without them statistics are a function of x.
    """
    sets = _Sets(x, kind, groups)
    xhat, rstd = _normalize(x.to(accumulation_dtype(x)), mean, var, eps, sets)
    d = dy.to(xhat.dtype)
    if activation:
        z = _pre_activation(sets.join(xhat), weight, bias, residual, sets)
        d = _ACTIVATE_BACKWARD[_NAMES[activation]](d, z, activation_param)
    dxhat = sets.split(d if weight is None else d * sets.expand_parameter(weight.to(d.dtype)))
    if mean is None:
        dxhat = dxhat - sets.mean(dxhat) - xhat * sets.mean(dxhat * xhat)
    dx = sets.join(dxhat * rstd).to(x.dtype)
    dweight = dbias = None
    if weight is not None:
        dweight = sets.reduce_to_parameter(d * sets.join(xhat)).to(weight.dtype)
    if bias is not None:
        dbias = sets.reduce_to_parameter(d).to(bias.dtype)
    return dx, dweight, dbias, d.to(x.dtype)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all dimensions but the second, in the accumulation dtype."""
    sets = _Sets(x, KIND_BATCH, 0)
    var, mean = torch.var_mean(x.to(accumulation_dtype(x)), sets.dims, correction=0)
    return mean, var
