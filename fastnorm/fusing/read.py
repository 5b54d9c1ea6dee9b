"""The text of a model's methods.

torch.fx would follow one path through a `forward`, for one kind of arguments and one mode; the text has them all.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from torch import nn

from .settings import specialised
from .source import Method, chain

__all__ = ["methods_of"]

#: Overrides of what nn.Module is, not of what it computes.
_MACHINERY = frozenset([*dir(nn.Module), "device", "dtype"]) - {"forward", "__call__", "__getattr__"}


OVERRIDDEN = "is called in a method that another one overrides"


#: Fields of a syntax tree that hold a name.
_IDENTIFIERS = ("id", "attr", "arg", "name", "rest")


class _Mangler(ast.NodeTransformer):
    """Private names as the compiler has them in the class's body."""

    def __init__(self, cls: str) -> None:
        self.cls = cls.lstrip("_")

    def _mangled(self, name: str) -> str:
        return f"_{self.cls}{name}" if name.startswith("__") and not name.endswith("__") else name

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name in _IDENTIFIERS:
            if isinstance(value := getattr(node, name, None), str) and not isinstance(node, ast.Constant):
                setattr(node, name, self._mangled(value))
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            node.names = [self._mangled(name) for name in node.names]
        return super().generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        """The compiler leaves the names of a call's arguments."""
        self.visit(node.value)
        return node

    def visit_alias(self, node: ast.alias) -> ast.AST:
        stored = node.asname or node.name
        if self._mangled(stored) != stored:
            node.asname = self._mangled(stored)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """A class inside: the compiler does it there, by that class's name."""
        return node


@lru_cache(maxsize=4096)
def _parse(function: Any, cls: str) -> ast.FunctionDef | None:
    """A function's tree, without decorators and annotations; None where there is no text. Not to be changed."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError, ValueError):
        return None
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args or tree.args.posonlyargs:
        return None
    _Mangler(cls).visit(tree)
    tree.returns = None
    every = (*tree.args.args, *tree.args.kwonlyargs, tree.args.vararg, tree.args.kwarg)
    for argument in every:
        if argument is not None:
            argument.annotation = None
    # Defaults are the function's own: here they only have to be there.
    tree.args.defaults = [ast.Constant(None) for _ in tree.args.defaults]
    tree.args.kw_defaults = [None if d is None else ast.Constant(None) for d in tree.args.kw_defaults]
    return tree


def methods_of(module: nn.Module) -> tuple[list[Method], bool]:
    """The methods of all classes of `module` but torch's, as it runs them, and whether the text of all was found."""
    found, complete, seen = list[Method](), True, set[str]()
    rewritten = dict(type(module).__dict__["_rewriting"].sources) if "_rewriting" in type(module).__dict__ else {}
    for cls in type(module).__mro__:
        if cls is object or cls.__module__.partition(".")[0] in ("torch", "fastnorm"):
            continue
        for name, value in vars(cls).items():
            if name in _MACHINERY or (name in rewritten and name in seen):
                continue
            for function in _functions(value):
                tree = _parse(function, cls.__name__)
                if tree is None:
                    complete = False
                    continue
                fixed = None
                if name in seen:
                    fixed = OVERRIDDEN
                elif function is not value:
                    fixed = "is called in a property or a classmethod"
                elif tree.decorator_list or hasattr(function, "__wrapped__"):
                    fixed = "is called in a method with a decorator"
                found.append(Method(module, name, copy.deepcopy(tree), function, fixed))
        seen |= vars(cls).keys()
    by_class = {name for method in found for name in _named_by_class(method)}
    found = [method for method in found if method.fixed != OVERRIDDEN or method.name in by_class]
    changing = {name for method in found for name in _stored(method)}
    return [specialised(method, changing) for method in found], complete


def _named_by_class(method: Method) -> Iterator[str]:
    """Methods that a method calls not by its own self: `super().forward`, `Base.forward`."""
    for node in ast.walk(method.tree):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id == method.self_name
        ):
            yield node.attr


def _stored(method: Method) -> Iterator[str]:
    """The attributes that a method sets."""
    for node in ast.walk(method.tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and chain(node.value) is not None:
            yield node.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def _functions(value: Any) -> Iterator[Any]:
    """The functions behind an entry of a class."""
    if isinstance(value, property):
        yield from (f for f in (value.fget, value.fset) if inspect.isfunction(f))
    elif inspect.isfunction(value):
        yield value
    elif isinstance(value, classmethod):
        yield value.__func__
