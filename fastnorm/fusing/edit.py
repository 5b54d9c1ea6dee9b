"""Methods with the calls that `match` has found made one."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from typing import Any

from .calls import RESIDUAL
from .match import Site
from .source import Method

__all__ = ["edited"]


def edited(method: Method, sites: list[Site]) -> str:
    """The text of a method with the calls at `sites` fused. A site that the method returns takes the residual that the
    method is called with."""
    editor = _Editor(sites)
    tree = editor.visit(method.tree)
    if any(site.returned for site in sites):
        tree.args.vararg = ast.arg(RESIDUAL)
    return ast.unparse(ast.fix_missing_locations(tree))


class _Editor(ast.NodeTransformer):
    def __init__(self, sites: list[Site]) -> None:
        self.edits: dict[int, Callable[[Any], ast.AST]] = {}
        for site in sites:
            self._take(site)

    def _take(self, site: Site) -> None:
        act: ast.expr = ast.Constant(None)
        if site.act is not None and site.act_node is not None:
            # A module is asked at each call what it is.
            given = ast.Tuple([ast.Constant(item) for item in site.act[:2]], ast.Load())
            act = copy.deepcopy(site.act_node.func) if site.act_is_module else given

        def fused(x: ast.expr, residual: ast.expr | None) -> ast.Call:
            norm, rest = site.call.func, [act, ast.Constant(site.in_place)]
            if site.norm_on_the_right:
                return _call("fastnorm_add", [residual or ast.Constant(None), norm, x, act])
            if site.sum_node is not None and residual is not None:
                return _call("fastnorm_sum", [norm, x, residual, *rest])
            return _call("fastnorm_call", [norm, x, ast.Constant(None), act])

        def fused_sum(node: Any) -> ast.AST:
            operand, residual = _operands(node, site.norm_on_the_right)
            call = fused(operand if site.named else site.call.args[0], residual)
            if isinstance(node, ast.AugAssign):
                return ast.Assign([node.target], call)
            return call

        if site.returned:
            passed_on = ast.Starred(ast.Name(RESIDUAL, ast.Load()), ast.Load())
            self.edits[id(site.call)] = lambda node: _call("fastnorm_call", [node.func, node.args[0], passed_on])
        elif site.sum_node is None:
            self.edits[id(site.call)] = lambda node: fused(node.args[0], None)
        else:
            self.edits[id(site.sum_node)] = fused_sum
            if site.named:
                self.edits[id(site.call)] = lambda node: node.args[0]
        if site.add_statement is not None:
            self.edits[id(site.add_statement)] = _assigned(site)
        if site.act_node is not None:
            self.edits[id(site.act_node)] = _subject

    def visit(self, node: ast.AST) -> Any:
        """Inside first: an operand may be edited as well."""
        visited = self.generic_visit(node)
        edit = self.edits.get(id(node))
        if edit is not None:
            visited = edit(visited)
        if (
            isinstance(visited, ast.Assign)
            and isinstance(visited.value, ast.Name)
            and isinstance(visited.targets[0], ast.Name)
            and len(visited.targets) == 1
            and visited.targets[0].id == visited.value.id
        ):
            return ast.Pass()  # `x = x`
        return visited


def _call(function: str, args: list[ast.expr]) -> ast.Call:
    return ast.Call(ast.Name(function, ast.Load()), args, [])


def _assigned(site: Site) -> Callable[[Any], ast.AST]:
    """`y.add_(residual)` as a statement that gives y its new value."""
    name = site.named[-1].targets[0]
    return lambda statement: ast.Assign([copy.copy(name)], statement.value)


def _subject(call: ast.Call) -> ast.expr:
    """The tensor that an activation is called on."""
    if call.args:
        return call.args[0]
    assert isinstance(call.func, ast.Attribute)
    return call.func.value


def _operands(node: Any, norm_on_the_right: bool) -> tuple[ast.expr, ast.expr]:
    """The norm's side of a sum, and the other."""
    if isinstance(node, ast.AugAssign):
        target = copy.copy(node.target)
        target.ctx = ast.Load()
        return target, node.value
    if isinstance(node, ast.BinOp):
        left, right = node.left, node.right
    elif len(node.args) == 2:
        left, right = node.args
    else:
        left, right = node.func.value, node.args[0]
    return (right, left) if norm_on_the_right else (left, right)
