"""The activations that a norm can fuse, in torch's own terms: the list is the C++ side's (csrc/core/activation.h).

A name there needs a row here: what torch computes, torch's derivative of it, and torch's module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .extension import _C

__all__ = ["ACTIVATIONS", "CODES", "Activation", "activation_code"]

aten = torch.ops.aten


class Activation(NamedTuple):
    """One activation. param: the slope of leaky_relu; the others ignore it."""

    value: Callable[[Tensor, float], Tensor]
    """(z, param) -> act(z), in z's dtype."""
    gradient: Callable[[Tensor, Tensor, float], Tensor]
    """(dy, z, param) -> dy * act'(z), differentiable: torch's own derivatives settle kinks and NaN."""
    module: Callable[[float], nn.Module]
    """param -> the module."""


def _silu_gradient(dy: Tensor, z: Tensor, param: float) -> Tensor:
    # aten.silu_backward has no derivative of its own.
    sigmoid = torch.sigmoid(z)
    return dy * (sigmoid * (1 + z * (1 - sigmoid)))


_TABLE = {
    "relu": Activation(
        lambda z, param: F.relu(z),
        lambda dy, z, param: aten.threshold_backward(dy, z, 0),
        lambda param: nn.ReLU(),
    ),
    "leaky_relu": Activation(
        lambda z, param: F.leaky_relu(z, param),
        lambda dy, z, param: aten.leaky_relu_backward(dy, z, param, False),
        lambda param: nn.LeakyReLU(param),
    ),
    "silu": Activation(
        lambda z, param: F.silu(z),
        _silu_gradient,
        lambda param: nn.SiLU(),
    ),
    "gelu": Activation(
        lambda z, param: F.gelu(z),
        lambda dy, z, param: aten.gelu_backward(dy, z),
        lambda param: nn.GELU(),
    ),
    "gelu_tanh": Activation(
        lambda z, param: F.gelu(z, approximate="tanh"),
        lambda dy, z, param: aten.gelu_backward(dy, z, approximate="tanh"),
        lambda param: nn.GELU(approximate="tanh"),
    ),
    "hardswish": Activation(
        lambda z, param: F.hardswish(z),
        lambda dy, z, param: aten.hardswish_backward(dy, z),
        lambda param: nn.Hardswish(),
    ),
    "sigmoid": Activation(
        lambda z, param: torch.sigmoid(z),
        lambda dy, z, param: aten.sigmoid_backward(dy, torch.sigmoid(z)),
        lambda param: nn.Sigmoid(),
    ),
    "tanh": Activation(
        lambda z, param: torch.tanh(z),
        lambda dy, z, param: aten.tanh_backward(dy, torch.tanh(z)),
        lambda param: nn.Tanh(),
    ),
}

_NO_ACTIVATION, *_NAMES = _C.activations()
if set(_NAMES) != set(_TABLE):
    raise ImportError(
        f"csrc/core/activation.h lists {', '.join(sorted(_NAMES))}, and fastnorm/activations.py has rows for "
        f"{', '.join(sorted(_TABLE))}: they have to be the same"
    )

#: Name -> what torch makes of it, in the order of the C++ list.
ACTIVATIONS: dict[str, Activation] = {name: _TABLE[name] for name in _NAMES}
#: Name -> number in the operators. None: no activation.
CODES: dict[str | None, int] = {None: 0} | {name: code for code, name in enumerate(_NAMES, 1)}


def activation_code(name: str | None) -> int:
    """The operators' number of an activation; ValueError if there is none of that name."""
    try:
        return CODES[name]
    except (KeyError, TypeError):  # TypeError: cannot be a key
        known = ", ".join(map(repr, CODES))
        raise ValueError(f"activation must be one of {known}, but got {name!r}") from None
