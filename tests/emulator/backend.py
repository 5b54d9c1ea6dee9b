"""Loads the emulated kernels, and controls and queries the emulator.

from tests.emulator import backend
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
from collections.abc import Iterator, Mapping
from typing import Any

from tests.emulator import build

ORDERS = ("fifo", "lifo", "random", "priority")

# The fields of csrc/plan/types.h's Forced, and the names of those that are enums.
FORCED = (
    "strategy", "gang", "pieces", "stages", "blocks_per_sm", "tile_bytes", "place", "staged_length", "exchange",
    "traversal",
)  # fmt: skip
NAMES = {
    "strategy": ("fused", "split", "apply"),
    "gang": ("block", "cluster", "grid"),
    "place": ("shared", "registers"),
    "exchange": ("gather", "scatter"),
    "traversal": ("rows", "columns"),
}
FREE = -1


@dataclasses.dataclass(frozen=True)
class Device:
    """The facts that plans are made from: the fields of csrc/plan/types.h's DeviceInfo."""

    capability: int
    num_sms: int
    clock_mhz: int
    threads_per_sm: int
    shared_per_sm: int
    shared_per_block: int
    l2_bytes: int
    bytes_per_us: int
    largest_cluster: int
    cluster_sms: int
    cooperative: bool
    cooperative_clusters: bool


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
    missed: int
    """The bytes read that L2 did not have; 0 where it is not modelled."""


@dataclasses.dataclass
class Counts:
    """Filled when counting() ends."""

    traffic: Traffic = Traffic(0, 0, 0, 0)
    launches: list[Launch] = dataclasses.field(default_factory=list)


def forced_numbers(forced: Mapping[str, str | int]) -> dict[str, int]:
    """All of FORCED as numbers; ValueError where a key or a name is unknown."""
    if unknown := sorted(set(forced) - set(FORCED)):
        raise ValueError(f"a plan has no {', '.join(unknown)} to force; it has {', '.join(FORCED)}")
    numbers = {}
    for key in FORCED:
        value = forced.get(key, FREE)
        if isinstance(value, str):
            names = NAMES.get(key, ())
            if value not in names:
                there_are = f"there are {', '.join(names)}" if names else "it is a number"
                raise ValueError(f"a plan's {key} cannot be {value!r}; {there_are}")
            value = names.index(value)
        numbers[key] = value
    return numbers


def as_text(numbers: Mapping[str, int]) -> bytes:
    """The fields of a struct, as bindings.cpp reads them."""
    return " ".join(f"{name}={int(number)}" for name, number in numbers.items()).encode()


class Emulator:
    """A process has one, and launches wait for each other."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("device", "configure", "launch"):
            getattr(library, f"fastnorm_emulator_{name}").restype = ctypes.c_char_p
        for name in ("launch_count", "refused_gangs"):
            getattr(library, f"fastnorm_emulator_{name}").restype = ctypes.c_int64

    @staticmethod
    def _check(text: bytes | None) -> None:
        if text is not None:
            raise RuntimeError(text.decode())

    def device(self, name: str) -> Device:
        """One of tests/emulator/device.h: tiny, few, alone, small, wide, h200."""
        text = ctypes.c_char_p()
        self._check(self._library.fastnorm_emulator_device(name.encode(), ctypes.byref(text)))
        facts: dict[str, Any] = {}
        for word in (text.value or b"").decode().split():
            fact, number = word.split("=")
            facts[fact] = bool(int(number)) if fact.startswith("cooperative") else int(number)
        return Device(**facts)

    def configure(
        self,
        order: str = "fifo",
        seed: int = 0,
        device: str | Device = "h200",
        blocks_together: int = 1,
        *,
        forced: Mapping[str, str | int] | None = None,
        refuses: str = "nothing",
        free_sms: int = 0,
    ) -> None:
        """Holds for all launches from now on. `order`: one of ORDERS; the same configuration gives the same schedules
        again. `blocks_together`: how many blocks run side by side where a launch asks for no more. `forced`:
        requirements on plans, by the names in FORCED and NAMES. `refuses`: what the device refuses although its facts
        allow it: nothing; gangs, as one that is shared; gangs in a capture, which the refusal ends; cooperative
        clusters. `free_sms`: the SMs that launches whose blocks wait for each other leave free."""
        facts = dataclasses.asdict(self.device(device) if isinstance(device, str) else device)
        self._check(
            self._library.fastnorm_emulator_configure(
                order.encode(),
                ctypes.c_uint64(seed),
                blocks_together,
                as_text(facts),
                refuses.encode(),
                free_sms,
                as_text(forced_numbers(forced or {})),
            )
        )

    @contextlib.contextmanager
    def configured(self, *args: Any, **options: Any) -> Iterator[None]:
        """configure(), and the defaults again at the end."""
        self.configure(*args, **options)
        try:
            yield
        finally:
            self.configure()

    @contextlib.contextmanager
    def modelling_l2(self) -> Iterator[None]:
        """With an L2 of the configured device's size, empty at first: launches then say what they missed in it."""
        self._library.fastnorm_emulator_model_l2(True)
        try:
            yield
        finally:
            self._library.fastnorm_emulator_model_l2(False)

    def refused_gangs(self) -> int:
        """The number of launches that were refused and replaced since the library was loaded. _C.refused_gangs()
        counts those on a GPU."""
        return int(self._library.fastnorm_emulator_refused_gangs())

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
            values = (ctypes.c_int64 * 10)()
            self._check(self._library.fastnorm_emulator_launch(ctypes.c_int64(number), values))
            blocks, threads, shared_bytes, cluster, cooperative, *traffic, missed = values
            traffic = Traffic(*traffic)
            launches.append(Launch(blocks, threads, shared_bytes, cluster, bool(cooperative), traffic, missed))
        return launches

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counts]:
        counts = Counts()
        self.reset_counters()
        yield counts
        counts.traffic, counts.launches = self.traffic(), self.launches()


@functools.cache
def load() -> Emulator:
    """Builds fastnorm_emulated.so where it is not up to date, and loads it: it defines torch.ops.fastnorm_emulated.
    Raises build.BuildError with the compiler's words."""
    import torch

    path = build.build(build.LIBRARY)
    torch.ops.load_library(str(path))
    return Emulator(ctypes.CDLL(str(path)))
