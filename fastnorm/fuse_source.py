"""The methods of a model's modules as syntax trees, as one instance runs them: what they call, and what they mention.

torch.fx would follow one path through a `forward`, for one kind of arguments and one mode; the text has them all. Tests
of the module's own settings (`if self.downsample is not None`) are decided here, and exact nn.Identity are looked
through; whatever else decides what a method does stays.
"""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .fuse_patterns import has_hooks

__all__ = ["UNKNOWN", "Method", "chain", "function_of", "methods_of", "resolve"]


#: Overrides of what nn.Module is, not of what it computes.
_MACHINERY = frozenset([*dir(nn.Module), "device", "dtype"]) - {"forward", "__call__", "__getattr__"}


OVERRIDDEN = "is called in a method that another one overrides"


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


# ---- reading ----


class _Mangler(ast.NodeTransformer):
    """Private names as the compiler has them in the class's body."""

    def __init__(self, cls: str) -> None:
        self.cls = cls.lstrip("_")

    def _mangled(self, name: str) -> str:
        return f"_{self.cls}{name}" if name.startswith("__") and not name.endswith("__") else name

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        node.attr = self._mangled(node.attr)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._mangled(node.id)
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
    return [_specialised(method, changing) for method in found], complete


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


# ---- what an expression is ----


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


# ---- as one instance runs it ----


def _specialised(method: Method, changing: set[str]) -> Method:
    specialiser = _Specialiser(method, changing)
    method.tree.body = specialiser.block(method.tree.body) or [ast.Pass()]
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
