"""Whether the host waits for a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def host_goes_on() -> Iterator[None]:
    """What is called inside waits for nothing: neither by a guarded synchronization of torch's, nor by any other: the
    device is busy for long after it. Before, call the same once: a first call may wait, for memory or for a module."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(400_000_000)  # a fifth of a second, or more
        done = torch.cuda.Event()
        yield
        done.record()
        assert not done.query(), "the call came back after the device was done"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
