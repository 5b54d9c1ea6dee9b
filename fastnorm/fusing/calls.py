"""What rewritten methods and containers call in place of norm, sum and activation.

Nothing is remembered here: each call asks the modules that are there now, and runs them one by one where they are not
what `fuse` has proved. So a module that is replaced, changed, taken away or listened to is obeyed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import modules, reference
from .patterns import Act, activation_of_module, has_hooks, is_activation_class

__all__ = ["HELPERS", "KEY", "RESIDUAL", "NormAct", "is_identity"]

#: The attribute of a norm, or of what returns a norm's output, that takes a residual and an activation from its caller.
KEY = "_fusion"
#: The parameter of a rewritten method that returns a norm's output: what `call_fused` takes behind x.
RESIDUAL = "fastnorm_residual"


def is_identity(module: Any) -> bool:
    return type(module) is nn.Identity and "forward" not in module.__dict__ and not has_hooks(module)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody listens to this module's calls, or makes them."""
    everybody = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    everybody = everybody or torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks
    return bool(everybody) or has_hooks(module) or "forward" in module.__dict__


def _activation(act: Any) -> tuple[str | None, float] | None:
    """Name and parameter that a norm takes, of a module as it is now, or given so; None if it has to be called."""
    if act is None:
        return None, 0.01
    if not isinstance(act, nn.Module):
        return act  # type: ignore[no-any-return]
    found = activation_of_module(act)
    return None if found is None or _is_watched(act) else found[:2]


def _afterwards(y: Tensor, residual: Tensor | None, act: Any, in_place: bool) -> Any:
    """act(y + residual), by torch's operators and the model's own modules."""
    if residual is not None and in_place:
        y += residual
        residual = None
    if isinstance(act, nn.Module):
        return act(reference.epilogue(y, residual, None, 0.0))
    return reference.epilogue(y, residual, *(act or (None, 0.0)))


def call_fused(norm: Any, x: Tensor, residual: Tensor | None = None, act: Any = None, in_place: bool = False) -> Any:
    """act(norm(x) + residual). norm: a norm, or what returns a norm's output. act: None, a module, or name and
    parameter. in_place: the sum is written into the norm's output."""
    if isinstance(residual, torch.fx.Proxy) and residual.node.target == f"*{RESIDUAL}":
        residual = None  # a root that is traced, which nobody calls with one
    if KEY in getattr(norm, "__dict__", ()) and not isinstance(x, torch.fx.Proxy) and not _is_watched(norm):
        if isinstance(norm, modules.Norm):
            found = _activation(act)
            if found is not None and not norm._fuses and type(norm).forward is modules.Norm.forward:
                return norm._run(x, residual, *found)
        elif isinstance(norm, nn.Sequential):
            return run_fused(norm, x, residual, act, in_place)
        elif hasattr(type(norm), "_rewriting"):
            return norm.forward(x, residual, act, in_place)
    return _afterwards(norm(x), residual, act, in_place)


def sum_fused(norm: Any, x: Tensor, residual: Tensor, act: Any, in_place: bool) -> Any:
    """`norm(x) + residual`."""
    if residual is None:
        raise TypeError("unsupported operand type(s) for +: 'Tensor' and 'NoneType'")
    return call_fused(norm, x, residual, act, in_place)


def add_fused(residual: Tensor, norm: Any, x: Tensor, act: Any) -> Any:
    """`residual + norm(x)`: the arguments are evaluated in the order in which the unfused sum did."""
    return sum_fused(norm, x, residual, act, False)


def run_fused(
    container: nn.Sequential, x: Any, residual: Tensor | None = None, act: Any = None, in_place: bool = False
) -> Any:
    """What an nn.Sequential computes, each norm with the activation that is behind it now; the last one with what is
    given."""
    children = list(container)
    place, count = 0, len(children)
    while place < count:
        child = children[place]
        place += 1
        if KEY not in getattr(child, "__dict__", ()):
            x = child(x)
            continue
        behind = place
        while behind < count and is_identity(children[behind]):
            behind += 1
        if behind == count:
            return call_fused(child, x, residual, act, in_place)
        if is_activation_class(type(children[behind])):
            x = call_fused(child, x, None, children[behind])
            place = behind + 1
        else:
            x = child(x)
    return _afterwards(x, residual, act, in_place)


#: Names in rewritten methods -> what they mean.
HELPERS: dict[str, Callable[..., Any]] = {
    "fastnorm_call": call_fused,
    "fastnorm_sum": sum_fused,
    "fastnorm_add": add_fused,
    "fastnorm_run": run_fused,
}


class NormAct:
    """A fastnorm norm that is a class of another library's too, whose forward is norm, drop and act."""

    def _own(self: Any) -> Act | tuple[str | None, float] | None:
        """The activation inside, as it is now; None where the library's forward has to run."""
        act, drop = self._modules.get("act"), self._modules.get("drop")
        if not is_identity(drop) or act is None:
            return None
        return (None, 0.01) if is_identity(act) else _activation(act)

    def _run(self: Any, x: Any, residual: Any = None, activation: str | None = None, param: float = 0.01) -> Any:
        own = self._own()
        run = super()._run  # type: ignore[misc]
        if own is not None and own[0] is None:
            return run(x, residual, activation, param)
        if own is not None and residual is None and activation is None:
            return run(x, None, *own[:2])
        y = self._original_class.forward(self, x) if own is None else run(x, None, *own[:2])
        return reference.epilogue(y, residual, activation, param)

    def _unfused(self: Any, activation: str | None, param: float, x: Any, residual: Any) -> Any:
        y = self._original_class.forward(self, x)
        own = self._own()
        return reference.epilogue(y, residual, activation, param) if own is not None and own[0] is None else y
