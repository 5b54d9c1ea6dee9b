"""The part of setup.py that knows CUDA: finds the toolkit, the GPUs to compile for, and nvcc's flags.

FASTNORM_LINEINFO=1 adds the kernels' lines, for profilers and compute-sanitizer. It is for development: with them an
object of the bfloat16 kernels takes 3.5 MB instead of 1.4, and a library for six architectures 160 MB instead of 65.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from setup_ninja import Object

CUDA_ARCHS = ["75", "80", "86", "90", "100", "120"]
GENERATIONS = [75, 80, 90]
"""nvcc makes PTX for these, which is two thirds of its time, and from it the machine code of the newer ones up to the
next. csrc/cuda tells them apart (__CUDA_ARCH__). From the PTX of compute_100 and compute_120 of nvcc 13.0 nine kernels
spilled registers, up to 700 bytes, that do not from compute_90's."""
MIN_CUDA = (12, 0)

STORAGE_TYPES = ["float", "double", "BFloat16", "Float16"]
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "--extended-lambda"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden"]


def with_lines(env: Mapping[str, str] = os.environ) -> bool:
    return env.get("FASTNORM_LINEINFO") == "1"


def stop(sentence: str) -> NoReturn:
    raise SystemExit(f"fastnorm: {sentence}")


class Cuda(NamedTuple):
    nvcc: str
    version: str
    codes: list[str]
    """Targets: sm_90 is machine code, compute_90 is PTX for every newer GPU."""
    link: list[str]

    def __str__(self) -> str:
        return " ".join([self.version, *self.codes])


def generation_of(arch: int | str) -> int:
    """That whose PTX an architecture's machine code is made from."""
    return max((g for g in GENERATIONS if g <= int(arch)), default=int(arch))


def by_generation(codes: Sequence[str]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for code in codes:
        found.setdefault(generation_of(code.split("_")[1]), []).append(code)
    return found


def gencode_flags(codes: Sequence[str]) -> list[str]:
    return [f"-gencode=arch=compute_{g},code=[{','.join(those)}]" for g, those in by_generation(codes).items()]


HOST_FILES = ("platform.cu",)
"""What the host asks of CUDA: no kernels."""


def kernel_files(csrc: Path) -> list[tuple[str, str]]:
    """The name and the storage type of every compilation of kernels; "" where a file is of no storage type."""
    sources = sorted(path for path in (csrc / "cuda").glob("*.cu") if path.name not in HOST_FILES)
    typed = {source.stem: "FASTNORM_DTYPE" in source.read_text() for source in sources}
    return [(name, dtype) for name in typed for dtype in (STORAGE_TYPES if typed[name] else [""])]


def file_name(name: str, dtype: str) -> str:
    return f"{name}.{dtype}" if dtype else name


def cuda_objects(csrc: Path, codes: Sequence[str], lines: bool, strict: bool) -> list[Object]:
    """The CUDA kernels and what launches them. lines: with the lines of the source; strict: warnings are errors."""
    place = "-".join(["cuda", *codes, *["lines"] * lines])
    host = [path for name in HOST_FILES if (path := csrc / "cuda" / name).exists()]
    own = [*NVCC_FLAGS, *["-lineinfo"] * lines, *["--Werror=all-warnings"] * strict, *gencode_flags(codes), f"-I{csrc}"]
    return [
        Object(
            f"{place}/{file_name(name, dtype)}.o",
            csrc / "cuda" / f"{name}.cu",
            [*own, *[f"-DFASTNORM_DTYPE={dtype}"] * bool(dtype), "-c"],
            "nvcc",
        )
        for name, dtype in [*kernel_files(csrc), *((path.stem, "") for path in host)]
    ]


def cuda_mode(env: Mapping[str, str] = os.environ) -> str:
    mode = env.get("FASTNORM_CUDA") or "auto"
    if mode not in ("auto", "0", "1"):
        stop(f"FASTNORM_CUDA={mode} is none of auto, 0 and 1: unset it.")
    return mode


def find_cuda(
    mode: str, torch_cuda: str = "", gpus: Sequence[str] = (), env: Mapping[str, str] = os.environ
) -> Cuda | None:
    """The toolkit and what to compile for; None where this mode goes without.

    torch_cuda: the CUDA torch was built with, "" if none; gpus: those at hand, as "9.0".
    """
    if mode == "0" or (mode == "auto" and not torch_cuda):
        return None
    nvcc = find_nvcc(env)
    if nvcc is None and mode == "auto":
        print("fastnorm: torch has CUDA, and there is no nvcc (set CUDA_HOME): no CUDA kernels.", flush=True)
        return None
    if nvcc is None:
        stop(f"FASTNORM_CUDA={mode}, but there is no nvcc: install a CUDA toolkit, or set CUDA_HOME to where it is.")
    found = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if found is None or (int(found[1]), int(found[2])) < MIN_CUDA:
        least = "{}.{}".format(*MIN_CUDA)
        stop(f"{nvcc} is not of CUDA {least} or newer: set CUDA_HOME to a toolkit that is.")
    codes = find_cuda_codes(nvcc, gpus, env)
    return Cuda(nvcc, f"{found[1]}.{found[2]}", codes, find_cuda_libraries(nvcc))


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def find_nvcc(env: Mapping[str, str] = os.environ, root: Path = Path("/usr/local")) -> str | None:
    """The nvcc in a toolkit's own folder where there is one: the one on PATH may be a wrapper somewhere else."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(name) and not Path(env[name], "bin/nvcc").is_file():
            stop(f"{name}={env[name]} has no bin/nvcc: set it to a CUDA toolkit's folder, or unset it.")
    newest_first = sorted(root.glob("cuda-*"), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)], reverse=True)
    for toolkit in (env.get("CUDA_HOME"), env.get("CUDA_PATH"), root / "cuda", *newest_first):
        if toolkit and Path(toolkit, "bin/nvcc").is_file():
            return str(Path(toolkit, "bin/nvcc"))
    return shutil.which("nvcc", path=env.get("PATH"))


def find_cuda_codes(nvcc: str, gpus: Sequence[str], env: Mapping[str, str] = os.environ) -> list[str]:
    known = re.findall(r"sm_(\d+)", output_of(nvcc, "--list-gpu-code"))
    codes, ptx = [], []
    for name in env.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split() or sorted(set(gpus)):
        found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if found is None:
            stop(f"TORCH_CUDA_ARCH_LIST has {name} in it: write numbers, as in 9.0;12.0+PTX.")
        arch = found[1] + found[2]
        if arch not in known:
            stop(f"{nvcc} does not compile for compute capability {name}: set CUDA_HOME to a toolkit that does.")
        codes.append(f"sm_{arch}")
        ptx += [f"compute_{generation_of(arch)}"] * bool(found[3])
    if not codes:
        archs = [arch for arch in CUDA_ARCHS if arch in known]
        codes, ptx = [f"sm_{arch}" for arch in archs], [f"compute_{generation_of(archs[-1])}"]
    return codes + sorted(set(ptx))


def find_cuda_libraries(nvcc: str) -> list[str]:
    """Linker flags. The runtime is linked statically, so that the extension also loads where there is no driver."""
    dry_run = output_of(nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull)
    for folder in re.findall(r'"-L([^"]+)"', dry_run):
        if Path(folder, "libcudart_static.a").is_file():
            return [f"-L{folder}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    stop(f"the toolkit of {nvcc} has no libcudart_static.a: set CUDA_HOME to one that is complete.")
