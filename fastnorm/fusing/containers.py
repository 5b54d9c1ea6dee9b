"""Containers whose forward is known: nn.Sequential, and timm's norms that have their activation inside."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from .. import modules
from ..convert import convert, why_not_converted
from ..unfused import TorchNormActivation
from .fresh import is_plain_sequential
from .patterns import Act, activation_of_module, has_hooks
from .record import KEY, Fusion, Rewriting, is_norm, rewrite

__all__ = ["Pair", "fuse_norm_act", "is_last", "is_norm_act", "mark", "pairs", "pass_residual", "why_unfit"]

_PASSES_ON = """def forward(self, input, *residual):
    *before, last = list(self)[:{length}]
    for module in before:
        input = module(input)
    return fastnorm_call(last, input, residual[0] if residual else None, {activation!r}, {param!r})
"""


class Pair(NamedTuple):
    """A norm and the activation behind it in an nn.Sequential. through: containers, from the one that holds both down
    to the norm. key, module: the activation's."""

    norm: nn.Module
    through: list[nn.Module]
    act: Act
    key: str
    module: nn.Module


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity and "forward" not in vars(module) and not has_hooks(module)


def tail_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The way down to the norm at the end of a container, in steps of name and module; empty if there is none."""
    if not isinstance(module, nn.Sequential):
        return []
    for name, child in reversed(list(module._modules.items())):
        if child is None or _is_identity(child):
            continue
        if is_norm(child):
            return [(name, child)]
        below = tail_of(child) if is_plain_sequential(child) else []
        return [(name, child), *below] if below else []
    return []


def pairs(container: nn.Sequential) -> Iterator[Pair]:
    """Each norm, or container that ends in one, with an activation next to it but for nn.Identity."""
    children = [(key, child) for key, child in container._modules.items() if child and not _is_identity(child)]
    for (_, first), (key, second) in itertools.pairwise(children):
        act = activation_of_module(second)
        if act is None:
            continue
        below = tail_of(first) if is_plain_sequential(first) else []
        if is_norm(first):
            yield Pair(first, [], act, key, second)
        elif below:
            yield Pair(below[-1][1], [first, *(module for _, module in below[:-1])], act, key, second)


def is_last(container: nn.Module, module: nn.Module) -> bool:
    """Whether an nn.Sequential returns what `module`, its child, returns."""
    children = [child for child in container._modules.values() if child is not None and not _is_identity(child)]
    return is_plain_sequential(container) and bool(children) and children[-1] is module


def pass_residual(container: nn.Module, module: nn.Module, act: Act | None) -> None:
    """Let a container whose last module is `module` take a residual, and hand it on."""
    length = [child is module for child in container._modules.values()].index(True) + 1
    name, param = (None, 0.0) if act is None else act[:2]
    text = _PASSES_ON.format(length=length, activation=name, param=param)
    rewrite(container, Rewriting((("forward", text),)))


# ---- timm ----

_NORM_ACTS = {"BatchNormAct2d": "BatchNorm2d", "GroupNormAct": "GroupNorm", "LayerNormAct": "LayerNorm"}


def is_norm_act(module: nn.Module) -> bool:
    """Whether a module is one of timm's norms with an activation inside."""
    cls = getattr(type(module), "_original_class", type(module))
    return cls.__name__ in _NORM_ACTS and cls.__module__.startswith("timm.")


def fuse_norm_act(norm: nn.Module) -> str | None:
    """Fuse one of timm's norms with what is inside it. Returns why not, if not."""
    drop, act_module = norm._modules.get("drop"), norm._modules.get("act")
    if drop is None or act_module is None or "forward" in vars(norm) or getattr(norm, "_fast_norm", False):
        return f"is a {type(norm).__name__} of another form"
    if not _is_identity(drop):
        return f"is followed by a {type(drop).__name__}"
    act = activation_of_module(act_module)
    if act is None and not _is_identity(act_module):
        return f"is followed by a {type(act_module).__name__}"
    if has_hooks(act_module):
        return f"is followed by a {type(act_module).__name__} with hooks"
    base = _NORM_ACTS[type(norm).__name__]
    rewrite(norm, Rewriting((), ("act", "drop"), base))
    if act is not None:
        mark(norm, act, Fusion(act.name, f"itself ({type(norm).__name__})", True))
    return None


# ---- norms ----


def why_unfit(norm: nn.Module) -> str | None:
    """Why nothing can be fused with this norm, whatever follows it."""
    if isinstance(norm, (modules.Norm, TorchNormActivation)):
        has_activation = norm._epilogue()[0] is not None
    else:
        has_activation = is_norm_act(norm) and not _is_identity(norm.act)  # type: ignore[arg-type]
    if has_activation:
        return "has an activation of its own"
    ours = is_norm_act(norm) or (isinstance(norm, modules.Norm) and type(norm) is norm._public_class)
    reason = None if ours else why_not_converted(norm)
    return "has hooks, which would see another output" if reason is None and has_hooks(norm) else reason


def mark(norm: nn.Module, act: Act | None, fusion: Fusion, in_place: bool = False) -> None:
    """Make a norm the one that computes `act`, after a sum if it is called with a residual. in_place: the sum was
    written into the norm's output, and has its dtype and shape."""
    if not is_norm_act(norm):
        convert(norm)
    own = vars(norm)
    if act is not None:
        own["_fuses"], own["activation"], own["activation_param"] = True, act.name, act.param
    if in_place:
        own["_adds_in_place"] = True
    own[KEY] = fusion
