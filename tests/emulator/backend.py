"""Loads the emulated kernels, and steers and questions the emulator.

from emulator import backend
emulator = backend.load()                               builds what has changed, then loads
emulator.configure(order="random", seed=3, device="tiny")
torch.ops.fastnorm_emulated.norm_forward(...)           RuntimeError where the emulator finds a defect
with emulator.counting() as counts: ...                 then counts.traffic, counts.launches
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
from collections.abc import Iterator

from emulator import build

ORDERS = ("fifo", "lifo", "random", "priority")


@dataclasses.dataclass(frozen=True)
class Device:
    """What plans are made of: csrc/plan_cuda.h's DeviceInfo, in its order."""

    capability: int
    multiprocessors: int
    threads_per_multiprocessor: int
    shared_per_multiprocessor: int
    shared_per_block: int
    l2_bytes: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that passed through pack.cuh: of tensors (stream) and of parameters, statistics and partials."""

    read_stream: int
    read_parameter: int
    written_stream: int
    written_parameter: int


@dataclasses.dataclass(frozen=True)
class Launch:
    blocks: int
    threads: int
    shared_bytes: int
    cluster: int
    cooperative: bool
    traffic: Traffic


@dataclasses.dataclass
class Counts:
    """Filled when counting() ends."""

    traffic: Traffic = Traffic(0, 0, 0, 0)
    launches: list[Launch] = dataclasses.field(default_factory=list)


class Emulator:
    """There is one in a process, and launches wait for each other."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("device", "configure", "launch"):
            getattr(library, f"fastnorm_emulator_{name}").restype = ctypes.c_char_p
        library.fastnorm_emulator_launch_count.restype = ctypes.c_int64

    @staticmethod
    def _check(text: bytes | None) -> None:
        if text is not None:
            raise RuntimeError(text.decode())

    def device(self, name: str) -> Device:
        """One of tests/emulator/device.h: tiny, small, h200."""
        facts = (ctypes.c_int64 * 6)()
        self._check(self._library.fastnorm_emulator_device(name.encode(), facts))
        return Device(*facts)

    def configure(
        self, order: str = "fifo", seed: int = 0, device: str | Device = "h200", blocks_together: int = 1
    ) -> None:
        """Of all launches from now on. `order`: one of ORDERS; the same configuration gives the same schedules again.
        `blocks_together`: how many blocks run side by side where a launch asks for no more."""
        facts = dataclasses.astuple(self.device(device) if isinstance(device, str) else device)
        self._check(
            self._library.fastnorm_emulator_configure(
                order.encode(), ctypes.c_uint64(seed), blocks_together, (ctypes.c_int64 * 6)(*facts)
            )
        )

    @contextlib.contextmanager
    def configured(
        self, order: str = "fifo", seed: int = 0, device: str | Device = "h200", blocks_together: int = 1
    ) -> Iterator[None]:
        """configure(), and the defaults again at the end."""
        self.configure(order, seed, device, blocks_together)
        try:
            yield
        finally:
            self.configure()

    def reset_counters(self) -> None:
        self._library.fastnorm_emulator_reset_counters()

    def traffic(self) -> Traffic:
        """Since reset_counters()."""
        values = [ctypes.c_uint64() for _ in range(4)]
        self._library.fastnorm_emulator_traffic(*map(ctypes.byref, values))
        return Traffic(*(value.value for value in values))

    def launches(self) -> list[Launch]:
        """Since reset_counters(), in their order; those that failed are left out."""
        launches = []
        for number in range(self._library.fastnorm_emulator_launch_count()):
            values = (ctypes.c_int64 * 9)()
            self._check(self._library.fastnorm_emulator_launch(ctypes.c_int64(number), values))
            blocks, threads, shared_bytes, cluster, cooperative, *traffic = values
            launches.append(Launch(blocks, threads, shared_bytes, cluster, bool(cooperative), Traffic(*traffic)))
        return launches

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counts]:
        counts = Counts()
        self.reset_counters()
        yield counts
        counts.traffic, counts.launches = self.traffic(), self.launches()


@functools.cache
def load() -> Emulator:
    """Builds fastnorm_emulated.so where it is not up to date, and loads it: then torch.ops.fastnorm_emulated is there.
    Raises build.BuildError with the compiler's words."""
    import torch

    path = build.build(build.LIBRARY)
    torch.ops.load_library(str(path))
    return Emulator(ctypes.CDLL(str(path)))
