"""Graphs of torch.fx and torch.export: norm, sum and activation become one node.

A graph has one path, so users of a node are all there are.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from .. import functional
from .containers import mark, why_unfit
from .effects import between, changes_mode, reads_statistics, writes
from .patterns import (
    Act,
    activation_of_call,
    activation_of_method,
    activation_of_module,
    has_hooks,
    is_add,
)
from .record import GRAPH, Fusion, fusion_of, is_norm
from .ungraph import NODE, NOTES, Replaced, Step

__all__ = ["fuse_graph"]

aten = torch.ops.aten


#: An operator of aten's -> ours, and its arguments.
_ATEN: dict[Any, Callable[..., Any]] = {
    aten.batch_norm.default: lambda x, weight, bias, mean, var, training, momentum, eps, *_: (
        functional.batch_norm,
        (x, mean, var, weight, bias, training, momentum, eps),
    ),
    aten.instance_norm.default: lambda x, weight, bias, mean, var, use_input_stats, momentum, eps, *_: (
        functional.instance_norm,
        (x, mean, var, weight, bias, use_input_stats, momentum, eps),
    ),
    aten.group_norm.default: lambda x, groups, weight=None, bias=None, eps=1e-5, *_: (
        functional.group_norm,
        (x, groups, weight, bias, eps),
    ),
    aten.layer_norm.default: lambda x, shape, weight=None, bias=None, eps=1e-5, *_: (
        functional.layer_norm,
        (x, shape, weight, bias, eps),
    ),
}
#: A function of torch.nn.functional -> ours, with the same arguments.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    getattr(F, name): getattr(functional, name) for name in ("batch_norm", "instance_norm", "group_norm", "layer_norm")
}


#: Arguments of aten's operators that torch.nn.functional's functions do not take stand behind these.
_FIRST_EXTRA = {
    aten.batch_norm.default: 8,
    aten.instance_norm.default: 8,
    aten.group_norm.default: 5,
    aten.layer_norm.default: 5,
}


@dataclass
class _Found:
    """What follows a norm's node. last: the node whose value is the result; nodes: what goes; place: the norm or the
    sum, where all of it will run."""

    last: Node
    nodes: list[Node]
    place: Node
    act: Act | None = None
    residual: Node | None = None
    in_place: bool = False

    @property
    def text(self) -> str:
        return " + ".join([*(["add"] if self.residual else []), *([self.act.name] if self.act else [])])


def fuse_graph(graph: torch.fx.GraphModule, refusals: dict[int, str]) -> None:
    """Fuse the norms of a graph, modules and functions, in place. refusals: gets the reasons, by id(module)."""
    changed = False
    notes: dict[str, tuple[str, str]] = {}
    for node in list(graph.graph.nodes):
        module = _module(graph, node)
        is_function = node.op == "call_function" and (node.target in _ATEN or node.target in _FUNCTIONS)
        if (module is None or not is_norm(module)) and not is_function:
            continue
        if module is not None and (fusion := fusion_of(module)) is not None and fusion.place == GRAPH:
            continue
        found = _follow(graph, node)
        reason = found if isinstance(found, str) else _why_unfit(graph, node, module)
        if reason is None and isinstance(found, _Found):
            _replace(graph, node, module, found)
            changed = True
        if module is not None and reason is not None:
            refusals[id(module)] = reason
        elif module is None:
            name = getattr(node.target, "__name__", str(node.target))
            notes[node.name] = (name, f"not fused: {reason}" if reason else f"fused with {found.text} from the graph")  # type: ignore[union-attr]
    if notes:
        graph.meta[NOTES] = {**notes, **graph.meta.get(NOTES, {})}
    if changed:
        graph.graph.lint()
        graph.recompile()


def _module(graph: torch.fx.GraphModule, node: Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _why_unfit(graph: torch.fx.GraphModule, node: Node, norm: nn.Module | None) -> str | None:
    if norm is None:
        return None
    if (reason := why_unfit(norm)) is not None:
        return reason
    if len(node.args) != 1 or node.kwargs:
        return "is called with more than one argument"
    if sum(_module(graph, other) is norm for other in graph.graph.nodes) > 1:
        return "is called in several places"
    if not vars(norm).keys().isdisjoint(("activation", "activation_param")):
        return "has an attribute of the name that the activation would get"
    return None


def _follow(graph: torch.fx.GraphModule, norm: Node) -> _Found | str:
    """What can become part of a norm's node; else the reason why nothing can."""
    found = _Found(norm, [], norm)
    end = "is not followed by an activation or a sum"
    while len(found.last.users) == 1:
        node = found.last
        (user,) = node.users
        module = _module(graph, user)
        if user.all_input_nodes.count(node) != 1 or sum(arg is node for arg in user.args) != 1:
            break
        if type(module) is nn.Identity and not has_hooks(module):
            found.nodes.append(user)
            found.last = user
            continue
        if module is not None and is_norm(module) and user.args[0] is not node:
            end = "is added to the output of another norm, with which the sum is fused"
            break
        act = _activation(user, node, module)
        if act is not None:
            if module is not None and has_hooks(module):
                end = f"is followed by a {type(module).__name__} with hooks"
                break
            if (mode := next(filter(changes_mode, between(found.place, user)), None)) is not None:
                end = f"is followed by {act.name} behind {mode.name}, which changes a mode"
                break
            found.nodes.append(user)
            found.act, found.last = act, user
            return found
        if found.residual is None and (reason := _sum(norm, user, node, found)) is not None:
            end = reason
            break
        if found.last is node:
            break
    else:
        if len(found.last.users) > 1 and found.residual is None:
            end = "has an output that is used in several places"
    return found if found.residual is not None else end


