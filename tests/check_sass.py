"""Checks the machine code that `FASTNORM_CUDA=check python setup.py build_ext` leaves in build/cuda-check.

    python tests/check_sass.py [FILE.cubin ...]

For every kernel it checks that nothing spills (ptxas's report), that a block of the size it is compiled for gets its
registers, that nothing is in local memory, and that a kernel that walks packs of 16 bytes loads and stores 16 bytes at
a time. cuobjdump and nvdisasm come from the package index.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CUBINS = Path(__file__).resolve().parents[1] / "build" / "cuda-check"
TOOLS = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"

RESIDENT_THREADS = 512  # kResidentThreads of csrc/plan/types.h
REGISTERS = 65536  # per SM, on every architecture we compile for
MAX_REGISTERS = REGISTERS // RESIDENT_THREADS
MAX_KERNELS = 300  # of an architecture

PACK_BYTES = {"f": 4, "d": 8}  # mangled storage types; else a half type of 2


@dataclasses.dataclass
class Kernel:
    """The machine code of one kernel, in figures."""

    file: str
    name: str
    registers: int
    spilled: int
    stack: int
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
        if self.spilled:
            yield f"spills {self.spilled} bytes"
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


def read_report(file: str, text: str) -> dict[str, Kernel]:
    """Kernels of a `ptxas -v` report, by mangled name."""
    kernels = {}
    for part in text.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        numbers = [
            int(found[1]) if (found := re.search(pattern, part)) else 0
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes stack frame")
        ]
        kernels[name] = Kernel(file, name, *numbers)
    return kernels


def read_sass(text: str, kernels: dict[str, Kernel]) -> None:
    """Counts the instructions of `cuobjdump -sass`."""
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name, code = part.split("\n", 1)
        counts = kernels[name.strip()].instructions
        for found in re.finditer(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE):
            counts[found[1]] = counts.get(found[1], 0) + 1


def read_cubin(path: Path) -> list[Kernel]:
    kernels = read_report(path.name, path.with_name(path.name + ".ptxas").read_text())
    env = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}
    command = ["cuobjdump", "-sass", str(path)]
    sass = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    read_sass(sass, kernels)
    return list(kernels.values())


def architecture(file: str) -> str:
    """As "sm_90", from a cubin's name."""
    found = re.search(r"sm_\d+", file)
    return found[0] if found else ""


def main(arguments: list[str]) -> int:
    paths = [Path(argument) for argument in arguments] or sorted(CUBINS.glob("*.cubin"))
    if not paths:
        print(f"no cubins in {CUBINS}: run `FASTNORM_CUDA=check python setup.py build_ext` first")
        return 1
    with ThreadPoolExecutor() as threads:
        kernels = [kernel for found in threads.map(read_cubin, paths) for kernel in found]
    faulty = [(kernel, list(kernel.faults())) for kernel in kernels]
    faulty = [(kernel, faults) for kernel, faults in faulty if faults]
    architectures = Counter(architecture(kernel.file) for kernel in kernels)
    too_many = [f"{name}: {count} kernels, expected at most {MAX_KERNELS}"
                for name, count in architectures.items() if count > MAX_KERNELS]  # fmt: skip
    for kernel, faults in faulty:
        print(f"{kernel.file}: {kernel.name}: {'; '.join(faults)}")
    print(*too_many, sep="\n", end="\n" if too_many else "")
    wide = sum(kernel.pack_bytes == 16 for kernel in kernels)
    most = max(kernel.registers for kernel in kernels)
    local = sum(bool(kernel.count("STL", "LDL")) for kernel in kernels)
    print(
        f"{len(paths)} cubins, {len(kernels)} kernels: {len(faulty)} at fault; at most {most} registers; "
        f"{wide} with packs of 16 bytes; {local} with local memory"
    )
    return 1 if faulty or too_many else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
