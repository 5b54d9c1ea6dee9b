"""Loads nvcc's PTX of the kernels, and controls and queries the interpreter that executes it.

from tests.ptx import backend
ptx = backend.load()                        builds what has changed, then loads
ptx.configure(order="random", seed=3, device="tiny")
torch.ops.fastnorm_ptx.norm_forward(...)    RuntimeError where the interpreter finds a defect
with ptx.executing() as counts: ...         then counts.instructions, counts.global_read and so on

It has all the controls of tests/emulator/backend.py. An L2 is not modelled, and its launches tell the bytes of all
global accesses as those of tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tests.emulator import backend as emulator
from tests.ptx import build

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Executed:
    """Of one opcode, such as "ld.global.f32"."""

    issued: int
    """By warps."""
    threads: int
    """Lanes that came to it."""
    enabled: int
    """Of those, lanes whose guard let it happen."""


@dataclasses.dataclass(frozen=True)
class Accesses:
    """Of global or shared memory, reading or writing. Copies past the registers count as both."""

    warps: int
    threads: int
    bytes: int
    transactions: int
    """Global: sectors of 32 bytes. Shared: rounds of the 32 banks."""


@dataclasses.dataclass
class Counts:
    """Filled when executing() ends."""

    instructions: dict[str, Executed] = dataclasses.field(default_factory=dict)
    global_read: Accesses = Accesses(0, 0, 0, 0)
    global_written: Accesses = Accesses(0, 0, 0, 0)
    shared_read: Accesses = Accesses(0, 0, 0, 0)
    shared_written: Accesses = Accesses(0, 0, 0, 0)


MEMORIES = ("global_read", "global_written", "shared_read", "shared_written")


def counts_of(text: str) -> Counts:
    """As bindings.cpp writes them."""
    counts = Counts()
    for line in text.splitlines():
        name, *numbers = line.split()
        if name in MEMORIES:
            setattr(counts, name, Accesses(*map(int, numbers)))
        else:
            counts.instructions[name] = Executed(*map(int, numbers))
    return counts


class Interpreter:
    """Kernels by name, whatever loads them. A process has one, and launches wait for each other."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._ptx = library
        for name in ("load", "load_file", "run", "counters", "launched", "issued"):
            getattr(library, f"fastnorm_ptx_{name}").restype = ctypes.c_char_p

    @staticmethod
    def _raise(text: bytes | None) -> None:
        if text is not None:
            raise RuntimeError(text.decode())

    def load_text(self, text: str) -> None:
        """The module's kernels take the place of those of the same names."""
        self._raise(self._ptx.fastnorm_ptx_load(text.encode()))

    def run(
        self,
        kernel: str,
        parameters: bytes = b"",
        *,
        blocks: int = 1,
        threads: int = 32,
        shared_bytes: int = 0,
        cluster: int = 1,
        cooperative: bool = False,
        order: str = "random",
        seed: int = 0,
        races: bool = True,
        memory: Sequence[torch.Tensor] = (),
    ) -> None:
        """RuntimeError with what the interpreter finds. memory: the contiguous tensors that the kernel may access."""
        ranges = [number for t in memory for number in (t.data_ptr(), t.nbytes)]
        self._raise(
            self._ptx.fastnorm_ptx_run(
                kernel.encode(),
                ctypes.c_int64(blocks),
                threads,
                ctypes.c_int64(shared_bytes),
                cluster,
                ctypes.c_bool(cooperative),
                parameters,
                ctypes.c_int64(len(parameters)),
                order.encode(),
                ctypes.c_uint64(seed),
                ctypes.c_bool(races),
                (ctypes.c_uint64 * len(ranges))(*ranges),
                ctypes.c_int64(len(memory)),
            )
        )

    def launched(self) -> list[str]:
        """The names of the kernels launched since reset_counters(), those that failed too."""
        return str(self._ptx.fastnorm_ptx_launched().decode()).split()

    def issued(self, kernel: str) -> list[tuple[str, int]]:
        """The opcode of each of a kernel's instructions, in their order, and how often warps have issued it since
        reset_counters(); nothing where it was not launched."""
        lines = self._ptx.fastnorm_ptx_issued(kernel.encode()).decode().splitlines()
        return [(opcode, int(count)) for opcode, count in map(str.split, lines)]

    @contextlib.contextmanager
    def executing(self, races: bool = False) -> Iterator[Counts]:
        """Counts what is executed inside. Without a search for races it takes a fraction of the time."""
        counts = Counts()
        self._ptx.fastnorm_ptx_reset_counters()
        self._ptx.fastnorm_ptx_look_for_races(ctypes.c_bool(races))
        self._ptx.fastnorm_ptx_count_transactions(ctypes.c_bool(True))
        try:
            yield counts
        finally:
            self._ptx.fastnorm_ptx_look_for_races(ctypes.c_bool(True))
            self._ptx.fastnorm_ptx_count_transactions(ctypes.c_bool(False))
        vars(counts).update(vars(counts_of(self._ptx.fastnorm_ptx_counters().decode())))


class Backend(emulator.Emulator, Interpreter):
    """The kernels of csrc/cuda, behind torch.ops.fastnorm_ptx."""

    def __init__(self, library: ctypes.CDLL) -> None:
        emulator.Emulator.__init__(self, library)
        Interpreter.__init__(self, library)
        self.load_kernels()

    def load_kernels(self, arch: str = "sm_90", kernels: tuple[tuple[str, str], ...] | None = None) -> None:
        """As nvcc compiles them for an architecture."""
        for path in build.build_kernels(arch, kernels):
            self._raise(self._ptx.fastnorm_ptx_load_file(str(path).encode()))


@functools.cache
def interpreter() -> Interpreter:
    """Without kernels, for the interpreter's own tests."""
    return Interpreter(ctypes.CDLL(str(build.build_interpreter())))


@functools.cache
def load() -> Backend:
    """Raises build.BuildError where there is no nvcc, or with the compiler's words."""
    import torch

    path = build.build_library()
    torch.ops.load_library(str(path))
    return Backend(ctypes.CDLL(str(path)))
