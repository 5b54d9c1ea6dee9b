"""What follows a call of a norm in the text of a method, and whether it can become part of the call.

Followed is the value: through the expression around the call, and through the name it is given, to the next statement
that mentions that name. Everything that this does not prove is refused, with its reason.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from torch import nn

from .fuse_patterns import (
    METHODS,
    Act,
    activation_of_call,
    activation_of_method,
    activation_of_module,
    has_hooks,
    is_add,
    is_torchs_own,
)
from .fuse_record import is_norm
from .fuse_source import UNKNOWN, Method, function_of, methods_of, resolve
from .modules import Norm

__all__ = ["NotProved", "Site", "is_plain_sequential", "is_returned", "match"]

_SIMPLE = (ast.Assign, ast.AugAssign, ast.Return, ast.Expr, ast.AnnAssign)
_CONDITIONAL = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_EXITS = (ast.Return, ast.Raise, ast.Break, ast.Continue, ast.Yield, ast.YieldFrom, ast.Await)
_SCOPES = ("locals", "vars", "eval", "exec", "globals", "_getframe", "dir")
#: Modules whose output is new memory, which nothing else can see.
_FRESH = tuple(
    cls.forward
    for cls in (
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    )
)


class NotProved(Exception):
    """Why nothing can be fused with a norm here."""


@dataclass
class Site:
    """A call of a norm, and what becomes part of it.

    act, act_node: the activation and its call. residual: what is added, in sum_node; norm_on_the_right: to its right;
    in_place: the sum is written into the norm's output. named: before the sum (or activation) the value was given these
    names. returned: instead, the method returns it to a caller that has the rest.
    """

    method: Method
    call: ast.Call
    act: Act | None = None
    act_node: ast.Call | None = None
    residual: ast.expr | None = None
    norm_on_the_right: bool = False
    in_place: bool = False
    sum_node: ast.BinOp | ast.Call | ast.AugAssign | None = None
    assumed: set[str] = field(default_factory=set)
    named: list[ast.Assign] = field(default_factory=list)
    returned: bool = False

    @property
    def text(self) -> str:
        return " + ".join([*(["add"] if self.sum_node else []), *([self.act.name] if self.act else [])])


def match(method: Method, call: ast.Call) -> Site:
    """What can be fused with the norm that `call` calls. Raises NotProved where that is nothing."""
    if method.fixed is not None:
        raise NotProved(method.fixed)
    if len(call.args) != 1 or call.keywords or isinstance(call.args[0], ast.Starred):
        raise NotProved(f"is called with more than one argument, {_where(method)}")
    outer = method.parent(call)
    while outer is not method.tree:
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            raise NotProved(f"is called in a function inside {_where(method)}")
        outer = method.parent(outer)
    if any(
        isinstance(node, (ast.Global, ast.Nonlocal))
        or (isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) in _SCOPES)
        for node in ast.walk(method.tree)
    ):
        raise NotProved(f"is called in {_where(method)}, which reaches its own variables in other ways")
    site = Site(method, call)
    follow = _Follow(site)
    follow.run()
    if site.sum_node is None and site.act is None:
        raise NotProved(follow.end)
    return site


def _where(method: Method) -> str:
    return f"{type(method.owner).__name__}.{method.name}"


class _Follow:
    def __init__(self, site: Site) -> None:
        self.site = site
        self.method = site.method
        self.end = "is not followed by an activation or a sum"

    def run(self) -> None:
        node: ast.AST = self.site.call
        named: list[ast.Assign] = []
        while self.site.act is None:
            parent = self.method.parent(node)
            if self._activation(node, parent, named) or self._sum(node, parent, named):
                assert self.site.act_node is not None or self.site.sum_node is not None
                node = self.site.act_node or self.site.sum_node  # type: ignore[assignment]
                if not self.site.act_node:
                    self.site.named = named
                    named = []
                continue
            target = self._target(node, parent)
            if target is None:
                break
            mention = self._next_mention(target, self._statement(node))
            if mention is None:
                break
            if isinstance(parent, ast.Assign):
                named = [*named, parent]
            node = mention
            if isinstance(mention, ast.AugAssign):
                if self.site.sum_node is not None or not self._take_sum(mention, mention.value, False, True, named):
                    break
                self.site.named, named = named, []
        if self.site.act is not None and self.site.sum_node is None:
            self.site.named = named

    # ---- one step ----

    def _activation(self, node: ast.AST, parent: ast.AST, named: list[ast.Assign]) -> bool:
        act, call = None, parent
        if isinstance(parent, ast.Attribute) and parent.value is node and parent.attr in METHODS:
            call = self.method.parent(parent)
            if isinstance(call, ast.Call) and call.func is parent and not call.args and not call.keywords:
                act = activation_of_method(parent.attr)
        elif isinstance(parent, ast.Call) and parent.args and parent.args[0] is node:
            act = self._activation_call(parent)
        if act is None or not isinstance(call, ast.Call):
            return False
        statement = self._statement(call)
        changes_name = act.in_place and isinstance(node, ast.Name)
        if isinstance(statement, ast.Expr) and statement.value is call and not changes_name:
            self.end = f"is followed by an activation whose result nobody takes, in {_where(self.method)}"
            return False
        if not self._dead_afterwards(named, statement):
            return False
        self.site.act, self.site.act_node = act, call
        return True

    def _activation_call(self, call: ast.Call) -> Act | None:
        callee = resolve(call.func, self.method)
        if isinstance(callee, nn.Module):
            if len(call.args) != 1 or call.keywords or (act := activation_of_module(callee)) is None:
                self.end = f"is followed by a {type(callee).__name__} in {_where(self.method)}"
                return None
            if has_hooks(callee):
                self.end = f"is followed by a {type(callee).__name__} with hooks"
                return None
            self._assume(call.func)
            return act
        function = function_of(call.func, self.method)
        try:
            args = [ast.literal_eval(arg) for arg in call.args[1:]]
            kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        except ValueError:
            return None
        return None if function is UNKNOWN else activation_of_call(function, args, kwargs)

    def _assume(self, node: ast.AST) -> None:
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                self.site.assumed.add(node.attr)
            node = node.value

    def _sum(self, node: ast.AST, parent: ast.AST, named: list[ast.Assign]) -> bool:
        if self.site.sum_node is not None:
            return False
        if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Add):
            right = parent.right is node
            return self._take_sum(parent, parent.left if right else parent.right, right, False, named)
        call = parent
        if isinstance(parent, ast.Attribute) and parent.value is node and parent.attr in ("add", "add_"):
            call = self.method.parent(parent)
            if not isinstance(call, ast.Call) or call.func is not parent or len(call.args) != 1 or call.keywords:
                return False
            return self._take_sum(call, call.args[0], False, parent.attr == "add_", named)
        if not isinstance(call, ast.Call) or node not in call.args:
            return False
        if len(call.args) != 2 or call.keywords or not is_add(function_of(call.func, self.method), {}):
            return False
        right = call.args[1] is node
        in_place = getattr(function_of(call.func, self.method), "__name__", "") == "iadd"
        if in_place and right:
            return False
        return self._take_sum(call, call.args[0] if right else call.args[1], right, in_place, named)

    def _take_sum(
        self,
        node: ast.BinOp | ast.Call | ast.AugAssign,
        residual: ast.expr,
        right: bool,
        in_place: bool,
        named: list[ast.Assign],
    ) -> bool:
        statement = self._statement(node)
        if isinstance(residual, (ast.Constant, ast.Starred, ast.UnaryOp)) or _broadcasts(residual):
            self.end = f"is added to what has another shape, in {_where(self.method)}"
            return False
        if isinstance(node, ast.Call) and isinstance(statement, ast.Expr) and statement.value is node:
            self.end = f"is added to in a statement of its own, in {_where(self.method)}"
            return False
        if not self._dead_afterwards(named, statement) or not self._may_move(named, statement, residual):
            return False
        self.site.sum_node, self.site.residual = node, residual
        self.site.norm_on_the_right, self.site.in_place = right, in_place
        return True

    def _target(self, node: ast.AST, parent: ast.AST) -> str | None:
        """The name that the value is given."""
        if isinstance(node, ast.AugAssign):
            return node.target.id if isinstance(node.target, ast.Name) else None
        if isinstance(parent, ast.Assign) and parent.value is node and len(parent.targets) == 1:
            target = parent.targets[0]
            return target.id if isinstance(target, ast.Name) else None
        if isinstance(parent, ast.Call) and self.end.startswith("is not followed"):
            self.end = f"is followed by `{ast.unparse(parent.func)}`, in {_where(self.method)}"
        return None

    # ---- where a value goes ----

    def _statement(self, node: ast.AST) -> ast.stmt:
        while not isinstance(node, ast.stmt):
            node = self.method.parent(node)
        return node

    def _block(self, statement: ast.stmt) -> list[ast.stmt]:
        for _, value in ast.iter_fields(self.method.parent(statement)):
            if isinstance(value, list) and any(item is statement for item in value):
                return value
        raise NotProved(f"is called in an unusual statement, in {_where(self.method)}")

    def _rest(self, statement: ast.stmt) -> list[ast.stmt]:
        block = self._block(statement)
        return block[next(i for i, item in enumerate(block) if item is statement) + 1 :]

    def _next_mention(self, name: str, statement: ast.stmt) -> ast.expr | ast.AugAssign | None:
        """The one mention of a name in the next statement that has any; None where there is not exactly one."""
        for following in self._rest(statement):
            mentions = _loads_and_stores(following, name)
            if not mentions:
                continue
            where = f"line `{ast.unparse(following).splitlines()[0]}` of {_where(self.method)}"
            if isinstance(following, ast.AugAssign) and mentions == [following.target]:
                if isinstance(following.op, ast.Add):
                    return following
                self.end = f"is changed in {where}"
                return None
            loads = [m for m in mentions if isinstance(m.ctx, ast.Load)]
            if not isinstance(following, _SIMPLE) or len(loads) != 1:
                self.end = f"is used in {where}"
                return None
            node: ast.AST = loads[0]
            while node is not following:
                node = self.method.parent(node)
                if isinstance(node, _CONDITIONAL):
                    self.end = f"is used under a condition, in {where}"
                    return None
            return loads[0]
        self.end = f"is followed by nothing in its own block, in {_where(self.method)}"
        return None

    def _dead_afterwards(self, named: list[ast.Assign], last: ast.stmt) -> bool:
        """Whether nothing reads the names of the value once `last` has run."""
        for assign in named:
            target = assign.targets[0]
            assert isinstance(target, ast.Name)
            if isinstance(last, ast.Expr) or (isinstance(last, ast.AugAssign) and _is_name(last.target, target.id)):
                continue
            if isinstance(last, ast.Assign) and len(last.targets) == 1 and _is_name(last.targets[0], target.id):
                continue
            if not self._dead(target.id, last):
                self.end = f"is used again after `{ast.unparse(last).splitlines()[0]}` in {_where(self.method)}"
                return False
        return True

    def _dead(self, name: str, statement: ast.stmt) -> bool:
        if isinstance(statement, ast.Return):
            return not self._in_try(statement)
        current: ast.AST = statement
        while isinstance(current, ast.stmt) and current is not self.method.tree:
            for following in self._rest(current):
                mentions = _loads_and_stores(following, name)
                if not mentions:
                    continue
                return isinstance(following, ast.Assign) and all(isinstance(m.ctx, ast.Store) for m in mentions)
            current = self.method.parent(current)
            while not isinstance(current, ast.stmt):
                current = self.method.parent(current)
            if isinstance(current, (ast.For, ast.While, ast.AsyncFor, ast.Try)):
                return False  # it may come round again
        return True

    def _in_try(self, node: ast.AST) -> bool:
        while node is not self.method.tree:
            node = self.method.parent(node)
            if isinstance(node, ast.Try):
                return True
        return False

    # ---- moving the norm to where the sum is ----

    def _may_move(self, named: list[ast.Assign], last: ast.stmt, residual: ast.expr) -> bool:
        """Whether the norm may run after what stands between it and the sum: the other operand, and statements."""
        between: list[ast.AST] = [residual]
        if named:
            block = self._block(named[0])
            places = {id(s): i for i, s in enumerate(block)}
            between += [s for s in block[places[id(named[0])] + 1 : places[id(last)]] if s not in named]
        if any(isinstance(node, _EXITS) for part in between for node in ast.walk(part)):
            self.end = f"is added to after a way out of {_where(self.method)}"
            return False
        if len(named) > 1 and any(isinstance(node, ast.Call) for part in between[1:] for node in ast.walk(part)):
            self.end = f"is renamed before it is added to, in {_where(self.method)}"
            return False
        moved = resolve(self.site.call.func, self.method)
        if isinstance(moved, nn.Module) and moved._modules and not is_norm(moved):
            random = any("drop" in type(m).__name__.lower() for m in moved.modules())
            if any(isinstance(node, ast.Call) for part in between for node in ast.walk(part)) and (
                random or not is_fresh(moved)
            ):
                self.end = f"is added to after calls, which its {type(moved).__name__} may not be moved behind"
                return False
        elif self._is_fresh(self.site.call.args[0]):
            return True
        for part in between:
            for node in ast.walk(part):
                changes = isinstance(node, (ast.AugAssign, ast.Delete, ast.With, ast.Try)) or (
                    isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load)
                )
                if changes or (isinstance(node, ast.Call) and not self._is_pure(node)):
                    self.end = f"is added to after `{ast.unparse(node)}`, which may change what it reads"
                    return False
        return True

    def _is_fresh(self, argument: ast.expr) -> bool:
        """Whether the norm's input is what a convolution has just made."""
        if isinstance(argument, ast.Call):
            return is_fresh(resolve(argument.func, self.method))
        statement = self._statement(self.site.call)
        if not isinstance(argument, ast.Name):
            return False
        block = self._block(statement)
        before = block[: next(i for i, item in enumerate(block) if item is statement)]
        for earlier in reversed(before):
            if _loads_and_stores(earlier, argument.id):
                return (
                    isinstance(earlier, ast.Assign)
                    and len(earlier.targets) == 1
                    and _is_name(earlier.targets[0], argument.id)
                    and isinstance(earlier.value, ast.Call)
                    and is_fresh(resolve(earlier.value.func, self.method))
                    and isinstance(statement, ast.Assign)
                    and _is_name(statement.targets[0], argument.id)
                )
        return False

    def _is_pure(self, call: ast.Call) -> bool:
        """Whether a call changes none of its arguments: one of torch.nn's modules, none of which works in place."""
        callee = resolve(call.func, self.method)
        if is_fresh(callee):
            return isinstance(callee, nn.Module) and not any(has_hooks(m) for m in callee.modules())
        return isinstance(callee, nn.Module) and all(
            (is_torchs_own(m) or isinstance(m, Norm)) and not getattr(m, "inplace", False) and not has_hooks(m)
            for m in callee.modules()
        )


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _loads_and_stores(node: ast.AST, name: str) -> list[ast.Name]:
    return [found for found in ast.walk(node) if isinstance(found, ast.Name) and found.id == name]


