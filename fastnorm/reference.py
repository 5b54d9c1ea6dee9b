"""The operators' contract in torch's own operators: slow, differentiable any number of times, vmap-able.

Serves double backward and whatever autograd asks for under a transform, and is what tests compare with.
Everything is computed in float32 (float64 for float64) and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .ops import NORMALIZED_CHANNELS, OptTensor, Settings, accumulation_dtype

#: By the operators' number, from 1.
_BY_CODE = dict(enumerate(ACTIVATIONS.values(), 1))


def epilogue(normalized: Tensor, residual: OptTensor, activation: str | None, activation_param: float) -> Tensor:
    """act(normalized + residual): what follows a norm of torch's own."""
    z = normalized if residual is None else normalized + residual
    return z if activation is None else ACTIVATIONS[activation].value(z, activation_param)


class Ranks(NamedTuple):
    """Other ranks whose elements belong to the sets too (batch norm)."""

    all_reduce: Callable[[Tensor], Tensor]
    """The sum over all ranks, differentiable."""
    elements: Tensor
    """(1,): the elements of a set on all ranks."""


class _Sets:
    """How x splits into sets: a view of x, and the dimensions of that view that a set spans."""

    def __init__(self, x: Tensor, groups: int, normalized_dims: int, ranks: Ranks | None = None) -> None:
        self.ranks = ranks
        self.groups = groups
        self.normalized_dims = normalized_dims
        self.shape = x.shape
        if normalized_dims > 0:
            self.dims: tuple[int, ...] = tuple(range(x.dim() - normalized_dims, x.dim()))
            self.parameter_dims = tuple(range(x.dim() - normalized_dims))
        else:
            if normalized_dims == NORMALIZED_CHANNELS:
                self.dims = (1,)
            else:  # group norm splits the channels in two
                self.dims = tuple(range(2, x.dim() + 1)) if groups > 0 else (0, *range(2, x.dim()))
            self.parameter_dims = (0, *range(2, x.dim()))

    def split(self, x: Tensor) -> Tensor:
        if self.groups == 0:
            return x
        view: Tensor = x.unflatten(1, (self.groups, self.shape[1] // self.groups))
        return view

    def join(self, view: Tensor) -> Tensor:
        return view.flatten(1, 2) if self.groups > 0 else view

    def mean(self, view: Tensor) -> Tensor:
        if self.ranks is None:
            return view.mean(self.dims, keepdim=True)
        return self.ranks.all_reduce(view.sum(self.dims, keepdim=True)) / self.ranks.elements.to(view.dtype)

    def var_mean(self, view: Tensor) -> tuple[Tensor, Tensor]:
        if self.ranks is None:
            return torch.var_mean(view, self.dims, correction=0, keepdim=True)
        mean = self.mean(view)
        return self.mean((view - mean).square()), mean

    def expand_parameter(self, parameter: Tensor) -> Tensor:
        """Shaped so that it broadcasts against x."""
        if self.normalized_dims > 0:
            return parameter
        return parameter.view(-1, *[1] * (len(self.shape) - 2))

    def reduce_to_parameter(self, d: Tensor) -> Tensor:
        return d.sum(self.parameter_dims) if self.parameter_dims else d


def _normalize(x: Tensor, mean: OptTensor, var: OptTensor, eps: float, sets: _Sets) -> tuple[Tensor, Tensor]:
    """(x - mean) * rstd and rstd, both shaped like `sets.split(x)`; x in the accumulation dtype."""
    view = sets.split(x)
    if mean is None or var is None:
        var, mean = sets.var_mean(view)
    else:
        mean = sets.expand_parameter(mean.to(x.dtype))
        var = sets.expand_parameter(var.to(x.dtype))
    rstd = (var + eps).rsqrt()
    return (view - mean) * rstd, rstd


def _pre_activation(xhat: Tensor, weight: OptTensor, bias: OptTensor, residual: OptTensor, sets: _Sets) -> Tensor:
    """xhat * weight + bias + residual; xhat shaped like x."""
    z = xhat
    if weight is not None:
        z = z * sets.expand_parameter(weight.to(z.dtype))
    if bias is not None:
        z = z + sets.expand_parameter(bias.to(z.dtype))
    return z if residual is None else z + residual.to(z.dtype)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    mean: OptTensor,
    var: OptTensor,
    settings: Settings,
    ranks: Ranks | None = None,
) -> tuple[Tensor, OptTensor, OptTensor, Tensor]:
    """dx, dweight, dbias, dresidual of act((x - mean) * rstd * weight + bias + residual) as a formula, so that it can
    be differentiated again.

    mean and var are constants; without them statistics are a function of x, and of what the other ranks have.
    """
    groups, normalized_dims, eps, activation, activation_param = settings
    sets = _Sets(x, groups, normalized_dims, ranks)
    xhat, rstd = _normalize(x.to(accumulation_dtype(x)), mean, var, eps, sets)
    d = dy.to(xhat.dtype)
    if activation:
        z = _pre_activation(sets.join(xhat), weight, bias, residual, sets)
        d = _BY_CODE[activation].gradient(d, z, activation_param)
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


def moments(x: Tensor, dims: tuple[int, ...] | None = None, correction: float = 0) -> tuple[Tensor, Tensor]:
    """Mean and variance over `dims` (None: all but the second), in the accumulation dtype."""
    x = x.to(accumulation_dtype(x))
    if dims == ():  # torch takes an empty tuple for all
        return x.clone(), (x - x) / max(1 - correction, 0)
    var, mean = torch.var_mean(x, (0, *range(2, x.dim())) if dims is None else dims, correction=correction)
    return mean, var
