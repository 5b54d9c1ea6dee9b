"""The way back from what graph.py does to a graph."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import nn
from torch.fx import Node

from ..activations import ACTIVATIONS
from .record import GRAPH, fusion_of

__all__ = ["NODE", "NOTES", "Replaced", "Step", "undo_graphs"]

#: In the meta of a node: what it stands for. In the meta of a graph: what became of norms that are functions.
NODE = "fastnorm_replaced"
NOTES = "fastnorm_notes"
aten = torch.ops.aten


class Step(NamedTuple):
    """A node behind a norm. args: those after the value; of a sum, none. adds: a residual, to the value's left or
    right."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    adds: str | None

    @staticmethod
    def of(node: Node, residual: Node | None) -> Step:
        if residual is None or residual not in node.args:
            return Step(node.op, node.target, tuple(node.args[1:]), dict(node.kwargs), None)
        return Step(node.op, node.target, (), dict(node.kwargs), "left" if node.args[0] is residual else "right")


class Replaced(NamedTuple):
    """target: the function that the norm was, or None for a module. extra: its last arguments, that ours does not take.
    steps: what was behind it."""

    target: Any
    extra: tuple[Any, ...]
    steps: tuple[Step, ...]


def undo_graphs(model: nn.Module) -> None:
    """Give the graphs inside `model` the nodes back that they had before `fuse`."""
    for graph in model.modules():
        if not isinstance(graph, torch.fx.GraphModule):
            continue
        changed = False
        for node in list(graph.graph.nodes):
            replaced = node.meta.get(NODE) or _guessed(graph, node)
            if replaced is not None:
                _undo(graph, node, replaced)
                changed = True
        graph.meta.pop(NOTES, None)
        if changed:
            graph.graph.lint()
            graph.recompile()


def _guessed(graph: torch.fx.GraphModule, node: Node) -> Replaced | None:
    """Of a graph that was pickled, whose nodes have lost their meta."""
    norm: Any = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if norm is None or (fusion := fusion_of(norm)) is None or fusion.place != GRAPH:
        return None
    steps = [Step("call_function", operator.add, (), {}, "right")] if len(node.args) > 1 else []
    name, _ = norm._epilogue()
    if name is not None:
        steps.append(Step("call_module", f"{node.target}_{name}".replace(".", "_"), (), {}, None))
    return Replaced(None, (), tuple(steps))


def _undo(graph: torch.fx.GraphModule, node: Node, replaced: Replaced) -> None:
    nodes = graph.graph
    residual: Any = node.kwargs.get("residual") if replaced.target is not None else (*node.args, None)[1]
    act, param = "relu", 0.0
    if replaced.target is None:
        norm: Any = graph.get_submodule(str(node.target))
        act, param = norm._epilogue()
    elif "activation" in node.kwargs:
        act, param = str(node.kwargs["activation"]), float(node.kwargs["activation_param"])  # type: ignore[arg-type]
    with nodes.inserting_before(node):
        if replaced.target is None:
            value = nodes.call_module(str(node.target), node.args[:1])
        else:
            ours = ("activation", "activation_param", "residual")
            kwargs = {key: arg for key, arg in node.kwargs.items() if key not in ours}
            value = nodes.call_function(replaced.target, _torchs_arguments(node, replaced), kwargs)
        for step in replaced.steps:
            if step.op == "call_module" and not _has(graph, step.target):  # a copy leaves unused modules behind
                graph.add_submodule(step.target, ACTIVATIONS[act].module(param))
            pair = {None: (value,), "left": (residual, value), "right": (value, residual)}[step.adds]
            value = nodes.create_node(step.op, step.target, (*pair, *step.args), step.kwargs)
    value.meta = {key: item for key, item in node.meta.items() if key != NODE}
    node.replace_all_uses_with(value)
    nodes.erase_node(node)


def _has(graph: torch.fx.GraphModule, target: str) -> bool:
    try:
        graph.get_submodule(target)
    except AttributeError:
        return False
    return True


def _torchs_arguments(node: Node, replaced: Replaced) -> tuple[Any, ...]:
    """The arguments as torch's function takes them."""
    if replaced.target in (aten.batch_norm.default, aten.instance_norm.default):
        x, mean, var, weight, bias, *rest = node.args
        return (x, weight, bias, mean, var, *rest, *replaced.extra)
    return (*node.args, *replaced.extra)
