"""fuse: a norm, the sum and the activation behind it become one call, in place, where the model's own text proves it.

The parts are in fusing/.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple, TypeVar

import torch.fx
from torch import nn

from .fusing.containers import fuse_norm_act, is_last, is_norm_act, mark, pairs, run_together, why_unfit
from .fusing.edit import edited
from .fusing.flow import NotProved
from .fusing.fresh import is_plain_sequential
from .fusing.graph import fuse_graph
from .fusing.match import Site, is_returned, match
from .fusing.patterns import has_hooks
from .fusing.record import BONDS, KEY, REFUSAL, Bond, Fusion, Rewriting, fusion_of, is_norm, rewrite
from .fusing.usage import Usage, usage_of

__all__ = ["fuse"]

Model = TypeVar("Model", bound=nn.Module)


class Place(NamedTuple):
    """A norm and the calls behind which there is something to fuse: its own, or those of a module that returns what the
    norm returns.

    through: the modules between, the norm's own container first, each with the site at which it calls what is inside,
    where it is no nn.Sequential. sites: the calls.
    """

    norm: nn.Module
    through: list[tuple[nn.Module, Site | None]]
    sites: list[Site]


def fuse(model: Model) -> Model:
    """Make one call of each norm and what follows it, in place; returns `model`.

    Fused are norm -> activation, norm -> sum and norm -> sum -> activation: act(norm(x) + residual). A norm that is
    fused becomes fastnorm's, as by `fastnorm.convert`; Parameters, buffers, state_dict and names stay. What is not
    proved to compute the same is left; `fastnorm.report(model)` names each place with what is fused, or the reason.
    `fastnorm.revert(model)` undoes all of it.

    model: any nn.Module; a GraphModule of torch.fx, or of torch.export (`program.module()`), by its graph. Norms and
    activations with hooks are left. Outside of graphs a model may be edited afterwards: modules that are replaced,
    changed, taken away or get hooks are obeyed at the next call.
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
    return why_unfit(norm) or usage.why_unproved(norm)


def _place_name(usage: Usage, module: nn.Module) -> str:
    name = usage.names[id(module)]
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


# ---- containers whose forward is known ----


def _fuse_containers(model: nn.Module, usage: Usage, refusals: dict[int, str]) -> None:
    for module in model.modules():
        if is_norm_act(module) and fusion_of(module) is None and id(module) not in refusals:
            reason = "has hooks" if has_hooks(module) else fuse_norm_act(module)
            if reason is not None:
                refusals[id(module)] = reason
    for module in model.modules():
        if not is_plain_sequential(module):
            continue
        assert isinstance(module, nn.Sequential)
        for pair in list(pairs(module)):
            norm = pair.norm
            if fusion_of(norm) is not None or id(norm) in refusals:
                continue
            reason = _why_unfit(norm, usage)
            for inner in (*pair.through, norm):
                if reason is None and inner is not norm:
                    hooks = "is at the end of a container with hooks" if has_hooks(inner) else None
                    reason = hooks or usage.why_unproved(inner)
                if reason is None and usage.calls.get(id(inner)):
                    method, _ = usage.calls[id(inner)][0]
                    reason = f"is called by its name too, in {type(method.owner).__name__}.{method.name}"
            if reason is None and has_hooks(pair.module):
                reason = f"is followed by a {type(pair.module).__name__} with hooks"
            if reason is not None:
                refusals[id(norm)] = reason
                continue
            fusion = Fusion(pair.act.name, _place_name(usage, module))
            for inner in pair.through:
                run_together(inner)
                vars(inner)[KEY] = fusion
            run_together(module)
            mark(norm, fusion)


# ---- methods ----


