"""What follows a call of a norm in the text of a method, and whether it can become part of the call.

Followed is the value: through the expression around the call, and through the name it is given, to the next statement
that mentions that name. Everything that this does not prove is refused, with its reason.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from torch import nn

from .effects import names_a_mode
from .flow import Flow, NotProved, is_name, mentions_of, where
from .fresh import is_fresh, is_pure, takes_one
from .patterns import (
    METHODS,
    Act,
    activation_of_call,
    activation_of_method,
    activation_of_module,
    has_hooks,
    is_add,
)
from .record import is_norm
from .source import UNKNOWN, Method, chain, function_of, resolve

__all__ = ["Site", "is_returned", "match"]

_EXITS = (ast.Return, ast.Raise, ast.Break, ast.Continue, ast.Yield, ast.YieldFrom, ast.Await)
_NAMES = (ast.Name, ast.Attribute, ast.Assign, ast.expr_context)  # nothing is computed
_SCOPES = ("locals", "vars", "eval", "exec", "globals", "_getframe", "dir")


@dataclass
class Site:
    """A call of a norm, and what becomes part of it.

    act, act_node: the activation and its call. residual: what is added, in sum_node; norm_on_the_right: to its right;
    in_place: the sum is written into the norm's output. named: before the sum (or activation) the value was given these
    names. add_statement: `y.add_(residual)`, a statement of its own. returned: instead of all this, the method returns
    the value to a caller that has the rest.
    """

    method: Method
    call: ast.Call
    act: Act | None = None
    act_node: ast.Call | None = None
    act_is_module: bool = False
    residual: ast.expr | None = None
    norm_on_the_right: bool = False
    in_place: bool = False
    sum_node: ast.BinOp | ast.Call | ast.AugAssign | None = None
    assumed: set[str] = field(default_factory=set)
    named: list[ast.Assign] = field(default_factory=list)
    returned: bool = False
    add_statement: ast.Expr | None = None

    @property
    def text(self) -> str:
        return " + ".join([*(["add"] if self.sum_node else []), *([self.act.name] if self.act else [])])


def match(method: Method, call: ast.Call) -> Site:
    """What can be fused with the norm that `call` calls. Raises NotProved where that is nothing."""
    if method.fixed is not None:
        raise NotProved(method.fixed)
    if len(call.args) != 1 or call.keywords or isinstance(call.args[0], ast.Starred):
        raise NotProved(f"is called with more than one argument, {where(method)}")
    outer = method.parent(call)
    while outer is not method.tree:
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            raise NotProved(f"is called in a function inside {where(method)}")
        outer = method.parent(outer)
    if any(
        isinstance(node, (ast.Global, ast.Nonlocal))
        or (isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) in _SCOPES)
        for node in ast.walk(method.tree)
    ):
        raise NotProved(f"is called in {where(method)}, which reaches its own variables in other ways")
    site = Site(method, call)
    follow = _Follow(site)
    follow.run()
    if site.sum_node is None and site.act is None:
        raise NotProved(follow.end)
    return site


class _Follow(Flow):
    def __init__(self, site: Site) -> None:
        super().__init__(site.method)
        self.site = site

    def run(self) -> None:
        node: ast.AST = self.site.call
        named: list[ast.Assign] = []
        names: list[str] = []  # `y += r` and `y.add_(r)` name the sum as well, and assign nothing
        while self.site.act is None:
            parent = self.method.parent(node)
            if self._activation(node, parent, names) or self._sum(node, parent, named):
                assert self.site.act_node is not None or self.site.sum_node is not None
                node = self.site.act_node or self.site.sum_node  # type: ignore[assignment]
                if not self.site.act_node:
                    self.site.named = named
                    named, names = [], []
                continue
            target = self._target(node, parent)
            if target is None:
                break
            mention = self.next_mention(target, self.statement(node))
            if mention is None:
                break
            names.append(target)
            if isinstance(parent, ast.Assign):
                named = [*named, parent]
            node = mention
            if isinstance(mention, ast.AugAssign):
                if self.site.sum_node is not None or not self._take_sum(mention, mention.value, False, True, named):
                    break
                self.site.named, named, names = named, [], []
        if self.site.act is not None and self.site.sum_node is None:
            self.site.named = named

    # ---- one step ----

    def _activation(self, node: ast.AST, parent: ast.AST, names: list[str]) -> bool:
        act, call = None, parent
        if isinstance(parent, ast.Attribute) and parent.value is node and parent.attr in METHODS:
            call = self.method.parent(parent)
            if isinstance(call, ast.Call) and call.func is parent and not call.args and not call.keywords:
                act = activation_of_method(parent.attr)
        elif isinstance(parent, ast.Call) and parent.args and parent.args[0] is node:
            act = self._activation_call(parent)
        if act is None or not isinstance(call, ast.Call):
            return False
        statement = self.statement(call)
        alone = isinstance(statement, ast.Expr) and statement.value is call
        if alone and not (act.in_place and isinstance(node, ast.Name)):
            self.end = f"is followed by an activation whose result nobody takes, in {where(self.method)}"
            return False
        # `self.relu(y)`, in place, changes the value under all of its names.
        if not alone and not self.dead_afterwards(names, statement):
            return False
        if not self._may_act_earlier(call, statement):
            return False
        self.site.act, self.site.act_node = act, call
        self.site.act_is_module = isinstance(resolve(call.func, self.method), nn.Module)
        return True

    def _may_act_earlier(self, call: ast.Call, statement: ast.stmt) -> bool:
        """Whether the activation may run where the norm or the sum does: what stands between sets none of its settings,
        and does not turn gradients or autocast on or off."""
        first, function = self.statement(self.site.sum_node or self.site.call), ast.unparse(call.func)
        rest = self.rest(first)
        place = next((i for i, item in enumerate(rest) if item is statement), 0)
        for node in (node for between in rest[:place] for node in ast.walk(between)):
            changes = False
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                changes = called == "setattr" or names_a_mode(called)
            elif isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
                changes = f"{ast.unparse(node)}.".startswith(f"{function}.")
            if changes:
                self.end = f"is followed by `{function}` after `{ast.unparse(node)}`, which may change what it does"
                return False
        return True

    def _activation_call(self, call: ast.Call) -> Act | None:
        callee = resolve(call.func, self.method)
        if isinstance(callee, nn.Module):
            if len(call.args) != 1 or call.keywords or (act := activation_of_module(callee)) is None:
                self.end = f"is followed by a {type(callee).__name__} in {where(self.method)}"
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
        kwargs = {k.arg: k.value.value for k in call.keywords if k.arg and isinstance(k.value, ast.Constant)}
        if len(call.args) != 2 or len(kwargs) != len(call.keywords):
            return False
        if not is_add(function_of(call.func, self.method), kwargs):
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
        statement = self.statement(node)
        if isinstance(residual, (ast.Constant, ast.Starred, ast.UnaryOp)) or _broadcasts(residual):
            self.end = f"is added to what has another shape, in {where(self.method)}"
            return False
        alone = statement if isinstance(statement, ast.Expr) and statement.value is node else None
        if alone is not None and not (in_place and named and _is_method_of_name(node)):
            self.end = f"is added to in a statement of its own, in {where(self.method)}"
            return False
        names = [assign.targets[0].id for assign in named if isinstance(assign.targets[0], ast.Name)]
        if alone is not None:
            names.pop()  # `y.add_(residual)` becomes `y = ...`
        if not self.dead_afterwards(names, statement) or not self._may_move(named, node, residual, right):
            return False
        self.site.sum_node, self.site.residual = node, residual
        self.site.norm_on_the_right, self.site.in_place, self.site.add_statement = right, in_place, alone
        return True

    def _target(self, node: ast.AST, parent: ast.AST) -> str | None:
        """The name that the value is given."""
        if isinstance(node, ast.AugAssign):
            return node.target.id if isinstance(node.target, ast.Name) else None
        if parent is self.site.add_statement and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return node.func.value.id if isinstance(node.func.value, ast.Name) else None
        if isinstance(parent, ast.Assign) and parent.value is node and len(parent.targets) == 1:
            target = parent.targets[0]
            return target.id if isinstance(target, ast.Name) else None
        if isinstance(parent, ast.Call) and self.end.startswith("is not followed"):
            self.end = f"is followed by `{ast.unparse(parent.func)}`, in {where(self.method)}"
        return None

    # ---- moving the norm to where the sum is ----

    def _may_move(self, named: list[ast.Assign], sum_node: ast.AST, residual: ast.expr, right: bool) -> bool:
        """Whether the norm may run after what stands between it and the sum: the other operand, statements, and what
        the sum's own statement runs before it."""
        between: list[ast.AST] = [residual]
        if named:
            block = self.block(named[0])
            places = {id(s): i for i, s in enumerate(block)}
            last = self.statement(sum_node)
            between += [s for s in block[places[id(named[0])] + 1 : places[id(last)]] if s not in named]
            between += self.run_before(sum_node)
        if any(isinstance(node, _EXITS) for part in between for node in ast.walk(part)):
            self.end = f"is added to after a way out of {where(self.method)}"
            return False
        if len(named) > 1 and any(isinstance(node, ast.Call) for part in between[1:] for node in ast.walk(part)):
            self.end = f"is renamed before it is added to, in {where(self.method)}"
            return False
        moved = resolve(self.site.call.func, self.method)
        for part in (*between, self._made_by()):
            for node in ast.walk(part):
                if isinstance(node, ast.Call) and isinstance(resolve(node.func, self.method), nn.Module):
                    self._assume(node.func)  # another module in its place may work in place
        for node in (node for part in between for node in ast.walk(part)):
            if isinstance(node, ast.Attribute) and resolve(node.value, self.method) is moved:
                self.end = f"is added to after `{ast.unparse(node)}`, which it may change"
                return False
            if isinstance(node, ast.Call) and self._is_method(node.func):
                self.end = f"is added to after `{ast.unparse(node)}`, which may read what it changes"
                return False
        stays = right and not named
        if isinstance(moved, nn.Module) and moved._modules and not is_norm(moved) and not stays:
            random = any("drop" in type(m).__name__.lower() for m in moved.modules())
            if not all(isinstance(node, _NAMES) for part in between for node in ast.walk(part)) and (
                random or not is_fresh(moved)
            ):
                self.end = f"is added to what its {type(moved).__name__} may change, if it is computed before"
                return False
        elif self._is_fresh(self.site.call.args[0]):
            return True
        for part in between:
            for node in ast.walk(part):
                changes = isinstance(node, (ast.AugAssign, ast.Delete, ast.With, ast.Try)) or (
                    isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load)
                )
                if changes or (isinstance(node, ast.Call) and not is_pure(resolve(node.func, self.method))):
                    self.end = f"is added to after `{ast.unparse(node)}`, which may change what it reads"
                    return False
        return True

    def _is_method(self, function: ast.expr) -> bool:
        """Whether a call is of the module's own code."""
        found = chain(function)
        own = found is not None and found[0] == self.method.self_name
        return own and not isinstance(resolve(function, self.method), nn.Module)

    def _made_by(self) -> ast.AST:
        """What makes the norm's input: an expression, or the statement before that names it."""
        argument, statement = self.site.call.args[0], self.statement(self.site.call)
        if not isinstance(argument, ast.Name):
            return argument
        block = self.block(statement)
        before = block[: next(i for i, item in enumerate(block) if item is statement)]
        return next((earlier for earlier in reversed(before) if mentions_of(earlier, argument.id)), argument)

    def _is_fresh(self, argument: ast.expr) -> bool:
        """Whether the norm's input is what a convolution has just made."""
        if isinstance(argument, ast.Call):
            return is_fresh(resolve(argument.func, self.method))
        if not isinstance(argument, ast.Name):
            return False
        statement, earlier = self.statement(self.site.call), self._made_by()
        return (
            isinstance(earlier, ast.Assign)
            and len(earlier.targets) == 1
            and is_name(earlier.targets[0], argument.id)
            and isinstance(earlier.value, ast.Call)
            and is_fresh(resolve(earlier.value.func, self.method))
            and isinstance(statement, ast.Assign)
            and is_name(statement.targets[0], argument.id)
        )


def _is_method_of_name(node: ast.AST) -> bool:
    """`y.add_(...)`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)


def _broadcasts(node: ast.expr) -> bool:
    """`t[:, :, None, None]`, whose shape is another than the norm's for all that the text tells."""
    return isinstance(node, ast.Subscript) and any(
        isinstance(part, ast.Constant) and part.value is None for part in ast.walk(node.slice)
    )


def is_returned(method: Method, call: ast.Call) -> bool:
    """Whether `forward(self, x)` returns what `call` gives, on every way through it and unused by anything else."""
    if method.name != "forward" or method.fixed is not None or not takes_one(method) or len(call.args) != 1:
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
        statement = follow.statement(node)
        mention = follow.next_mention(target, statement)
        if mention is None or isinstance(mention, ast.AugAssign):
            return False
        if follow.statement(mention) is not follow.rest(statement)[0]:
            return False  # what is between may see the value by an older name, or change the residual
        node = mention
    return isinstance(returns[0], ast.Return)
