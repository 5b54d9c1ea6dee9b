"""A method as one instance runs it: tests of the module's own settings (`if self.downsample is not None`) are decided,
and exact nn.Identity are looked through. Whatever else decides what a method does stays."""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable
from typing import Any

from torch import nn

from .patterns import has_hooks
from .source import UNKNOWN, Method, chain, resolve, step

__all__ = ["specialised"]


def specialised(method: Method, changing: set[str]) -> Method:
    specialiser = _Specialiser(method, changing)
    method.tree.body = specialiser.block(method.tree.body)
    method.tree.body = [s for s in method.tree.body if not specialiser.is_unread(s)] or [ast.Pass()]
    method.index()
    return method


def _aliases(method: Method) -> dict[str, ast.expr]:
    """Local names that are given an attribute of the module, and nothing else."""
    stores: dict[str, int] = {}
    for node in ast.walk(method.tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            stores[node.id] = stores.get(node.id, 0) + 1
    return {
        node.targets[0].id: node.value
        for node in ast.walk(method.tree)
        if isinstance(node, ast.Assign)
        and len(node.targets) == 1
        and isinstance(node.targets[0], ast.Name)
        and stores[node.targets[0].id] == 1
        and _asked_for(node.value, method) is not None
    }


def _asked_for(node: ast.expr, method: Method) -> str | None:
    """The attribute that `getattr(self, "name", default)` asks for."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "getattr":
        return None
    if len(node.args) not in (2, 3) or node.keywords:
        return None
    owner, name = node.args[:2]
    named = isinstance(owner, ast.Name) and owner.id == method.self_name and isinstance(name, ast.Constant)
    return name.value if named and isinstance(name.value, str) else None  # type: ignore[attr-defined]


class _Specialiser(ast.NodeTransformer):
    """Decides tests of settings, and takes exact nn.Identity out."""

    def __init__(self, method: Method, changing: set[str]) -> None:
        self.method = method
        self.changing = changing
        self.aliases = _aliases(method)

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        result: list[ast.stmt] = []
        for statement in statements:
            visited = self.visit(statement)
            result += visited if isinstance(visited, list) else [visited]
        return [s for s in result if not _does_nothing(s)]

    def is_unread(self, statement: ast.stmt) -> bool:
        """Whether it names a setting (`aa = getattr(self, "aa", None)`) for tests that have all been decided."""
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if not isinstance(target, ast.Name) or target.id not in self.aliases:
            return False
        mentions = [n for n in ast.walk(self.method.tree) if isinstance(n, ast.Name) and n.id == target.id]
        return mentions == [target] and self._value(target) is not UNKNOWN

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                kept = self.block(value)
                setattr(node, name, kept or ([ast.Pass()] if name == "body" else []))
            elif isinstance(value, list):
                value[:] = [self.visit(v) if isinstance(v, ast.AST) else v for v in value]
            elif isinstance(value, ast.AST):
                setattr(node, name, self.visit(value))
        return node

    def visit_If(self, node: ast.If) -> Any:
        value = self.decide(node.test)
        if value is UNKNOWN:
            return self.generic_visit(node)
        return self.block(node.body if value else node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        value = self.decide(node.test)
        if value is UNKNOWN:
            return self.generic_visit(node)
        return self.visit(node.body if value else node.orelse)

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        if len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred):
            callee = resolve(node.func, self.method)
            if type(callee) is nn.Identity and not has_hooks(callee) and "forward" not in vars(callee):
                self.assume(node.func)
                return node.args[0]
        return node

    def assume(self, node: ast.AST) -> None:
        found = chain(node)
        if found is not None and found[1]:
            self.method.assumed.add(str(found[1][0]))

    def decide(self, test: ast.expr) -> Any:
        """Whether a test that settings decide holds; UNKNOWN for all else. Remembers what it has read."""
        before = set(self.method.assumed)
        value = self._truth(test)
        if value is UNKNOWN:
            self.method.assumed = before
        return value

    def _truth(self, node: ast.expr) -> Any:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self._truth(node.operand)
            return UNKNOWN if value is UNKNOWN else not value
        if isinstance(node, ast.BoolOp):
            truth: Any = UNKNOWN
            for operand in node.values:
                truth = self._truth(operand)
                if truth is UNKNOWN or truth is isinstance(node.op, ast.Or):
                    return truth
            return truth
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self._value(node.left), self._value(node.comparators[0])
            compare: Callable[[Any, Any], Any] | None = _COMPARISONS.get(type(node.ops[0]))
            if left is UNKNOWN or right is UNKNOWN or compare is None:
                return UNKNOWN
            if isinstance(node.ops[0], (ast.Is, ast.IsNot)):
                return compare(left, right)
            if any(isinstance(value, nn.Module) for value in (left, right)):
                return UNKNOWN
            try:
                return bool(compare(left, right))
            except TypeError:
                return UNKNOWN
        value = self._value(node)
        may_be_empty = isinstance(value, nn.Module) and hasattr(value, "__len__")
        return UNKNOWN if value is UNKNOWN or may_be_empty else bool(value)

    def _value(self, node: ast.expr) -> Any:
        """Of a constant, or of an attribute of the module that only its construction sets."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name) and node.id in self.aliases:
            node = self.aliases[node.id]
        if isinstance(node, ast.Call):
            if (name := _asked_for(node, self.method)) is None:
                return UNKNOWN
            on_class = inspect.getattr_static(type(self.method.owner), name, UNKNOWN)
            if len(node.args) == 3 and on_class is UNKNOWN and step(self.method.owner, name) is UNKNOWN:
                self.method.assumed.add(name)
                return self._value(node.args[2])
            node = ast.Attribute(node.args[0], name, ast.Load())
        found = chain(node)
        if found is None or len(found[1]) != 1 or found[1][0] in ("training", *self.changing):
            return UNKNOWN
        value = resolve(node, self.method)
        if value is not None and not isinstance(value, (bool, int, float, str, nn.Module)):
            return UNKNOWN
        self.assume(node)
        return value


_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}


def _does_nothing(statement: ast.stmt) -> bool:
    """`x = x`, which is left of an identity."""
    return (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Name)
        and statement.targets[0].id == statement.value.id
    )
