"""The most memory that a call takes at a time: of the process on a CPU, of torch's allocator on a GPU."""

from __future__ import annotations

import gc
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): the peak becomes what is resident now


def in_child(function: Callable[..., Result], *arguments: object) -> Result:
    """`function(*arguments)` in a new process, where what this one has allocated does not count."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _resident(which: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{which}:"))
    return int(line.split()[1]) << 10


def _peak_resident() -> int:
    """The most bytes that were resident at a time, since the start or the last reset."""
    if STATUS.exists():
        return _resident("VmHWM")
    import resource

    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak(work: Callable[[], object], device: str) -> int:
    """Bytes that `work` takes at most at a time, beyond what was taken before it. On a CPU this is exact to a few
    megabytes, in a process that has freed nothing large before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if CLEAR.exists():
        CLEAR.write_text(RESET_PEAK)
    before = _resident("VmRSS") if STATUS.exists() else _peak_resident()
    work()
    return max(0, _peak_resident() - before)
