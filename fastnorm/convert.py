"""convert: torch.nn norms become fastnorm's, in place. revert: the way back.

A module changes its class and nothing else: Parameters, buffers, hooks, flags and its place in the model stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import modules, reference
from .ops import activation_code

__all__ = ["convert", "revert"]

Model = TypeVar("Model", bound=nn.Module)


class TorchNormActivation(nn.Module):
    """A torch.nn norm, the residual add and the activation, in torch's own operators: what revert leaves of a
    fastnorm module with an activation."""

    activation: str | None
    activation_param: float

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        code = activation_code(self.activation)
        return reference.epilogue(super().forward(input), residual, code, self.activation_param)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self)


class BatchNorm1dActivation(TorchNormActivation, nn.BatchNorm1d):
    pass


class BatchNorm2dActivation(TorchNormActivation, nn.BatchNorm2d):
    pass


class BatchNorm3dActivation(TorchNormActivation, nn.BatchNorm3d):
    pass


class InstanceNorm1dActivation(TorchNormActivation, nn.InstanceNorm1d):
    pass


class InstanceNorm2dActivation(TorchNormActivation, nn.InstanceNorm2d):
    pass


class InstanceNorm3dActivation(TorchNormActivation, nn.InstanceNorm3d):
    pass


class GroupNormActivation(TorchNormActivation, nn.GroupNorm):
    pass


class LayerNormActivation(TorchNormActivation, nn.LayerNorm):
    pass


# (torch.nn, fastnorm, what a fastnorm module with an activation reverts to)
_FAMILIES: tuple[tuple[type[nn.Module], type[modules.Norm], type[nn.Module]], ...] = (
    (nn.BatchNorm1d, modules.BatchNorm1d, BatchNorm1dActivation),
    (nn.BatchNorm2d, modules.BatchNorm2d, BatchNorm2dActivation),
    (nn.BatchNorm3d, modules.BatchNorm3d, BatchNorm3dActivation),
    (nn.InstanceNorm1d, modules.InstanceNorm1d, InstanceNorm1dActivation),
    (nn.InstanceNorm2d, modules.InstanceNorm2d, InstanceNorm2dActivation),
    (nn.InstanceNorm3d, modules.InstanceNorm3d, InstanceNorm3dActivation),
    (nn.GroupNorm, modules.GroupNorm, GroupNormActivation),
    (nn.LayerNorm, modules.LayerNorm, LayerNormActivation),
)
_FASTNORM = {torch_class: ours for torch_class, ours, _ in _FAMILIES}
_FASTNORM |= {reverted: ours for _, ours, reverted in _FAMILIES}
_TORCH: dict[type[nn.Module], type[nn.Module]] = {ours: torch_class for torch_class, ours, _ in _FAMILIES}
_TORCH_WITH_ACTIVATION: dict[type[nn.Module], type[nn.Module]] = {ours: reverted for _, ours, reverted in _FAMILIES}


def convert(model: Model) -> Model:
    """Turn the torch.nn norms of `model` into fastnorm's, in place; returns `model`.

    Only modules whose class is exactly torch.nn's: a subclass may have a forward of its own. `why_left` has the rest.
    """
    for module in model.modules():
        if why_left(module) is None:
            module.__class__ = _FASTNORM[type(module)]
    return model


def revert(model: Model) -> Model:
    """Turn the fastnorm norms of `model` back into torch.nn's, in place; returns `model`.

    A norm without activation gets its exact torch.nn class. One with an activation becomes a subclass of it that runs
    torch.nn's norm, then adds the residual, then applies the activation. Subclasses of fastnorm's are left alone.
    """
    for module in model.modules():
        if type(module) not in _TORCH:
            continue
        if module.activation is not None:
            module.__class__ = _TORCH_WITH_ACTIVATION[type(module)]
        else:
            module.__class__ = _TORCH[type(module)]
            for name in ("activation", "activation_param"):
                vars(module).pop(name, None)
    return model


_ACTIVATION_MODULES: dict[str, Callable[[float], nn.Module]] = {
    "relu": lambda param: nn.ReLU(),
    "leaky_relu": nn.LeakyReLU,
    "silu": lambda param: nn.SiLU(),
    "gelu": lambda param: nn.GELU(),
    "gelu_tanh": lambda param: nn.GELU(approximate="tanh"),
    "hardswish": lambda param: nn.Hardswish(),
    "sigmoid": lambda param: nn.Sigmoid(),
    "tanh": lambda param: nn.Tanh(),
}


def scriptable(norm: modules.Norm | TorchNormActivation) -> nn.Module:
    """What torch.jit.script compiles in place of `norm`: torch.nn's modules, with the same Parameters and buffers."""
    activation = norm.activation
    plain = copy.copy(norm)
    plain.activation = None
    revert(convert(plain))
    if activation is None:
        return plain
    return nn.Sequential(plain, _ACTIVATION_MODULES[activation](norm.activation_param))


def why_left(module: nn.Module) -> str | None:
    """Why `convert` leaves this module as it is; None if it does not."""
    if isinstance(module, modules.Norm):
        return "is a fastnorm module already"
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by TorchScript"
    if type(module) not in _FASTNORM:
        if isinstance(module, tuple(_TORCH.values())):
            return f"{type(module).__name__} is a subclass, which may compute something else"
        return f"fastnorm has no {type(module).__name__}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if not isinstance(module, TorchNormActivation) and hasattr(module, "activation"):
        return "it has an attribute `activation` of its own"
    return None
