"""A method of a module as a syntax tree, and what the expressions in it are on the instance."""

from __future__ import annotations

import ast
import builtins
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["UNKNOWN", "Method", "chain", "function_of", "resolve", "step"]


class _Unknown:
    """What only a run can tell."""


UNKNOWN = _Unknown()


@dataclass
class Method:
    """A method as one instance runs it."""

    owner: nn.Module
    name: str
    tree: ast.FunctionDef
    function: Any
    #: Why it cannot be rewritten; None if it can.
    fixed: str | None
    #: Attributes of the owner that the decided tests have read.
    assumed: set[str] = field(default_factory=set)
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)

    @property
    def self_name(self) -> str:
        return self.tree.args.args[0].arg

    def locals(self) -> set[str]:
        code = self.function.__code__
        return {*code.co_varnames, *code.co_cellvars}

    def parent(self, node: ast.AST) -> ast.AST:
        return self.parents[node]

    def index(self) -> None:
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}


def chain(node: ast.AST) -> tuple[str, list[str | int]] | None:
    """`self.layers[0].conv` -> ("self", ["layers", 0, "conv"])."""
    steps: list[str | int] = []
    while True:
        if isinstance(node, ast.Attribute):
            steps.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript) and (key := _constant(node.slice)) is not None:
            steps.append(key)
            node = node.value
        elif isinstance(node, ast.Name):
            return node.id, steps[::-1]
        else:
            return None


def _constant(node: ast.AST) -> str | int | None:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return None
    return value if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def step(value: object, key: str | int) -> object:
    """One step of a chain; UNKNOWN where code of the user's would run."""
    if isinstance(value, nn.Module):
        if isinstance(key, str):
            for place in (vars(value), value._modules, value._parameters, value._buffers):
                if key in place:
                    return place[key]
            static = inspect.getattr_static(type(value), key, UNKNOWN)
            return static if isinstance(static, (bool, int, float, str, type(None))) else UNKNOWN
        if isinstance(value, (nn.Sequential, nn.ModuleList)):
            children = list(value._modules.values())
            return children[key] if -len(children) <= key < len(children) else UNKNOWN
    if isinstance(value, (list, tuple, dict)) and not isinstance(key, str) and not isinstance(value, dict):
        return value[key] if -len(value) <= key < len(value) else UNKNOWN
    if isinstance(value, nn.ModuleDict) and isinstance(key, str) and key in value._modules:
        return value._modules[key]
    return UNKNOWN


def resolve(node: ast.AST, method: Method) -> object:
    """What a chain from `self` is, on the instance; UNKNOWN for all else."""
    found = chain(node)
    if found is None or found[0] != method.self_name:
        return UNKNOWN
    value: object = method.owner
    for key in found[1]:
        value = step(value, key)
        if value is UNKNOWN:
            return UNKNOWN
    return value


def function_of(node: ast.AST, method: Method) -> object:
    """What a chain from a global name is (`F.relu`); UNKNOWN for all else."""
    found = chain(node)
    if found is None or found[0] in method.locals():
        return UNKNOWN
    name, steps = found
    places: list[dict[str, Any]] = [method.function.__globals__, vars(builtins)]
    code, cells = method.function.__code__, method.function.__closure__ or ()
    if name in code.co_freevars:
        try:
            places = [{name: cells[code.co_freevars.index(name)].cell_contents}]
        except ValueError:
            return UNKNOWN
    value: object = next((place[name] for place in places if name in place), UNKNOWN)
    for key in steps:
        namespace = isinstance(value, (type(torch), torch._ops.OpOverloadPacket)) or value in (Tensor, torch.ops)
        if value is UNKNOWN or not isinstance(key, str) or not namespace:
            return UNKNOWN
        value = getattr(value, key, UNKNOWN)
    return value