def _fuse_methods(model: nn.Module, usage: Usage, refusals: dict[int, str]) -> None:
    places: list[Place] = []
    claimed: set[int] = set()
    for norm in model.modules():
        if not is_norm(norm) or id(norm) in refusals or fusion_of(norm) is not None:
            continue
        try:
            place = _place_of(norm, usage, claimed)
        except NotProved as refusal:
            refusals[id(norm)] = str(refusal)
            continue
        places.append(place)
        claimed |= {id(node) for site in place.sites for node in (site.sum_node, site.act_node) if node is not None}
    sites: dict[int, list[Site]] = defaultdict(list)
    for place in places:
        for site in (*place.sites, *(inner for _, inner in place.through if inner is not None)):
            sites[id(site.method.owner)].append(site)
    failed = {key: reason for key, of_owner in sites.items() if (reason := _rewrite_owner(of_owner)) is not None}
    for place in places:
        reasons = [failed[key] for site in place.sites if (key := id(site.method.owner)) in failed]
        reasons += [failed[id(module)] for module, _ in place.through if id(module) in failed]
        if reasons:
            refusals[id(place.norm)] = reasons[0]
        else:
            _mark_place(place, usage)


def _place_of(norm: nn.Module, usage: Usage, claimed: set[int]) -> Place:
    """The calls of a norm, or of what returns its output, each with what follows. NotProved where one has nothing to
    fuse, or where they differ."""
    if (reason := _why_unfit(norm, usage)) is not None:
        raise NotProved(reason)
    target, through = norm, list[tuple[nn.Module, Site | None]]()
    while True:
        calls = usage.calls.get(id(target), [])
        inner: Site | None = None
        if calls:
            try:
                sites = [match(method, call) for method, call in calls]
                break
            except NotProved:
                method, call = calls[0]
                if len(calls) > 1 or not is_returned(method, call):
                    raise
                inner, parent = Site(method, call, returned=True), method.owner
        else:
            parent = next((parent for parent, _ in usage.parents[id(target)]), target)
            if not is_last(parent, target):
                raise NotProved(_what_follows(target, usage))
        if not usage.parents[id(parent)]:
            raise NotProved(f"is followed by nothing in the {type(parent).__name__}")
        if (reason := "has hooks" if has_hooks(parent) else usage.why_unproved(parent)) is not None:
            raise NotProved(f"is at the end of a {type(parent).__name__} that {reason}")
        through.append((parent, inner))
        target = parent
    for site in sites:
        if site.act != sites[0].act or site.in_place is not sites[0].in_place:
            raise NotProved("is called in several places, and followed by different things")
        if any(id(node) in claimed for node in (site.sum_node, site.act_node) if node is not None):
            raise NotProved("is added to the output of another norm, with which the sum is fused")
    return Place(norm, through, sites)


def _what_follows(norm: nn.Module, usage: Usage) -> str:
    """Why a norm that no method calls by its name is left."""
    for parent, key in usage.parents[id(norm)]:
        if is_plain_sequential(parent):
            keys = list(parent._modules)
            behind = parent._modules[keys[keys.index(key) + 1]] if key != keys[-1] else None
            return f"is followed by {'nothing' if behind is None else f'a {type(behind).__name__}'} in its container"
    return "is called by no method that names it"


def _rewrite_owner(sites: list[Site]) -> str | None:
    """Rewrite the methods of one module, for all the norms that they call. Returns why that is not possible."""
    owner = sites[0].method.owner
    assumed = {name for site in sites for name in (*site.assumed, *site.method.assumed)}
    methods = {id(site.method): site.method for site in sites}
    try:
        sources = {m.name: edited(m, [site for site in sites if site.method is m]) for m in methods.values()}
        rewrite(owner, Rewriting(tuple(sources.items()), tuple(sorted(assumed))))
    except (TypeError, SyntaxError, ValueError, AttributeError) as error:
        return f"is called in {type(owner).__name__}, which cannot be rewritten: {error}"
    return None


def _mark_place(place: Place, usage: Usage) -> None:
    summed = next((site for site in place.sites if site.sum_node is not None), None)
    site = summed or place.sites[0]
    bond = Bond()
    fusion = Fusion(site.text, _place_name(usage, site.method.owner), bond=bond)
    for owner in {id(s.method.owner): s.method.owner for s in place.sites}.values():
        vars(owner).setdefault(BONDS, []).append(bond)
    for container, inner in place.through:
        if inner is None:
            run_together(container)
        vars(container)[KEY] = fusion
    mark(place.norm, fusion, site.in_place)
