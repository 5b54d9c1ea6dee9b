"""convert: torch.nn norms become fastnorm's, in place. revert: the way back.

A module changes its class and nothing else: Parameters, buffers, hooks, flags and its place in the model stay.
"""

from __future__ import annotations

import importlib
from typing import TypeGuard, TypeVar

import torch
from torch import nn

from . import modules
from .fusing.record import undo
from .fusing.ungraph import undo_graphs
from .layers import fastnorm_class
from .modules import BY_TORCH_CLASS
from .unfused import UNFUSED, forget_activation

__all__ = ["convert", "revert"]

Model = TypeVar("Model", bound=nn.Module)

#: On a converted module of another package's class: its module and name.
_ORIGIN = "_converted_from"


def convert(model: Model) -> Model:
    """Turn the torch.nn norms of `model` into fastnorm's, in place; returns `model`. So are torchvision's and timm's
    LayerNorm2d, and torchvision's and detectron2's FrozenBatchNorm2d.

    Only modules whose class is exactly one of these: a subclass may have a forward of its own. `fastnorm.report` tells
    why a norm is left as it is: that is no error. AttributeError if `model` is no nn.Module; nothing else is raised.
    """
    for module in model.modules():
        if why_not_converted(module) is None:
            _convert(module)
    return model


def _convert(module: nn.Module) -> None:
    cls = type(module)
    ours = fastnorm_class(cls)
    assert ours is not None
    if cls not in BY_TORCH_CLASS:
        vars(module)[_ORIGIN] = (cls.__module__, cls.__name__)
    change_class(module, ours)


def revert(model: Model) -> Model:
    """Turn the fastnorm norms of `model` back into torch.nn's, in place; returns `model`.

    A norm without activation gets the exact class it was converted from; a LayerNorm2d or FrozenBatchNorm2d that was
    not, that of fastnorm.plain. One with an activation becomes a subclass of torch.nn's or fastnorm.plain's class that
    runs the norm, then adds the residual, then applies the activation. Subclasses of fastnorm's are left alone. What
    `fastnorm.fuse` has fused is taken apart again. ImportError, and nothing is changed, where the package of such a
    class is gone. AttributeError if `model` is no nn.Module.
    """
    for module in model.modules():
        if is_public(module):
            _class_before(module)  # ImportError before anything is changed
    undo_graphs(model)
    undo(model)
    for module in model.modules():
        if is_public(module):
            cls = _class_before(module)
            if module._epilogue()[0] is None:
                vars(module).pop(_ORIGIN, None)
                if module._fuses:
                    forget_activation(module)
            change_class(module, cls)
    return model


def _class_before(module: modules.Norm) -> type[nn.Module]:
    if module._epilogue()[0] is not None:
        return UNFUSED[module.torch_class]
    origin = vars(module).get(_ORIGIN)
    if origin is None:
        return module.torch_class
    package, name = origin
    cls: type[nn.Module] = getattr(importlib.import_module(package), name)
    return cls


def is_public(module: nn.Module) -> TypeGuard[modules.Norm]:
    """Whether the module's class is exactly one of fastnorm's."""
    return isinstance(module, modules.Norm) and type(module) is module._public_class


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """A `forward` on the instance that is only the old class's own method goes; what else is there stays."""
    own = vars(module)
    if _is_leftover_forward(module):
        del own["forward"]
    for name in modules.CALL_COUNTS:
        own.pop(name, None)
    module.__class__ = cls


def _is_leftover_forward(module: nn.Module) -> bool:
    """Whether the instance's own `forward` is the class's, bound: what tools leave that have put theirs there and taken
    it away."""
    forward = vars(module).get("forward")
    leftovers = (getattr(type(module), "forward", None), modules.Norm.forward)
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) in leftovers


def why_not_converted(module: nn.Module) -> str | None:
    """Why `convert` leaves this module as it is; None if it does not."""
    if isinstance(module, modules.Norm):
        return "is a fastnorm module already"
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by TorchScript"
    if fastnorm_class(type(module)) is None:
        if isinstance(module, tuple(BY_TORCH_CLASS)):
            return f"{type(module).__name__} is a subclass, which may compute something else"
        return f"fastnorm has no {type(module).__name__}"
    if has_own_forward(module):
        return "its forward was replaced on the instance"
    if vars(module).get("_fast_norm"):  # timm's
        return "its flag _fast_norm keeps half types under autocast"
    return None


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance has a `forward` that is not its class's."""
    return "forward" in vars(module) and not _is_leftover_forward(module)
