"""Who in a model calls which module, and which modules are handed on to code that the text does not show."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from ..convert import has_own_forward
from .patterns import is_torchs_own
from .read import methods_of
from .record import is_norm
from .source import Method, chain, step

__all__ = ["Usage", "usage_of"]

#: Methods and attributes through which a module's children are reached without their names.
_ITERATING = {
    *("children", "named_children", "modules", "named_modules", "_modules", "get_submodule", "__dict__", "apply"),
    *("items", "values", "keys"),
}
#: Attributes of a norm that only tell what it is.
_HARMLESS = {
    *("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training", "eps", "momentum", "affine"),
    *("num_features", "num_groups", "num_channels", "normalized_shape", "elementwise_affine", "track_running_stats"),
}
_ONLY_ASK = frozenset(("isinstance", "hasattr", "super", "type", "id", "fastnorm_run"))


@dataclass
class Usage:
    """Everything by id(module).

    calls: calls by a path from `self`. handed_on: why code that is not seen may do something else with the module, or
    with its children. parents: where it is registered.
    """

    names: dict[int, str] = field(default_factory=dict)
    calls: dict[int, list[tuple[Method, ast.Call]]] = field(default_factory=lambda: defaultdict(list))
    handed_on: dict[int, str] = field(default_factory=dict)
    parents: dict[int, list[tuple[nn.Module, str]]] = field(default_factory=lambda: defaultdict(list))
    _opened: set[int] = field(default_factory=set)

    def why_unproved(self, module: nn.Module) -> str | None:
        """Why it is not known who calls `module`."""
        if len(self.parents[id(module)]) > 1:
            return "is registered in several places"
        if (reason := self.handed_on.get(id(module))) is not None:
            return reason
        for parent, _ in self.parents[id(module)]:
            if (reason := self.handed_on.get(id(parent))) is not None:
                return reason
        return None

    def hand_on(self, module: nn.Module, reason: str, called_only: bool = False) -> None:
        """`module` goes where it is not seen, and what iterates over it may take what is inside one by one."""
        self.handed_on.setdefault(id(module), reason)
        if called_only or id(module) in self._opened:
            return
        self._opened.add(id(module))
        for child in module.children():
            if _is_iterable(child):
                self.hand_on(child, reason)


def usage_of(model: nn.Module) -> Usage:
    """Reads all methods of all modules of `model`."""
    usage = Usage()
    for name, module in model.named_modules():
        usage.names[id(module)] = name
        for key, child in module._modules.items():
            if child is not None:
                usage.parents[id(child)].append((module, key))
    for module in model.modules():
        where = type(module).__name__
        for name, value in vars(module).items():
            for held in _held(value) if name != "_modules" and not isinstance(value, nn.Module) else ():
                usage.hand_on(held, f"is held by {where}.{name} too")
        if has_own_forward(module) and module._modules:
            usage.hand_on(module, f"is inside a {where} whose forward was replaced on the instance")
        if not module._modules:
            continue
        if is_torchs_own(module) and not _is_iterable(module):
            usage.hand_on(module, f"is inside torch's own {where}")
        methods, complete = methods_of(module)
        if not complete:
            usage.hand_on(module, f"is inside a {where} whose source text is not there")
        reached = _reached(methods)
        for method in methods:
            for node in _mentions(method):
                _record(usage, method, node, method.name in reached)
    return usage


def _held(value: object, depth: int = 3) -> Iterator[nn.Module]:
    """The modules in plain lists and dicts: they are reached without being children."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, (list, tuple, set, dict)) and depth > 0:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _held(item, depth - 1)


def _is_iterable(module: nn.Module) -> bool:
    return hasattr(type(module), "__iter__")


def _reached(methods: list[Method]) -> set[str]:
    """The names of the methods that `forward` may call."""
    by_name: dict[str, list[Method]] = defaultdict(list)
    for method in methods:
        by_name[method.name].append(method)
    reached, waiting = {"forward", "__call__"}, ["forward", "__call__"]
    while waiting:
        for method in by_name[waiting.pop()]:
            for node in ast.walk(method.tree):
                if isinstance(node, ast.Attribute) and node.attr in by_name and node.attr not in reached:
                    reached.add(node.attr)
                    waiting.append(node.attr)
    return reached