def _activation(user: Node, node: Node, module: nn.Module | None) -> Act | None:
    if not user.args or user.args[0] is not node:
        return None
    if module is not None:
        return activation_of_module(module) if len(user.args) == 1 and not user.kwargs else None
    if user.op == "call_method":
        return activation_of_method(str(user.target)) if len(user.args) == 1 and not user.kwargs else None
    return activation_of_call(user.target, user.args[1:], user.kwargs) if user.op == "call_function" else None


def _sum(norm: Node, user: Node, node: Node, found: _Found) -> str | None:
    """Take `user` into `found` where it is a sum; else why not."""
    called = f"is followed by {user.op.removeprefix('call_')} {getattr(user.target, '__name__', user.target)}"
    method = user.op == "call_method" and user.target in ("add", "add_")
    if not method and not (user.op == "call_function" and is_add(user.target, user.kwargs)):
        return called
    if len(user.args) != 2 or (method and user.kwargs):
        return called
    first, second = user.args
    other = second if first is node else first
    in_place = user.target in ("add_", operator.iadd, torch.Tensor.add_, aten.add_.Tensor)
    if not isinstance(other, Node) or other is node:
        return "is added to what is no tensor"
    if in_place and first is not node:
        return "is added into another tensor"
    values = [value for n in (norm, other) if isinstance(value := n.meta.get("val"), torch.Tensor)]
    if len(values) == 2 and (values[0].shape, values[0].dtype) != (values[1].shape, values[1].dtype):
        return "is added to a tensor of another shape or dtype"
    if in_place and len(values) < 2 and norm.op == "call_function":
        return "is a function whose output is added to in place"
    if (reason := _why_not_moved(norm, user)) is not None:
        return reason
    found.nodes.append(user)
    found.residual, found.last, found.place, found.in_place = other, user, user, in_place
    return None


def _why_not_moved(norm: Node, last: Node) -> str | None:
    """Why the norm may not run later, where the sum is: something between may write into what it reads, or read what it
    writes."""
    source = norm.args[0]
    graph = norm.graph.owning_module
    assert graph is not None
    fresh = False  # made by a convolution, for the norm alone
    if isinstance(source, Node) and len(source.users) == 1:
        convolution = isinstance(_module(graph, source), (nn.modules.conv._ConvNd, nn.Linear))
        fresh = convolution or source.target in (aten.conv2d.default, F.conv2d)
    for node in between(norm, last):
        if changes_mode(node):
            return f"is added to behind {node.name}, which changes a mode"
        if reads_statistics(node, norm):
            return f"is added to after {node.name}, which may read what it changes"
        if not fresh and writes(node, _module(graph, node)):
            return f"is added to after {node.name}, which may change what it reads"
    return None


def _own_copy(graph: torch.fx.GraphModule, target: str, norm: nn.Module) -> nn.Module:
    """Let a graph have the norm to itself: a trace shares its modules with the model that was traced, which has its
    activation still. Parameters and buffers stay shared."""
    if "forward" in vars(norm):
        return norm
    owner, _, name = target.rpartition(".")
    own = copy.copy(norm)
    graph.get_submodule(owner)._modules[name] = own
    return own


def _replace(graph: torch.fx.GraphModule, norm: Node, module: nn.Module | None, found: _Found) -> None:
    """One node in place of the norm's, the sum's and the activation's."""
    act = found.act
    with graph.graph.inserting_before(found.place):
        if module is not None:
            args = norm.args if found.residual is None else (*norm.args, found.residual)
            new = graph.graph.call_module(str(norm.target), args)
        else:
            options: dict[str, Any] = {} if act is None else {"activation": act.name, "activation_param": act.param}
            if found.residual is not None:
                options["residual"] = found.residual
            if norm.target in _ATEN:
                function, args = _ATEN[norm.target](*norm.args, **norm.kwargs)
                new = graph.graph.call_function(function, args, options)
            else:
                new = graph.graph.call_function(_FUNCTIONS[norm.target], norm.args, {**norm.kwargs, **options})
    target = norm.target if module is None else None
    extra = norm.args[_FIRST_EXTRA[target] :] if target in _FIRST_EXTRA else ()
    tail = tuple(Step.of(node, found.residual) for node in found.nodes)
    new.meta = {**found.last.meta, NODE: Replaced(target, tuple(extra), tail)}
    found.last.replace_all_uses_with(new)
    for node in (*reversed(found.nodes), norm):
        graph.graph.erase_node(node)
    if module is not None:
        module = _own_copy(graph, str(norm.target), module)
        mark(module, Fusion(found.text, GRAPH), found.in_place)
        if act is not None:
            own = vars(module)
            own["_fuses"], own["activation"], own["activation_param"] = True, act.name, act.param
