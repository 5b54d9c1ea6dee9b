"""Interleaved timing: contestants take turns in one process, and medians are compared.

A shared machine drifts: another process wakes, a clock changes, memory fragments. Contestants timed
one after the other each meet a different machine. Here every round runs every contestant once, in a
new order, so that they all share the same luck, and the median over rounds drops the rest.
"""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

SAMPLE_S = 2e-3  # one sample lasts at least this long (shorter calls are repeated)
MAX_QUEUED = 64  # calls of a sample on a GPU: its queue takes about a thousand launches before the host has to wait
HOLD_S, MAX_HOLD_S = 2e-4, 0.2  # the least and the most that a GPU waits for the host
SPIN_HZ = 2e9  # cycles a second that a waiting GPU counts, at most: a slower one waits longer
MIN_ROUNDS, MAX_ROUNDS = 3, 40
MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_MAX = -1, -4  # option numbers of glibc's mallopt(3)


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds: the median and the quartiles."""

    median: float
    low: float
    high: float
    rounds: int

    @staticmethod
    def of(samples: list[float]) -> Timing:
        if len(samples) == 1:
            return Timing(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return Timing(median, low, high, len(samples))


def keep_memory() -> bool:
    """Have malloc keep freed memory, as torch's CUDA allocator and jemalloc do. False without glibc.

    glibc gives every block above 32 MB back to the system at once, so each new output first pays
    for its page faults: 5 times the copy itself for a tensor of 100 MB on a 2-core virtual machine.
    Then a bench compares page faults. Call it before the first large tensor.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(MALLOC_MMAP_MAX, 0)) and bool(mallopt(MALLOC_TRIM_THRESHOLD, -1))


def cpu_clock(call: Call, repeats: int) -> float:
    """Seconds of host time for `repeats` calls."""
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - start) * 1e-9


class CudaClock:
    """Seconds of device time for `repeats` calls, between two CUDA events of the current stream.

    The device spins until the host has enqueued all of them, so that it never waits for the host in between: a call on
    a small tensor takes it less time than the host takes to make it.
    """

    def __init__(self) -> None:
        self.host: dict[Call, float] = {}  # seconds that the host last took for one call

    def __call__(self, call: Call, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while True:
            hold = min(MAX_HOLD_S, HOLD_S + 1.5 * self.host.get(call, 0.0) * repeats)
            torch.cuda._sleep(int(hold * SPIN_HZ))
            start.record()
            enqueuing = cpu_clock(call, repeats)
            end.record()
            end.synchronize()
            self.host[call] = enqueuing / repeats
            if enqueuing < hold or hold == MAX_HOLD_S:
                return float(start.elapsed_time(end)) * 1e-3


def repeats_for(call: Call, clock: Callable[[Call, int], float], most: int = 1 << 30) -> int:
    """Warm `call` up, and find how many calls fill one sample."""
    clock(call, 2)  # first calls allocate, choose kernels and fault pages in
    repeats, spent = 1, clock(call, 1)
    while spent < SAMPLE_S and repeats < most:
        repeats = max(repeats + 1, int(repeats * min(10.0, 1.2 * SAMPLE_S / max(spent, 1e-9))))
        repeats = min(repeats, most)
        spent = clock(call, repeats)
    return repeats


def race(
    contestants: Mapping[str, Call],
    budget_s: float,
    device: str = "cpu",
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
) -> dict[str, Timing]:
    """Time all contestants in rounds until `budget_s` is spent, for `min_rounds` to `max_rounds` rounds.

    A call does its whole work and drops its result: allocating and freeing count for all.
    """
    clock, most = (CudaClock(), MAX_QUEUED) if device == "cuda" else (cpu_clock, 1 << 30)
    gc_was_on = gc.isenabled()
    gc.collect()
    gc.disable()  # else a collection counts for the contestant that runs just then
    try:
        deadline = time.perf_counter() + budget_s
        repeats = {name: repeats_for(call, clock, most) for name, call in contestants.items()}
        samples: dict[str, list[float]] = {name: [] for name in contestants}
        order, shuffle, longest = list(contestants), random.Random(0).shuffle, 0.0
        for done in range(-1, max_rounds):  # round -1 settles the heap for this mixture of sizes, and is dropped
            start = time.perf_counter()
            if done >= min_rounds and start + longest > deadline:
                break
            shuffle(order)
            for name in order:
                sample = clock(contestants[name], repeats[name]) / repeats[name]
                if done >= 0:
                    samples[name].append(sample)
            longest = max(longest, time.perf_counter() - start)
    finally:
        if gc_was_on:
            gc.enable()
    return {name: Timing.of(values) for name, values in samples.items()}
