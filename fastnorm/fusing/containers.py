"""Containers whose forward is known: nn.Sequential, and timm's norms that have their activation inside."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from .. import modules
from ..convert import convert, why_not_converted
from ..unfused import TorchNormActivation
from .calls import is_identity
from .fresh import is_plain_sequential
from .patterns import Act, activation_of_module, has_hooks
from .record import KEY, Fusion, Rewriting, is_norm, rewrite

__all__ = ["Pair", "fuse_norm_act", "is_last", "is_norm_act", "mark", "pairs", "run_together", "why_unfit"]

_RUN = """def forward(self, input):
    return fastnorm_run(self, input)
"""


class Pair(NamedTuple):
    """A norm and the activation behind it in an nn.Sequential. through: containers, from the one that holds both down
    to the norm. key, module: the activation's."""

    norm: nn.Module
    through: list[nn.Module]
    act: Act
    key: str
    module: nn.Module


def tail_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The way down to the norm at the end of a container, in steps of name and module; empty if there is none."""
    if not isinstance(module, nn.Sequential):
        return []
    for name, child in reversed(list(module._modules.items())):
        if child is None or is_identity(child):
            continue
        if is_norm(child):
            return [(name, child)]
        below = tail_of(child) if is_plain_sequential(child) else []
        return [(name, child), *below] if below else []
    return []


def pairs(container: nn.Sequential) -> Iterator[Pair]:
    """Each norm, or container that ends in one, with an activation next to it but for nn.Identity."""
    children = [(key, child) for key, child in container._modules.items() if child and not is_identity(child)]
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
    children = [child for child in container._modules.values() if child is not None and not is_identity(child)]
    return is_plain_sequential(container) and bool(children) and children[-1] is module


def run_together(container: nn.Module) -> None:
    """Let an nn.Sequential run its norms together with what is behind them at each call."""
    rewrite(container, Rewriting((("forward", _RUN),)))


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
    if not is_identity(drop):
        return f"is followed by a {type(drop).__name__}"
    act = activation_of_module(act_module)
    if act is None and not is_identity(act_module):
        return f"is followed by a {type(act_module).__name__}"
    if has_hooks(act_module):
        return f"is followed by a {type(act_module).__name__} with hooks"
    base = _NORM_ACTS[type(norm).__name__]
    rewrite(norm, Rewriting((), ("act", "drop"), base))
    if act is not None:
        mark(norm, Fusion(act.name, f"itself ({type(norm).__name__})"))
    return None


# ---- norms ----


def why_unfit(norm: nn.Module) -> str | None:
    """Why nothing can be fused with this norm, whatever follows it."""
    if isinstance(norm, (modules.Norm, TorchNormActivation)):
        has_activation = norm._epilogue()[0] is not None
    else:
        has_activation = is_norm_act(norm) and not is_identity(norm.act)
    if has_activation:
        return "has an activation of its own"
    ours = is_norm_act(norm) or (isinstance(norm, modules.Norm) and type(norm) is norm._public_class)
    reason = None if ours else why_not_converted(norm)
    return "has hooks, which would see another output" if reason is None and has_hooks(norm) else reason


def mark(norm: nn.Module, fusion: Fusion, in_place: bool = False) -> None:
    """Make a norm one that takes a residual and an activation from its callers. in_place: the sum was written into the
    norm's output, and has its dtype and shape."""
    if not is_norm_act(norm):
        convert(norm)
    own = vars(norm)
    if in_place:
        own["_adds_in_place"] = True
    own[KEY] = fusion
