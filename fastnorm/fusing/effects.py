"""What a node of a graph does besides giving a value: what may not lie between a norm and what is fused with it."""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

from .fresh import never_in_place

__all__ = ["between", "changes_mode", "names_a_mode", "reads_statistics", "writes"]

_IN_PLACE = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_OPERATORS = {getattr(operator, f"i{name}") for name in (*_IN_PLACE, "concat")} | {operator.setitem, operator.delitem}
_METHODS = {f"__i{name}__" for name in _IN_PLACE} | {"__setitem__", "__delitem__"}
#: Whose functions end in "_" where they work in place.
_KNOWN = ("torch", "fastnorm", "_operator", "builtins", "math")
_MODES = ("grad_enabled", "inference_mode", "autocast", "nesting", "dual_level")


def between(first: Node, last: Node) -> Iterator[Node]:
    """The nodes that run behind one and before the other."""
    node = first.next
    while node is not last:
        yield node
        node = node.next


def writes(node: Node, module: nn.Module | None) -> bool:
    """Whether a node may write into a tensor that is there already: unknown functions and modules may. module: that
    which it calls."""
    if module is not None:
        return not never_in_place(module)
    target: Any = node.target
    if node.op == "call_method":
        name = str(target)
        return name in _METHODS or (name.endswith("_") and not name.endswith("__")) or _is_told_to(node)
    if node.op != "call_function":
        return False
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    owner, name = str(getattr(target, "__module__", "")), str(getattr(target, "__name__", target))
    known = owner.partition(".")[0] in _KNOWN and not isinstance(target, HigherOrderOperator)
    return not known or name.endswith("_") or target in _OPERATORS or _is_told_to(node)


def _is_told_to(node: Node) -> bool:
    """Whether an argument says that a call is to work in place."""
    given: dict[str, Any] = dict(node.kwargs)
    with contextlib.suppress(TypeError, ValueError):  # no Python function
        given |= inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    return given.get("out") is not None or given.get("inplace", False) is not False


def reads_statistics(node: Node, norm: Node) -> bool:
    """Whether a node reads something of a norm's besides its x, which the norm may change: running statistics."""
    if node.op == "get_attr":
        return norm.op == "call_module" and str(node.target).startswith(f"{norm.target}.")
    return not set(norm.all_input_nodes[1:]).isdisjoint(node.all_input_nodes)


def changes_mode(node: Node) -> bool:
    """Whether gradients, autocast or a level of torch.func are on behind a node as they were not before."""
    return node.op == "call_function" and names_a_mode(str(getattr(node.target, "__name__", "")))


def names_a_mode(name: str) -> bool:
    """Whether a function of this name turns something on or off for all that comes behind it."""
    return any(mode in name for mode in _MODES)
