"""Activations and sums, as modules, functions and methods: what `fastnorm.fuse` recognises."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import ACTIVATIONS

__all__ = [
    "METHODS",
    "Act",
    "activation_of_call",
    "activation_of_method",
    "activation_of_module",
    "has_hooks",
    "is_activation_class",
    "is_add",
    "is_torchs_own",
]


class Act(NamedTuple):
    """name, param: as a norm takes them; in_place: it writes into its input."""

    name: str
    param: float = 0.01
    in_place: bool = False


aten = torch.ops.aten

#: torch's module and functions -> activation; of a function, also whether it always writes into its input. gelu_tanh is
#: an option of gelu.
_MODULES: dict[type[nn.Module], str] = {}
_FUNCTIONS: dict[Callable[..., Any], tuple[str, bool]] = {torch.special.expit: ("sigmoid", False)}
for _name in ACTIVATIONS.keys() - {"gelu_tanh"}:
    _MODULES[type(ACTIVATIONS[_name].module(0.0))] = _name
    for _place in (F, torch, aten):
        for _suffix in ("", "_"):
            _found = getattr(_place, _name + _suffix, None)
            if isinstance(_found, torch._ops.OpOverloadPacket):
                _found = _found.default
            if _found is not None:
                _FUNCTIONS[_found] = (_name, _suffix == "_")

#: Method of a tensor -> the function.
METHODS: dict[str, Callable[..., Any]] = {
    name: getattr(torch, name) for name in ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")
}
#: Parameters after the tensor, in order.
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "gelu": ("approximate",),
    "leaky_relu": ("negative_slope", "inplace"),
}
_ADDS: set[Callable[..., Any]] = {
    operator.add,
    operator.iadd,
    torch.add,
    Tensor.add,
    Tensor.add_,
    aten.add.Tensor,
    aten.add_.Tensor,
}


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to this module's calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_torchs_own(module: nn.Module) -> bool:
    """Whether a module computes what one of torch.nn's does: its forward is torch's."""
    where = getattr(type(module).forward, "__module__", None) or ""
    return where.startswith("torch.nn.modules.") and "forward" not in vars(module)


def is_activation_class(cls: type) -> bool:
    """Whether modules of this class are activations, for most settings that they may have."""
    return cls in _MODULES


def activation_of_module(module: object) -> Act | None:
    """The activation that a module of torch.nn's is."""
    name = _MODULES.get(type(module))  # type: ignore[arg-type]
    if name is None or "forward" in vars(module):
        return None
    param = 0.01
    if name == "leaky_relu":
        param = float(module.negative_slope)  # type: ignore[attr-defined]
    elif name == "gelu":
        approximate = module.approximate  # type: ignore[attr-defined]
        if approximate not in ("none", "tanh"):
            return None
        name = "gelu" if approximate == "none" else "gelu_tanh"
    return Act(name, param, bool(vars(module).get("inplace", False)))


def activation_of_call(function: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Act | None:
    """The activation that `function(tensor, *args, **kwargs)` is; the arguments are constants."""
    try:
        found = _FUNCTIONS.get(function)  # type: ignore[call-overload]
    except TypeError:  # cannot be a key
        return None
    if found is None:
        return None
    name, in_place = found
    names = _PARAMETERS.get(name, ("inplace",))
    if len(args) > len(names):
        return None
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    if given.keys() - {*names, "inplace"}:
        return None
    in_place = in_place or given.get("inplace", False) is True
    if not isinstance(given.get("inplace", False), bool):
        return None
    if name == "gelu":
        known = {"none": Act("gelu"), "tanh": Act("gelu_tanh")}
        return known.get(given.get("approximate", "none"))
    slope = given.get("negative_slope", 0.01)
    if isinstance(slope, bool) or not isinstance(slope, (int, float)):
        return None
    return Act(name, float(slope), in_place)


def activation_of_method(name: str) -> Act | None:
    """The activation that `tensor.name()` is."""
    return activation_of_call(METHODS[name], (), {}) if name in METHODS else None


def is_add(function: object, kwargs: Mapping[str, Any]) -> bool:
    """Whether `function(a, b, **kwargs)` is a + b."""
    try:
        found = function in _ADDS
    except TypeError:
        return False
    return found and not kwargs.keys() - {"alpha"} and kwargs.get("alpha", 1) == 1
