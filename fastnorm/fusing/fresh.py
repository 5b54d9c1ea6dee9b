"""Which modules leave their input as it is, and make their output anew."""

from __future__ import annotations

import ast

from torch import nn

from ..modules import Norm
from .flow import is_name, mentions_of
from .patterns import has_hooks, is_torchs_own
from .read import methods_of
from .source import Method, resolve

__all__ = ["is_fresh", "is_plain_sequential", "is_pure", "takes_one"]

#: Modules whose output is new memory, which nothing else can see.
_FRESH = tuple(
    cls.forward
    for cls in (
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    )
)


def is_fresh(module: object) -> bool:
    """Whether a module's input goes into a convolution and nowhere else: so it stays as it is, and the output is new
    memory."""
    if not isinstance(module, nn.Module) or "forward" in vars(module):
        return False
    if is_plain_sequential(module):
        return bool(module._modules) and is_fresh(next(iter(module._modules.values())))
    if type(module).forward in _FRESH:
        return True
    method = next((m for m in methods_of(module)[0] if m.name == "forward" and m.fixed is None), None)
    if method is None or not takes_one(method) or not method.tree.body:
        return False
    name, first = method.tree.args.args[1].arg, method.tree.body[0]
    loads = [m for m in mentions_of(method.tree, name) if isinstance(m.ctx, ast.Load)]
    inside = [m for m in loads if any(m is node for node in ast.walk(first))]
    call = method.parent(inside[0]) if len(inside) == 1 else None
    if not isinstance(first, ast.Assign) or not isinstance(call, ast.Call):
        return False
    again = len(loads) > 1 and not (len(first.targets) == 1 and is_name(first.targets[0], name))
    return not again and call.args == inside and is_fresh(resolve(call.func, method))


def takes_one(method: Method) -> bool:
    """Whether a method has one parameter besides self."""
    args = method.tree.args
    return len(args.args) == 2 and not (args.vararg or args.kwarg or args.kwonlyargs or args.defaults)


def is_pure(callee: object) -> bool:
    """Whether a call of `callee` changes none of its arguments: one of torch.nn's modules, not working in place."""
    if not isinstance(callee, nn.Module) or any(has_hooks(module) for module in callee.modules()):
        return False
    return is_fresh(callee) or never_in_place(callee)


def never_in_place(module: nn.Module) -> bool:
    """Whether everything inside a module is torch.nn's or ours, and told to work out of place."""
    return all(
        (is_torchs_own(inner) or isinstance(inner, Norm)) and not getattr(inner, "inplace", False)
        for inner in module.modules()
    )


def is_plain_sequential(module: object) -> bool:
    """Whether a module does what nn.Sequential does, and nothing else."""
    cls: type = getattr(type(module), "_original_class", type(module))
    return (
        isinstance(module, nn.Sequential)
        and cls.forward is nn.Sequential.forward  # type: ignore[attr-defined]
        and "forward" not in vars(module)
    )
