"""Where a value goes in the text of a method, by the names it is given."""

from __future__ import annotations

import ast

from .source import Method

__all__ = ["Flow", "NotProved", "is_name", "mentions_of", "where"]

_SIMPLE = (ast.Assign, ast.AugAssign, ast.Return, ast.Expr, ast.AnnAssign)
_CONDITIONAL = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class NotProved(Exception):
    """Why nothing can be fused with a norm here."""


def where(method: Method) -> str:
    return f"{type(method.owner).__name__}.{method.name}"


def is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def mentions_of(node: ast.AST, name: str) -> list[ast.Name]:
    return [found for found in ast.walk(node) if isinstance(found, ast.Name) and found.id == name]


class Flow:
    """Follows values through one method. end: why the last question was answered with no."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.end = "is not followed by an activation or a sum"

    def statement(self, node: ast.AST) -> ast.stmt:
        while not isinstance(node, ast.stmt):
            node = self.method.parent(node)
        return node

    def block(self, statement: ast.stmt) -> list[ast.stmt]:
        for _, value in ast.iter_fields(self.method.parent(statement)):
            if isinstance(value, list) and any(item is statement for item in value):
                return value
        raise NotProved(f"is called in an unusual statement, in {where(self.method)}")

    def rest(self, statement: ast.stmt) -> list[ast.stmt]:
        block = self.block(statement)
        return block[next(i for i, item in enumerate(block) if item is statement) + 1 :]

    def next_mention(self, name: str, statement: ast.stmt) -> ast.expr | ast.AugAssign | None:
        """The one mention of a name in the next statement that has any; None where there is not exactly one."""
        if name in self.method.function.__code__.co_cellvars or self._is_caught(name, statement):
            self.end = f"is given a name that other code of {where(self.method)} reads"
            return None
        for following in self.rest(statement):
            mentions = mentions_of(following, name)
            if not mentions:
                continue
            line = f"line `{ast.unparse(following).splitlines()[0]}` of {where(self.method)}"
            if isinstance(following, ast.AugAssign) and mentions == [following.target]:
                if isinstance(following.op, ast.Add):
                    return following
                self.end = f"is changed in {line}"
                return None
            loads = [m for m in mentions if isinstance(m.ctx, ast.Load)]
            changed = isinstance(following, ast.AugAssign) and is_name(following.target, name)  # which reads it too
            if not isinstance(following, _SIMPLE) or len(loads) != 1 or changed:
                self.end = f"is used in {line}"
                return None
            node: ast.AST = loads[0]
            while node is not following:
                node = self.method.parent(node)
                if isinstance(node, _CONDITIONAL):
                    self.end = f"is used under a condition, in {line}"
                    return None
            return loads[0]
        self.end = f"is followed by nothing in its own block, in {where(self.method)}"
        return None

    def run_before(self, node: ast.AST) -> list[ast.AST]:
        """The parts of a node's own statement that run before it."""
        parts: list[ast.AST] = []
        while not isinstance(node, ast.stmt):
            parent = self.method.parent(node)
            if not isinstance(parent, ast.Assign):  # its targets come last
                children = list(ast.iter_child_nodes(parent))
                parts += children[: children.index(node)]
            node = parent
        return parts

    def dead_afterwards(self, names: list[str], last: ast.stmt) -> bool:
        """Whether nothing reads these names of the value once `last` has run."""
        for name in names:
            if isinstance(last, ast.AugAssign) and is_name(last.target, name):
                continue
            if isinstance(last, ast.Assign) and len(last.targets) == 1 and is_name(last.targets[0], name):
                continue
            if not self._dead(name, last):
                self.end = f"is used again after `{ast.unparse(last).splitlines()[0]}` in {where(self.method)}"
                return False
        return True

    def _dead(self, name: str, statement: ast.stmt) -> bool:
        if isinstance(statement, ast.Return):
            return not self._in_try(statement)
        current: ast.AST = statement
        while isinstance(current, ast.stmt) and current is not self.method.tree:
            for following in self.rest(current):
                mentions = mentions_of(following, name)
                if not mentions:
                    continue
                return isinstance(following, ast.Assign) and all(isinstance(m.ctx, ast.Store) for m in mentions)
            current = self.method.parent(current)
            while not isinstance(current, ast.stmt):
                current = self.method.parent(current)
            if isinstance(current, (ast.For, ast.While, ast.AsyncFor, ast.Try)):
                return False  # it may come round again
        return True

    def _is_caught(self, name: str, node: ast.AST) -> bool:
        """Whether a handler of exceptions around a statement mentions a name."""
        while node is not self.method.tree:
            node = self.method.parent(node)
            if isinstance(node, ast.Try):
                for part in (*node.handlers, *node.finalbody):
                    if mentions_of(part, name):
                        return True
        return False

    def _in_try(self, node: ast.AST) -> bool:
        while node is not self.method.tree:
            node = self.method.parent(node)
            if isinstance(node, ast.Try):
                return True
        return False
