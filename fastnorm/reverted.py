"""reverted: back to torch.nn for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from .convert import convert, is_public, revert
from .fuse import fuse
from .fusing.record import fusion_of

__all__ = ["reverted"]

Model = TypeVar("Model", bound=nn.Module)


@contextlib.contextmanager
def reverted(model: Model) -> Iterator[Model]:
    """`model` with torch.nn's norms for the length of a `with` block: for tools that look a class up exactly
    (quantization, FLOP counters, privacy validators). Afterwards the norms that were fastnorm's are so again, but for
    those that the tool has replaced or changed; and a model that was fused is fused again, also where the block raises.

    On entering, AttributeError if `model` is no nn.Module, and ImportError as of `revert`."""
    ours = [module for module in model.modules() if is_public(module)]
    was_fused = any(fusion_of(module) is not None for module in model.modules())
    revert(model)
    try:
        yield model
    finally:
        for module in ours:
            convert(module)
        if was_fused:
            fuse(model)
