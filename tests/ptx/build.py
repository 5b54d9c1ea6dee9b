"""Builds the interpreter of PTX, and what it executes, with ninja, incrementally, into build/emulator/ptx.

    interpreter.so     the interpreter alone, for its own tests
    fastnorm_ptx.so    the ops of torch.ops.fastnorm_ptx: csrc/torch, the planner, and the host half of csrc/cuda as
                       nvcc compiles it, on the CUDA runtime of cuda_runtime.cpp
    sm_90/*.ptx        the kernels, as nvcc compiles them; so for sm_75 and sm_80 where a test asks for it

Needs nvcc for all but the first.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from setup_cuda import find_nvcc
from setup_ninja import Object, ninja_file, torch_link_flags
from tests.emulator.build import (
    CSRC,
    EMULATOR,
    PLACE,
    ROOT,
    BuildError,
    compiler,
    kernel_files,
    plain_object,
    planner_objects,
    run_ninja,
    torch_compile_flags,
    torch_objects,
    torch_root,
)

PTX = ROOT / "tests" / "ptx"
INTERPRETER = "ptx/interpreter.so"
LIBRARY = "ptx/fastnorm_ptx.so"

NVCC = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "--extended-lambda"]
# The host half runs for microseconds, and the device code beside it is not used.
NVCC_HOST = ["-gencode=arch=compute_90,code=compute_90", "-Xcicc=-O0", "-Xcompiler=-O0,-fPIC,-fvisibility=hidden", "-c"]


@functools.cache
def nvcc() -> str | None:
    """None where there is none."""
    return find_nvcc(os.environ)


def needed_nvcc() -> str:
    found = nvcc()
    if found is None:
        raise BuildError("there is no nvcc: install a CUDA toolkit, or set CUDA_HOME to where it is")
    return found


def interpreter_objects() -> list[Object]:
    """Rounding modes change while it runs, and every operation rounds by itself."""
    flags = [f"-I{PTX}", "-ffp-contract=off", "-frounding-math", "-fno-strict-aliasing", "-fno-math-errno"]
    sources = [path for path in sorted(PTX.glob("*.cpp")) if path.name not in ("cuda_runtime.cpp", "call_memory.cpp")]
    return [plain_object("plain", source, *flags, optimize="-O3") for source in sources]


def nvcc_object(path: str, source: Path, flags: Sequence[str], dtype: str = "") -> Object:
    own = [*NVCC, f"-I{CSRC}", f"-I{EMULATOR}", *([f"-DFASTNORM_DTYPE={dtype}"] if dtype else [])]
    return Object(path, source, [*own, *flags], "nvcc")


def file_name(name: str, dtype: str) -> str:
    return f"{name}.{dtype}" if dtype else name


def library_objects() -> list[Object]:
    host = [
        nvcc_object(f"ptx/{file_name(name, dtype)}.o", CSRC / "cuda" / f"{name}.cu", NVCC_HOST, dtype)
        for name, dtype in kernel_files()
    ]
    runtime = nvcc_object("ptx/cuda_runtime.o", PTX / "cuda_runtime.cpp", NVCC_HOST[2:])
    memory = plain_object("plain", PTX / "call_memory.cpp", f"-I{PTX}", *torch_compile_flags())
    own = [*host, runtime, memory, plain_object("plain", EMULATOR / "bindings.cpp")]
    return [*own, *torch_objects("fastnorm_ptx"), *planner_objects("plain"), *interpreter_objects()]


def build_interpreter(quiet: bool = True) -> Path:
    link = ["-shared", "-pthread", "-Wl,-z,defs"]
    run_ninja(INTERPRETER, ninja_file(INTERPRETER, interpreter_objects(), compiler(), link), quiet)
    return PLACE / INTERPRETER


def build_library(quiet: bool = True) -> Path:
    link = [*torch_link_flags(torch_root()), "-pthread", "-Wl,-z,defs"]
    run_ninja(LIBRARY, ninja_file(LIBRARY, library_objects(), compiler(), link, needed_nvcc()), quiet)
    return PLACE / LIBRARY


def build_kernels(arch: str, kernels: Sequence[tuple[str, str]] | None = None, quiet: bool = True) -> list[Path]:
    """The files of PTX, of all kernels unless some are named; arch: as "sm_90"."""
    objects = [
        nvcc_object(
            f"ptx/{arch}/{file_name(name, dtype)}.ptx",
            CSRC / "cuda" / f"{name}.cu",
            [f"-arch={arch}", "-ptx", "-lineinfo"],  # errors then name a line of the source
            dtype,
        )
        for name, dtype in kernels or kernel_files()
    ]
    run_ninja(f"ptx/{arch}", ninja_file("", objects, compiler(), [], needed_nvcc()), quiet)
    return [PLACE / o.path for o in objects]
