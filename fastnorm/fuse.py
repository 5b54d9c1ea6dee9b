"""fuse: a norm, the sum and the activation behind it become one call, in place, where the model's own text proves it.

fuse_usage.py tells who calls a norm, fuse_match.py what follows the call, fuse_containers.py does without text where a
container's forward is known, fuse_graph.py takes graphs of torch.fx. fuse_record.py has what stays on the model.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple, TypeVar

import torch.fx
from torch import nn

from . import modules
from .convert import convert, why_not_converted
from .fuse_containers import fuse_norm_act, has_activation, is_norm, is_norm_act, pairs, pass_residual, tail_of
from .fuse_edit import edited
from .fuse_graph import fuse_graph
from .fuse_match import NotProved, Site, is_plain_sequential, match
from .fuse_patterns import Act, has_hooks
from .fuse_record import KEY, REFUSAL, Absorbed, Fusion, Rewriting, fusion_of, rewrite
from .fuse_usage import Usage, path_names, path_text, usage_of

__all__ = ["fuse"]

Model = TypeVar("Model", bound=nn.Module)


class Place(NamedTuple):
    """Calls of a norm in methods of one module. through: the containers between that module and the norm, innermost
    first."""

    norm: nn.Module
    through: list[nn.Module]
    sites: list[Site]


def fuse(model: Model) -> Model:
    """Make one call of each norm and what follows it, in place; returns `model`.

    Fused are norm -> activation, norm -> sum and norm -> sum -> activation: act(norm(x) + residual). A norm that is
    fused becomes fastnorm's, as by `fastnorm.convert`; Parameters, buffers, state_dict and names stay. What is not
    proved to compute the same is left; `fastnorm.report(model)` names each place with what is fused, or the reason.
    `fastnorm.revert(model)` undoes all of it.

    model: any nn.Module; a GraphModule of torch.fx, or of torch.export (`program.module()`), by its graph. Norms and
    activations with hooks are left; hooks that are added to a fused norm later see what it then computes.
    Raises: TypeError if `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    refusals: dict[int, str] = {}
    for module in list(model.modules()):
        if isinstance(module, torch.fx.GraphModule):
            fuse_graph(module, refusals)
    usage = usage_of(model)
    _fuse_containers(model, usage, refusals)
    _fuse_methods(model, usage, refusals)
    for module in model.modules():
        vars(module).pop(REFUSAL, None)
        if id(module) in refusals and fusion_of(module) is None:
            vars(module)[REFUSAL] = refusals[id(module)]
    return model


def _why_unfit(norm: nn.Module, usage: Usage) -> str | None:
    """Why nothing can be fused with this norm, wherever it is called."""
    if has_activation(norm):
        return "has an activation of its own"
    ours = isinstance(norm, modules.Norm) and type(norm) is norm._public_class
    if not ours and not is_norm_act(norm) and (reason := why_not_converted(norm)) is not None:
        return reason
    if has_hooks(norm):
        return "has hooks, which would see another output"
    return usage.why_unproved(norm)


def _mark(norm: nn.Module, act: Act | None, fusion: Fusion, in_place: bool = False) -> None:
    """Make a norm the one that computes `act`."""
    if not is_norm_act(norm):
        convert(norm)
    own = vars(norm)
    if act is not None:
        own["_fuses"], own["activation"], own["activation_param"] = True, act.name, act.param
    if in_place:
        own["_adds_in_place"] = True
    own[KEY] = fusion


def _place_name(usage: Usage, module: nn.Module) -> str:
    name = usage.names[id(module)]
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


# ---- containers whose forward is known ----


def _fuse_containers(model: nn.Module, usage: Usage, refusals: dict[int, str]) -> None:
    for module in list(model.modules()):
        if is_norm_act(module) and fusion_of(module) is None:
            reason = "has hooks" if has_hooks(module) else fuse_norm_act(module)
            if reason is not None:
                refusals[id(module)] = reason
        if not is_plain_sequential(module):
            continue
        assert isinstance(module, nn.Sequential)
        for pair in list(pairs(module)):
            norm = pair.norm
            if fusion_of(norm) is not None:
                continue
            reason = _why_unfit(norm, usage)
            for inner in (*pair.through, norm):
                if reason is None and inner is not norm:
                    reason = "is at the end of a container with hooks" if has_hooks(inner) else usage.why_unproved(inner)
                if reason is None and usage.calls.get(id(inner)):
                    method, _ = usage.calls[id(inner)][0]
                    reason = f"is called by its name too, in {type(method.owner).__name__}.{method.name}"
            if reason is None and has_hooks(pair.module):
                reason = f"is followed by a {type(pair.module).__name__} with hooks"
            if reason is not None:
                refusals[id(norm)] = reason
                continue
            _mark(norm, pair.act, Fusion(pair.act.name, _place_name(usage, module), True))
            module._modules[pair.key] = Absorbed(pair.module, norm)


# ---- methods ----


def _fuse_methods(model: nn.Module, usage: Usage, refusals: dict[int, str]) -> None:
    places: dict[int, list[Place]] = defaultdict(list)
    claimed: set[int] = set()
    for norm in model.modules():
        if not is_norm(norm) or id(norm) in refusals or fusion_of(norm) is not None:
            continue
        try:
            place = _place_of(norm, usage, claimed)
        except NotProved as reason:
            refusals[id(norm)] = str(reason)
            continue
        places[id(place.sites[0].method.owner)].append(place)
        claimed |= {id(node) for site in place.sites for node in (site.sum_node, site.act_node) if node is not None}
    for of_owner in places.values():
        try:
            _rewrite_owner(of_owner)
        except (NotProved, TypeError, SyntaxError, ValueError) as error:
            owner = type(of_owner[0].sites[0].method.owner).__name__
            refusals |= {id(p.norm): f"is called in {owner}, which cannot be rewritten: {error}" for p in of_owner}
            continue
        for place in of_owner:
            _mark_place(place, usage)


def _place_of(norm: nn.Module, usage: Usage, claimed: set[int]) -> Place:
    """The calls of a norm, or of the containers that end in it, each with what follows. NotProved where one has nothing
    to fuse, or where they differ."""
    if (reason := _why_unfit(norm, usage)) is not None:
        raise NotProved(reason)
    target, through = norm, list[nn.Module]()
    while not usage.calls.get(id(target)) and usage.parents[id(target)]:
        parent = usage.parents[id(target)][0][0]
        way = [module for _, module in tail_of(parent)] if is_plain_sequential(parent) else []
        if not way or way[-1] is not norm:
            break
        if (reason := "has hooks" if has_hooks(parent) else usage.why_unproved(parent)) is not None:
            raise NotProved(f"is at the end of a container that {reason}")
        target = parent
        through.append(parent)
    calls = usage.calls.get(id(target), [])
    if not calls:
        inside = any(is_plain_sequential(parent) for parent, _ in usage.parents[id(target)])
        raise NotProved("is followed by nothing to fuse in its container" if inside else "is called by no name")
    sites = [match(method, call) for method, call in calls]
    for site in sites:
        if site.act != sites[0].act or site.in_place is not sites[0].in_place:
            raise NotProved("is called in several places, and followed by different things")
        if site.method.owner is not sites[0].method.owner:
            raise NotProved("is called by several modules")
        if any(id(node) in claimed for node in (site.sum_node, site.act_node) if node is not None):
            raise NotProved("is added to the output of another norm, with which the sum is fused")
    return Place(norm, through, sites)


def _rewrite_owner(places: list[Place]) -> None:
    """Rewrite the methods of one module, for all the norms that they call."""
    sites = [site for place in places for site in place.sites]
    assumed = {name for site in sites for name in (*site.assumed, *site.method.assumed)}
    paths = []
    for place in places:
        below = [name for name, _ in tail_of(place.through[-1])] if place.through else []
        for site in place.sites:
            names = path_names(site.method, site.call.func)
            if names is None:
                raise NotProved(f"it reaches {path_text(site.call.func)} by another way than its submodules")
            paths.append((*names, *below))
    methods = {id(site.method): site.method for site in sites}
    sources = {m.name: edited(m, [site for site in sites if site.method is m]) for m in methods.values()}
    owner = sites[0].method.owner
    rewrite(owner, Rewriting(tuple(sources.items()), tuple(sorted(assumed)), tuple(paths)))


def _mark_place(place: Place, usage: Usage) -> None:
    summed = next((site for site in place.sites if site.sum_node is not None), None)
    site = summed or place.sites[0]
    fusion = Fusion(site.text, _place_name(usage, site.method.owner))
    _mark(place.norm, site.act, fusion, site.in_place)
    for container in place.through:
        if summed is not None:
            pass_residual(container)
        vars(container)[KEY] = fusion