def _broadcasts(node: ast.expr) -> bool:
    """`t[:, :, None, None]`, whose shape is another than the norm's for all that the text tells."""
    return isinstance(node, ast.Subscript) and any(
        isinstance(part, ast.Constant) and part.value is None for part in ast.walk(node.slice)
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
    if method is None or not _takes_one(method) or not method.tree.body:
        return False
    name, first = method.tree.args.args[1].arg, method.tree.body[0]
    loads = [m for m in _loads_and_stores(method.tree, name) if isinstance(m.ctx, ast.Load)]
    inside = [m for m in loads if any(m is node for node in ast.walk(first))]
    call = method.parent(inside[0]) if len(inside) == 1 else None
    if not isinstance(first, ast.Assign) or not isinstance(call, ast.Call):
        return False
    again = len(loads) > 1 and not (len(first.targets) == 1 and _is_name(first.targets[0], name))
    return not again and call.args == inside and is_fresh(resolve(call.func, method))


def _takes_one(method: Method) -> bool:
    """Whether a method has one parameter besides self."""
    args = method.tree.args
    return len(args.args) == 2 and not (args.vararg or args.kwarg or args.kwonlyargs or args.defaults)


def is_returned(method: Method, call: ast.Call) -> bool:
    """Whether `forward(self, x)` returns what `call` gives, on every way through it and unused by anything else."""
    if method.name != "forward" or method.fixed is not None or not _takes_one(method) or len(call.args) != 1:
        return False
    returns = [node for node in ast.walk(method.tree) if isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom))]
    if len(returns) != 1 or returns[0] is not method.tree.body[-1] or call.keywords:
        return False
    follow = _Follow(Site(method, call))
    node: ast.AST = call
    while method.parent(node) is not returns[0]:
        parent = method.parent(node)
        target = follow._target(node, parent)
        if target is None or method.parent(parent) is not method.tree:
            return False
        mention = follow._next_mention(target, follow._statement(node))
        if mention is None or isinstance(mention, ast.AugAssign):
            return False
        node = mention
    return isinstance(returns[0], ast.Return)


def is_plain_sequential(module: object) -> bool:
    """Whether a module does what nn.Sequential does, and nothing else."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
    )