def _mentions(method: Method) -> Iterator[ast.expr]:
    """The longest chains from `self` in a method."""
    for node in ast.walk(method.tree):
        if isinstance(node, ast.Name) and node.id == method.self_name:
            whole: ast.expr = node
            parent = method.parents.get(whole)
            while isinstance(parent, (ast.Attribute, ast.Subscript)) and parent.value is whole and chain(parent):
                whole, parent = parent, method.parents.get(parent)
            yield whole


def _record(usage: Usage, method: Method, node: ast.expr, reached: bool) -> None:
    """One mention: a call of a module, or of something of it, or the module itself."""
    found = chain(node)
    assert found is not None
    module, rest = method.owner, list(found[1])
    while rest:
        value = step(module, rest[0])
        if not isinstance(value, nn.Module):
            break
        module = value
        rest.pop(0)
    parent = method.parents.get(node)
    where = f"{type(method.owner).__name__}.{method.name}"
    if rest:
        first = rest[0]
        if first in _HARMLESS or (module is method.owner and first not in _ITERATING):
            return
        if module is method.owner and not reached:
            return
        own_code = is_norm(module) or type(module).__module__.startswith("torch.nn")
        if first in _ITERATING or first in ("forward", "__call__") or own_code:
            usage.hand_on(module, f"is used as more than a module that is called, in {where}", _called(method, node))
        return
    if isinstance(parent, ast.Call) and parent.func is node:
        usage.calls[id(module)].append((method, parent))
        return
    if isinstance(parent, ast.Compare) or (isinstance(parent, (ast.If, ast.IfExp)) and parent.test is node):
        return
    if isinstance(parent, ast.Call) and parent.args[:1] == [node] and _is_checkpoint(parent.func):
        return  # it is called there
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        if parent.func.id in _ONLY_ASK:
            return
        if parent.func.id == "getattr" and len(parent.args) > 1 and isinstance(parent.args[1], ast.Constant):
            named = step(module, str(parent.args[1].value))
            if isinstance(named, nn.Module):
                usage.hand_on(named, f"is handed on in {where}")
            return
    if not isinstance(getattr(node, "ctx", None), ast.Load):
        return  # it is set
    if module is not method.owner or reached:
        usage.hand_on(module, f"is handed on in {where}", _called(method, node))


def _is_checkpoint(function: ast.expr) -> bool:
    """torch.utils.checkpoint.checkpoint, by one of the names that models have for it; not checkpoint_sequential, which
    takes a container apart."""
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("checkpoint", "_gradient_checkpointing_func")


def _called(method: Method, node: ast.AST) -> bool:
    """Whether a container is only iterated over, and what comes out is only called (`for m in self.layers: m(x)`)."""
    parent = method.parents.get(node)
    skipped = 0
    while isinstance(parent, ast.Call) or (isinstance(parent, ast.Attribute) and parent.attr in _ITERATING):
        if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
            if parent.func.id not in ("enumerate", "zip", "reversed"):
                return False
            skipped += parent.func.id == "enumerate"
        node, parent = parent, method.parents.get(parent)
    if isinstance(parent, ast.Subscript) and parent.value is node:
        caller = method.parents.get(parent)
        return isinstance(caller, ast.Call) and caller.func is parent
    if not isinstance(parent, (ast.For, ast.comprehension)) or parent.iter is not node:
        return False
    names = [n.id for n in ast.walk(parent.target) if isinstance(n, ast.Name)][skipped:]
    for name in names:
        for use in ast.walk(method.tree):
            if isinstance(use, ast.Name) and use.id == name and isinstance(use.ctx, ast.Load):
                caller = method.parents.get(use)
                if not (isinstance(caller, ast.Call) and caller.func is use):
                    return False
    return True
