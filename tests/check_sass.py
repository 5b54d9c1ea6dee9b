"""Reads the machine code of the CUDA kernels out of the objects that nvcc has compiled, and finds its faults.

Nothing may be in local memory (where registers spill to), a block of the size that a kernel is compiled for has to get
its registers, and a kernel that walks packs of 16 bytes loads and stores 16 bytes at a time. tests/check_cuda.py
compiles the objects.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from tests.common.cuda_tools import cuobjdump

RESIDENT_THREADS = 512  # kResidentThreads of csrc/plan/types.h
REGISTERS = 65536  # per SM, on every architecture we compile for
MAX_REGISTERS = REGISTERS // RESIDENT_THREADS
MAX_KERNELS = 300  # of an architecture: the limit keeps the build short

PACK_BYTES = {"f": 4, "d": 8}  # mangled storage types; else a half type of 2


@dataclasses.dataclass
class Kernel:
    """The machine code of one kernel, in figures."""

    file: str
    arch: str
    name: str
    registers: int
    instructions: dict[str, int] = dataclasses.field(default_factory=dict)

    def count(self, *prefixes: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes))

    @property
    def pack_bytes(self) -> int:
        """The bytes of a pack, from the mangled name; 0 where the kernel has none (fold)."""
        # _ZN8fastnorm4cuda10apply_rowsINS_8BFloat16ELi8ELb0EEE...
        found = re.search(r"I(f|d|NS_\d+\w+?E)Li(\d+)E", self.name)
        return PACK_BYTES.get(found[1], 2) * int(found[2]) if found else 0

    def faults(self) -> Iterator[str]:
        if self.registers > MAX_REGISTERS:
            yield f"takes {self.registers} registers, expected at most {MAX_REGISTERS}"
        local = self.count("STL", "LDL")
        if local:
            yield f"has {local} accesses to local memory"
        if self.pack_bytes == 16:
            if not self.count("LDG.E.128"):
                yield "loads no 16 bytes at a time"
            if "reduce" not in self.name and not self.count("STG.E.128"):
                yield "stores no 16 bytes at a time"


def by_architecture(text: str) -> Iterator[tuple[str, str]]:
    """The parts of what cuobjdump prints, as ("sm_90", text)."""
    for part in text.split("Fatbin elf code:")[1:]:
        found = re.search(r"^arch = (\w+)", part, re.MULTILINE)
        assert found, part[:200]
        yield found[1], part


def read_resources(file: str, text: str) -> list[Kernel]:
    """Of `cuobjdump -res-usage`."""
    return [
        Kernel(file, arch, found[1], int(found[2]))
        for arch, part in by_architecture(text)
        for found in re.finditer(r"Function (\w+):\s+REG:(\d+)", part)
    ]


def read_code(text: str, kernels: list[Kernel]) -> None:
    """Counts the instructions of `cuobjdump -sass`."""
    named = {(kernel.arch, kernel.name): kernel for kernel in kernels}
    for arch, part in by_architecture(text):
        for function in re.split(r"\n\s*Function : ", part)[1:]:
            name, code = function.split("\n", 1)
            counts = named[arch, name.strip()].instructions
            for found in re.finditer(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE):
                counts[found[1]] = counts.get(found[1], 0) + 1


def read_object(path: Path) -> list[Kernel]:
    """Of all architectures that the object has code for."""
    kernels = read_resources(path.stem, cuobjdump("-res-usage", str(path)))
    read_code(cuobjdump("-sass", str(path)), kernels)
    return kernels
