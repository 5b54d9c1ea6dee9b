"""Builds the extension `fastnorm._C` with ninja, incrementally, against the torch that will run it.

    pip install --no-build-isolation .        to use it
    python setup.py build_ext --inplace       to work on it

Environment variables:
    CXX                 the C++ compiler; default g++, on macOS clang++
    MAX_JOBS            compilations at a time; default the number of processors
    FASTNORM_CUDA       auto (default): CUDA kernels too, where torch has CUDA and there is an nvcc
                        0: none; 1: with any torch, for one that comes later
    TORCH_CUDA_ARCH_LIST  GPUs to compile for, as "9.0;12.0+PTX"; default those at hand, else all
    CUDA_HOME           the CUDA toolkit; default the newest in /usr/local, else nvcc's on PATH
    FASTNORM_LINEINFO   1: the CUDA kernels tell profilers and compute-sanitizer their lines
    FASTNORM_WERROR     1: warnings are errors

One `find_*` function finds each fact about this machine; where something is missing, it ends the build
with one sentence that says what to do. Sources are compiled in six groups:

    csrc/cpu/kernels*.cpp        once per instruction set; FASTNORM_CPU_CAPABILITY names it
    csrc/cuda/*.cu               by nvcc; files with FASTNORM_DTYPE in them, once per storage type
    csrc/torch/module.cpp        with pybind11, without torch: seconds instead of twenty
    csrc/torch/eager_norm.cpp    with both
    csrc/torch/*.cpp             with torch, without pybind11
    csrc/*/*.cpp                 plain C++; those of csrc/cuda only where CUDA kernels are built

Objects of torch or Python lie in build/PYTHON-TORCH, all others, which are most of the work, in build/kernels and
build/cuda-CODES: another torch compiles its binding only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

try:
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext
    from setuptools.command.dist_info import dist_info
except ImportError:
    raise SystemExit("fastnorm: setuptools is missing: run `pip install setuptools`.") from None

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))  # pip removes it when it builds
from setup_cuda import Cuda, cuda_mode, cuda_objects, find_cuda, stop, with_lines  # noqa: E402
from setup_ninja import Object, ninja_file, torch_include_flags, torch_link_flags  # noqa: E402

MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 10)
INSTALL = "`pip install --no-build-isolation .`"

COMMON_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-DNDEBUG"]
COMMON_FLAGS += ["-Wall", "-Wextra", "-fno-math-errno", "-fno-trapping-math"]

# No contraction: the kernels write out their fused multiply-adds, so that instruction sets agree.
KERNEL_FLAGS = ["-ffp-contract=off", "-Wno-psabi"]

AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86_CAPABILITIES = {  # least first
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [*AVX512_FLAGS, "-mfma", "-mf16c"],
}


# The tools, and what to do where one is missing.


class Torch(NamedTuple):
    version: str
    root: Path
    cxx11_abi: bool
    cuda: str = ""
    """The CUDA it was built with, if any."""
    gpus: tuple[str, ...] = ()
    """Compute capabilities of those at hand, as "9.0"."""


class Compiler(NamedTuple):
    command: list[str]
    version: str


class Tools(NamedTuple):
    torch: Torch
    compiler: Compiler
    capabilities: dict[str, list[str]]
    """Instruction sets to build for, baseline first, and the flags of each."""
    ninja: list[str]
    pybind11: Path
    python: Path
    jobs: int
    cuda: Cuda | None = None


def find_tools() -> Tools:
    check_platform()
    mode, jobs, ninja = cuda_mode(), max_jobs(), find_ninja()
    python, compiler, torch = find_python_headers(), find_compiler(), find_torch()
    pybind11, cuda = find_pybind11(torch), find_cuda(mode, torch.cuda, torch.gpus)
    return Tools(torch, compiler, find_capabilities(compiler), ninja, pybind11, python, jobs, cuda)


def check_platform(system: str = sys.platform) -> None:
    if not system.startswith(("linux", "darwin")):
        stop("it builds on Linux and macOS only: on Windows, install it inside WSL 2.")


def check_python(version: Sequence[int] = sys.version_info[:2]) -> None:
    if tuple(version) < MIN_PYTHON:
        found, least = "{}.{}".format(*version), "{}.{}".format(*MIN_PYTHON)
        stop(f"Python {found} is too old: install it with Python {least} or newer.")


def max_jobs(env: Mapping[str, str] = os.environ) -> int:
    jobs = env.get("MAX_JOBS", "").strip()
    if not jobs:
        on_linux = hasattr(os, "sched_getaffinity")
        return len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
    if not jobs.isdigit() or int(jobs) < 1:
        stop(f"MAX_JOBS={jobs} is no number of compilations: set it to 1 or more, or unset it.")
    return int(jobs)


PROBE_TORCH = """
import json, torch
abi, cuda, gpus = torch.compiled_with_cxx11_abi(), "", []
try:
    cuda = torch.version.cuda or ""
    gpus = ["%d.%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
except Exception:  # no driver, no GPU
    pass
print(json.dumps([str(torch.__version__), torch.__path__[0], bool(abi), cuda, gpus]))
"""


def find_torch(python: Sequence[str] = (sys.executable,), env: Mapping[str, str] = os.environ) -> Torch:
    """The torch that this Python will run: no other is of use to build against. pip's isolated builds hide
    it by means of PYTHONPATH, so where torch is not found, a second attempt goes without that variable."""
    hidden_by = ("PYTHONPATH", "PYTHONNOUSERSITE")
    for attempt in (env, {name: env[name] for name in env if name not in hidden_by}):
        probe = subprocess.run([*python, "-c", PROBE_TORCH], env=attempt, capture_output=True, text=True)
        if probe.returncode == 0:
            version, root, cxx11_abi, cuda, gpus = json.loads(probe.stdout.splitlines()[-1])
            check_torch_version(version)
            return Torch(version, Path(root), cxx11_abi, cuda, tuple(gpus))
        reason = (probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"])[-1]
        if "No module named 'torch'" not in reason:
            stop(
                f"the installed torch cannot be imported ({reason}): "
                f"reinstall it until `python -c 'import torch'` works, then run {INSTALL}."
            )
    stop(
        "it is built against the torch it will run with, and this Python has none: run "
        f"`pip install torch numpy ninja pybind11 setuptools`, then {INSTALL}."
    )


def check_torch_version(version: str) -> None:
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < MIN_TORCH:
        least = "{}.{}".format(*MIN_TORCH)
        stop(f"torch {version} is too old: run `pip install --upgrade 'torch>={least}'`, then {INSTALL}.")


CXX20 = """
#include <compare>
#include <concepts>
#include <string>
template <std::integral T>
std::strong_ordering compare(T a, T b) { return a <=> b; }
bool is_less(const std::string& text) { return text.starts_with("a") && compare(1, 2) < 0; }
"""


def find_compiler(env: Mapping[str, str] = os.environ) -> Compiler:
    named = env.get("CXX", "").strip()
    command = shlex.split(named or ("clang++" if sys.platform == "darwin" else "g++"))
    try:
        run = subprocess.run([*command, "--version"], capture_output=True, text=True)
    except OSError:
        run = None
    if run is None or run.returncode != 0:
        stop(
            f"the C++ compiler {' '.join(command)}{' named by CXX' if named else ''} does not run: "
            "install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
            "macOS: xcode-select --install), or set CXX to one."
        )
    compiler = Compiler(command, (run.stdout.strip().splitlines() or ["unknown"])[0])
    if not accepts(compiler, ["-std=c++20"], CXX20):
        stop(
            f"{compiler.version} does not compile the C++20 of torch's headers: "
            "install g++ 11 or newer, or clang 14 or newer, and set CXX to it."
        )
    return compiler


def accepts(compiler: Compiler, flags: Sequence[str], source: str = "") -> bool:
    trial = [*compiler.command, *flags, "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(trial, input=source, text=True, capture_output=True).returncode == 0


def find_capabilities(compiler: Compiler, machine: str = platform.machine()) -> dict[str, list[str]]:
    """The instruction sets of this architecture that the compiler knows."""
    known = X86_CAPABILITIES if machine.lower() in ("x86_64", "amd64") else {}
    return {"baseline": [], **{n: flags for n, flags in known.items() if accepts(compiler, flags)}}


def find_ninja() -> list[str]:
    # This Python's own comes first: a ninja of another version does not read the log, and compiles everything again.
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    on_path = shutil.which("ninja")
    if on_path:
        return [on_path]
    stop(f"ninja is missing: run `pip install ninja`, then {INSTALL}.")


def find_pybind11(torch: Torch) -> Path:
    """pybind11's headers: the package's, else the copy that torch ships."""
    spec = importlib.util.find_spec("pybind11")
    packages = (spec.submodule_search_locations if spec else None) or []
    for include in [*(Path(package) / "include" for package in packages), torch.root / "include"]:
        if (include / "pybind11" / "pybind11.h").is_file():
            return include
    stop(f"pybind11 is missing: run `pip install pybind11`, then {INSTALL}.")


def find_python_headers(include: str = sysconfig.get_paths()["include"]) -> Path:
    if not (Path(include) / "Python.h").is_file():
        stop(
            f"Python's own headers are missing (no Python.h in {include}): install them "
            "(Debian, Ubuntu: apt-get install python3-dev; Fedora: dnf install python3-devel)."
        )
    return Path(include)


# The build.


def place_of(torch: Torch) -> str:
    """The folder in build/ of what depends on the Python or on torch."""
    return f"{sys.implementation.cache_tag}-torch{torch.version}"


def plan_objects(csrc: Path, tools: Tools, version: str) -> list[Object]:
    """Every object file with its source and flags, in link order: kernels with wider instruction
    sets come last, so that the linker keeps the baseline copy of an inline function they share."""
    torch, capabilities, cuda = tools.torch, tools.capabilities, tools.cuda
    common = [*COMMON_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}", f"-I{csrc}"]
    common.append(f"-ffile-prefix-map={ROOT}/=")
    strict = os.environ.get("FASTNORM_WERROR") == "1"
    common += ["-Werror"] * strict
    facts = {
        "VERSION": version,
        "TORCH_VERSION": torch.version,
        "COMPILER": tools.compiler.version,
        "CPU_CAPABILITIES": " ".join(capabilities),
    }
    with_pybind11 = [f"-isystem{tools.pybind11}", f"-isystem{tools.python}"]
    with_pybind11 += [f"-DFASTNORM_{name}={json.dumps(text)}" for name, text in facts.items()]
    with_torch = torch_include_flags(torch.root)
    with_cuda = [f"-DFASTNORM_CUDA_BUILD={json.dumps(str(cuda))}"] if cuda else []
    plain = [f"-DFASTNORM_HAVE_{name.upper()}" for name in capabilities if name != "baseline"]

    objects, kernels, own_place = [], [], place_of(torch)
    places = ("core", "plan", "cpu", "torch", *(["cuda"] if cuda else []))
    for source in sorted(path for place in places for path in (csrc / place).glob("*.cpp")):
        name = "_".join(source.relative_to(csrc).with_suffix("").parts)
        if name.startswith("cpu_kernels"):
            kernels.append((name, source))
        elif name == "torch_module":
            objects.append(Object(f"{own_place}/{name}.o", source, common + with_pybind11 + with_cuda))
        elif name == "torch_eager_norm":  # the one place that knows Python's tensors
            objects.append(Object(f"{own_place}/{name}.o", source, common + with_pybind11 + with_torch))
        elif name.startswith("torch_"):
            own = [*with_torch, *(with_cuda if name.startswith("torch_backend") else [])]
            objects.append(Object(f"{own_place}/{name}.o", source, common + own))
        else:
            objects.append(Object(f"kernels/{name}.o", source, common + plain))
    for capability, flags in capabilities.items():
        own = [*common, *KERNEL_FLAGS, f"-DFASTNORM_CPU_CAPABILITY={capability}", *flags]
        objects += [Object(f"kernels/{name}.{capability}.o", source, own) for name, source in kernels]
    return objects + (cuda_objects(csrc, cuda.codes, with_lines(), strict) if cuda else [])


class CheckFirst(dist_info):
    """pip asks for the metadata first, so this command says what is missing before pip downloads anything."""

    def run(self) -> None:
        find_tools()
        super().run()


class BuildWithNinja(build_ext):
    def build_extension(self, ext: Extension) -> None:
        start = time.monotonic()
        tools = find_tools()
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = plan_objects(ROOT / "csrc", tools, self.distribution.get_version())

        build, place = ROOT / "build", place_of(tools.torch)
        (build / place).mkdir(parents=True, exist_ok=True)
        link, nvcc = [*torch_link_flags(tools.torch.root), "-ltorch_python"], "nvcc"
        if tools.cuda:
            link, nvcc = [*link, *tools.cuda.link], tools.cuda.nvcc
        built = f"{place}/{library.name}"
        rules = ninja_file(built, objects, tools.compiler.command, link, nvcc, place=build)
        (build / f"{place}.ninja").write_text(rules)
        ninja = [*tools.ninja, "-C", str(build), "-f", f"{place}.ninja"]
        if self.force:
            subprocess.run([*ninja, "-t", "clean"], check=False)
        if subprocess.run([*ninja, "-j", str(tools.jobs)]).returncode:
            stop("the build failed: the compiler's own message is above.")

        # copyfile sets the time to now: setuptools then copies the library to its place only where it is newer than the
        # one there, and after a change of torch ninja may have linked it long ago.
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / built, library)
        print(
            f"fastnorm: built {library.name} in {time.monotonic() - start:.0f} s for "
            f"{', '.join(tools.capabilities)}; CUDA {tools.cuda or 'none'}; "
            f"torch {tools.torch.version}; {tools.compiler.version}",
            flush=True,
        )


if __name__ == "__main__":
    check_python()
    setup(
        ext_modules=[Extension("fastnorm._C", sources=[])],
        cmdclass={"build_ext": BuildWithNinja, "dist_info": CheckFirst},
        license="Apache-2.0",
    )
