"""Builds the interpreter of PTX, and what it executes, with ninja, incrementally, into build/emulator/ptx.

    interpreter.so     the interpreter alone, for its own tests
    fastnorm_ptx.so    the ops of torch.ops.fastnorm_ptx: csrc/torch, the planner, and the objects of csrc/cuda that an
                       installation for an H100 links, with the CUDA runtime of cuda_runtime.cpp
    sm_90/*.ptx        the kernels: the PTX in these objects. For other architectures, where a test asks for one, PTX
                       that nvcc writes.

Needs nvcc for all but the first.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from setup_cuda import NVCC_FLAGS, cuda_objects, file_name, find_nvcc
from setup_ninja import Object, ninja_file, torch_link_flags
from tests.common.cuda_tools import extract_ptx
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

# As for TORCH_CUDA_ARCH_LIST=9.0+PTX: the code of the objects is checked elsewhere, their PTX is what is executed.
ARCH = "sm_90"
CODES = (ARCH, "compute_90")


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


def shipped_objects() -> list[Object]:
    """With the lines of the source, which errors and mutants name."""
    return cuda_objects(CSRC, CODES, lines=True, strict=False)


def compile_objects(name: str, objects: Sequence[Object], quiet: bool = True) -> list[Path]:
    """By nvcc, in the folder that setup.py builds in."""
    place = ROOT / "build"
    run_ninja(name, ninja_file("", objects, [], [], needed_nvcc()), quiet, place)
    return [place / o.path for o in objects]


def build_shipped(quiet: bool = True) -> list[Path]:
    """FASTNORM_CUDA=1 FASTNORM_LINEINFO=1 TORCH_CUDA_ARCH_LIST=9.0+PTX then finds them compiled."""
    return compile_objects("cuda-ptx", shipped_objects(), quiet)


def library_objects() -> list[Object]:
    runtime = Object(
        "ptx/cuda_runtime.o",
        PTX / "cuda_runtime.cpp",
        [*NVCC_FLAGS, f"-I{CSRC}", f"-I{EMULATOR}", "-c"],
        "nvcc",
    )
    memory = plain_object("plain", PTX / "call_memory.cpp", f"-I{PTX}", *torch_compile_flags())
    own = [runtime, memory, plain_object("plain", EMULATOR / "bindings.cpp")]
    return [*own, *torch_objects("fastnorm_ptx"), *planner_objects("plain"), *interpreter_objects()]


def build_interpreter(quiet: bool = True) -> Path:
    link = ["-shared", "-pthread", "-Wl,-z,defs"]
    run_ninja(INTERPRETER, ninja_file(INTERPRETER, interpreter_objects(), compiler(), link, place=PLACE), quiet)
    return PLACE / INTERPRETER


def build_library(quiet: bool = True) -> Path:
    shipped = build_shipped(quiet)
    link = [*torch_link_flags(torch_root()), "-pthread", "-Wl,-z,defs"]
    rules = ninja_file(LIBRARY, library_objects(), compiler(), link, needed_nvcc(), shipped, PLACE)
    run_ninja(LIBRARY, rules, quiet)
    return PLACE / LIBRARY


def build_kernels(arch: str, kernels: Sequence[tuple[str, str]] | None = None, quiet: bool = True) -> list[Path]:
    """The files of PTX, of all kernels unless some are named; arch: as "sm_90"."""
    names = [file_name(*kernel) for kernel in kernels or kernel_files()]
    paths = [PLACE / f"ptx/{arch}/{name}.ptx" for name in names]
    if arch == ARCH:
        shipped = {path.stem: path for path in build_shipped(quiet)}
        for name, path in zip(names, paths, strict=True):
            extract_ptx(shipped[name], path)
        return paths
    flags = [*NVCC_FLAGS, f"-I{CSRC}", f"-arch={arch}", "-ptx", "-lineinfo"]
    objects = [
        Object(
            str(path.relative_to(PLACE)),
            CSRC / "cuda" / f"{name}.cu",
            [*flags, *[f"-DFASTNORM_DTYPE={dtype}"] * bool(dtype)],
            "nvcc",
        )
        for path, (name, dtype) in zip(paths, kernels or kernel_files(), strict=True)
    ]
    run_ninja(f"ptx/{arch}", ninja_file("", objects, compiler(), [], needed_nvcc()), quiet)
    return paths
