"""enable: aten's own norms run on our kernels, in the whole process; no model is touched.

    fastnorm.enable()                # nn.BatchNorm2d, F.layer_norm, a subclass of the user's: all of them
    with fastnorm.enabled("layer_norm"): ...
    print(fastnorm.report())         # calls served, and why the others were left to torch's kernels

Autograd, autocast, torch.func and torch.compile are above the operators and stay torch's, so that graphs, saved tensors
and higher derivatives are what they were. An activation and a residual cannot be fused from here: that is what
`fastnorm.fuse` and the modules are for.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

import torch

from . import ops
from .extension import _C

__all__ = ["disable", "enable", "enabled"]

#: (norm, device)
Switch = tuple[str, str]

NORMS: tuple[str, ...] = tuple(dict.fromkeys(norm for norm, *_ in _C.aten_switches()))

_lock = threading.Lock()
_enabled: set[Switch] = set()
_in_blocks: Counter[Switch] = Counter()


def enable(*norms: str, device: str | torch.device | None = None) -> None:
    """Let the kernels answer torch's own norms from now on, in all threads.

    norms: of "batch_norm" (instance_norm too: torch computes it by batch_norm), "group_norm", "layer_norm"; none: all.
    device: "cpu" or "cuda", without an index; None: every device that this build has kernels for. ValueError for other
    names and for a device without kernels, before anything is changed. Calling it again changes nothing.
    """
    switches = _named(norms, device)
    with _lock:
        _enabled.update(switches)
        _set(switches)


def disable(*norms: str, device: str | torch.device | None = None) -> None:
    """Undo `enable`, for the same arguments and with the same ValueError: torch's kernels answer again. What a
    `with enabled()` block asks for stays until the block ends. A norm that is off already stays off."""
    switches = _named(norms, device)
    with _lock:
        _enabled.difference_update(switches)
        _set(switches)


@contextlib.contextmanager
def enabled(*norms: str, device: str | torch.device | None = None) -> Iterator[None]:
    """`enable` for the length of a `with` block, or of a decorated function; in all threads, as `enable` is. Blocks may
    overlap: a norm is enabled while one of them is open. ValueError as of `enable`, on entering the block."""
    switches = _named(norms, device)
    with _lock:
        _in_blocks.update(switches)
        _set(switches)
    try:
        yield
    finally:
        with _lock:
            _in_blocks.subtract(switches)
            _set(switches)


def _set(switches: list[Switch]) -> None:
    for switch in switches:
        _C.set_aten_switch(*switch, switch in _enabled or _in_blocks[switch] > 0)


def _named(norms: tuple[str, ...], device: str | torch.device | None) -> list[Switch]:
    """The switches that the arguments name."""
    for norm in norms:
        if norm not in NORMS:
            hint = ": torch computes instance_norm by batch_norm" if norm == "instance_norm" else ""
            raise ValueError(f"norm is {norm!r}, expected one of {', '.join(NORMS)}{hint}")
    devices = ops.DEVICES
    if device is not None:
        if str(device) not in ops.DEVICES:
            expected = " or ".join(map(repr, ops.DEVICES))
            raise ValueError(f"device is {str(device)!r}, expected {expected}: what this build has kernels for")
        devices = (str(device),)
    return [(norm, name) for norm in norms or NORMS for name in devices]
