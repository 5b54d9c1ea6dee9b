"""Builds the extension `fastnorm._C` with ninja, incrementally, against the torch that will run it.

    pip install --no-build-isolation .        to use it
    python setup.py build_ext --inplace       to work on it

Environment variables:
    CXX                 the C++ compiler; default g++, on macOS clang++
    MAX_JOBS            compilations at a time; default the number of processors
    FASTNORM_CUDA       auto (default) or 0: CPU only; 1, check: refused, no CUDA kernels yet
    FASTNORM_WERROR     1: warnings are errors

What must be known of this machine is found by one `find_*` function each; whatever is missing ends
the build with one sentence that says what to do. Sources are compiled in four groups:

    csrc/cpu/kernels*.cpp        once per instruction set; FASTNORM_CPU_CAPABILITY names it
    csrc/torch/module.cpp        with pybind11, without torch: seconds instead of twenty
    csrc/torch/*.cpp             with torch, without pybind11
    csrc/*.cpp csrc/cpu/*.cpp    plain C++
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
from typing import NamedTuple, NoReturn

try:
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext
    from setuptools.command.dist_info import dist_info
except ImportError:
    raise SystemExit("fastnorm: setuptools is missing: run `pip install setuptools`.") from None

ROOT = Path(__file__).parent.resolve()
MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 10)
INSTALL = "`pip install --no-build-isolation .`"

COMMON_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DNDEBUG"]
COMMON_FLAGS += ["-Wall", "-Wextra", "-fno-math-errno", "-fno-trapping-math"]

# No contraction: the kernels write out their fused multiply-adds, so that instruction sets agree.
KERNEL_FLAGS = ["-ffp-contract=off", "-Wno-psabi"]

AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86_CAPABILITIES = {  # least first
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [*AVX512_FLAGS, "-mfma", "-mf16c"],
}


def stop(sentence: str) -> NoReturn:
    raise SystemExit(f"fastnorm: {sentence}")


# What is there, and what to do when it is not.


class Torch(NamedTuple):
    version: str
    root: Path
    cxx11_abi: bool


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


def find_tools() -> Tools:
    check_platform()
    check_cuda_mode()
    jobs, ninja, python, compiler = max_jobs(), find_ninja(), find_python_headers(), find_compiler()
    torch = find_torch()
    return Tools(torch, compiler, find_capabilities(compiler), ninja, find_pybind11(torch), python, jobs)


def check_platform(system: str = sys.platform) -> None:
    if not system.startswith(("linux", "darwin")):
        stop("it builds on Linux and macOS only: on Windows, install it inside WSL 2.")


def check_python(version: Sequence[int] = sys.version_info[:2]) -> None:
    if tuple(version) < MIN_PYTHON:
        found, least = "{}.{}".format(*version), "{}.{}".format(*MIN_PYTHON)
        stop(f"Python {found} is too old: install it with Python {least} or newer.")


def check_cuda_mode(env: Mapping[str, str] = os.environ) -> None:
    mode = env.get("FASTNORM_CUDA") or "auto"
    if mode in ("1", "check"):
        stop(
            f"FASTNORM_CUDA={mode}, but this release has no CUDA kernels yet: "
            "unset it, or set FASTNORM_CUDA=0, to build the CPU backend."
        )
    if mode not in ("auto", "0"):
        stop(f"FASTNORM_CUDA={mode} is none of auto, 0, 1 and check: unset it.")


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
abi = torch.compiled_with_cxx11_abi()
print(json.dumps([str(torch.__version__), torch.__path__[0], bool(abi)]))
"""


def find_torch(python: Sequence[str] = (sys.executable,), env: Mapping[str, str] = os.environ) -> Torch:
    """The torch that this Python will run. pip's isolated builds hide it by PYTHONPATH, so where
    there is none it is looked for without that: building against any other would be of no use."""
    hidden_by = ("PYTHONPATH", "PYTHONNOUSERSITE")
    for attempt in (env, {name: env[name] for name in env if name not in hidden_by}):
        probe = subprocess.run([*python, "-c", PROBE_TORCH], env=attempt, capture_output=True, text=True)
        if probe.returncode == 0:
            version, root, cxx11_abi = json.loads(probe.stdout.splitlines()[-1])
            check_torch_version(version)
            return Torch(version, Path(root), cxx11_abi)
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
    return Compiler(command, (run.stdout.strip().splitlines() or ["unknown"])[0])


def accepts(compiler: Compiler, flags: Sequence[str]) -> bool:
    trial = [*compiler.command, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(trial, capture_output=True).returncode == 0


def find_capabilities(compiler: Compiler, machine: str = platform.machine()) -> dict[str, list[str]]:
    """The instruction sets of this architecture that the compiler knows."""
    known = X86_CAPABILITIES if machine.lower() in ("x86_64", "amd64") else {}
    return {"baseline": [], **{n: flags for n, flags in known.items() if accepts(compiler, flags)}}


def find_ninja() -> list[str]:
    # This Python's own first: versions of ninja do not read each other's logs, and compile it all again.
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


class Object(NamedTuple):
    path: str
    source: Path
    flags: list[str]


def plan_objects(csrc: Path, tools: Tools, version: str) -> list[Object]:
    """Every object file with its source and flags, in link order: kernels with wider instruction
    sets come last, so that the linker keeps the baseline copy of an inline function they share."""
    torch, capabilities = tools.torch, tools.capabilities
    common = [*COMMON_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}", f"-I{csrc}"]
    common.append(f"-ffile-prefix-map={ROOT}=.")
    if os.environ.get("FASTNORM_WERROR") == "1":
        common.append("-Werror")
    facts = {
        "VERSION": version,
        "TORCH_VERSION": torch.version,
        "COMPILER": tools.compiler.version,
        "COMPILER_FLAGS": " ".join(COMMON_FLAGS),
        "CPU_CAPABILITIES": " ".join(capabilities),
    }
    with_pybind11 = [f"-isystem{tools.pybind11}", f"-isystem{tools.python}"]
    with_pybind11 += [f"-DFASTNORM_{name}={json.dumps(text)}" for name, text in facts.items()]
    includes = (torch.root / "include", torch.root / "include/torch/csrc/api/include")
    with_torch = [f"-isystem{path}" for path in includes]
    plain = [f"-DFASTNORM_HAVE_{name.upper()}" for name in capabilities if name != "baseline"]

    objects, kernels = [], []
    for source in sorted(path for place in ("", "cpu/", "torch/") for path in csrc.glob(place + "*.cpp")):
        name = "_".join(source.relative_to(csrc).with_suffix("").parts)
        if name.startswith("cpu_kernels"):
            kernels.append((name, source))
        elif name == "torch_module":
            objects.append(Object(f"{name}.o", source, common + with_pybind11))
        else:
            own = with_torch if name.startswith("torch_") else plain
            objects.append(Object(f"{name}.o", source, common + own))
    for capability, flags in capabilities.items():
        own = [*common, *KERNEL_FLAGS, f"-DFASTNORM_CPU_CAPABILITY={capability}", *flags]
        objects += [Object(f"{name}.{capability}.o", source, own) for name, source in kernels]
    return objects


def link_flags(torch: Torch, system: str = sys.platform) -> list[str]:
    # libtorch.so is in every torch and brings the CUDA half along where there is one. No rpath:
    # torch is imported first. No OpenMP: the kernels' loops run on torch's own threads.
    libraries = [f"-L{torch.root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if system == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup", *libraries]
    return ["-shared", "-Wl,--no-as-needed", *libraries, "-Wl,--as-needed"]


def ninja_file(library: str, objects: Sequence[Object], cxx: list[str], link: list[str]) -> str:
    def command(words: Sequence[str]) -> str:
        return " ".join(map(shlex.quote, words)).replace("$", "$$")

    def name(path: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    lines = [
        "rule compile",
        f"  command = {command(cxx)} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {command(cxx)} $in {command(link)} -o $out",
        "  description = link $out",
    ]
    # The longest compilations start first: the kernels.
    for o in sorted(objects, key=lambda o: "kernels" not in o.path):
        lines += [f"build {name(o.path)}: compile {name(o.source)}", f"  flags = {command(o.flags)}"]
    lines.append(f"build {name(library)}: link {' '.join(name(o.path) for o in objects)}")
    return "\n".join(lines) + "\n"


class CheckFirst(dist_info):
    """pip asks for the metadata first: whatever is missing is said before it downloads anything."""

    def run(self) -> None:
        find_tools()
        super().run()


class BuildWithNinja(build_ext):
    def build_extension(self, ext: Extension) -> None:
        start = time.monotonic()
        tools = find_tools()
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = plan_objects(ROOT / "csrc", tools, self.distribution.get_version())

        place = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{tools.torch.version}"
        place.mkdir(parents=True, exist_ok=True)
        rules = ninja_file(library.name, objects, tools.compiler.command, link_flags(tools.torch))
        (place / "build.ninja").write_text(rules)
        ninja = [*tools.ninja, "-C", str(place)]
        if self.force:
            subprocess.run([*ninja, "-t", "clean"], check=False)
        if subprocess.run([*ninja, "-j", str(tools.jobs)]).returncode:
            stop("the C++ build failed: the compiler's own message is above.")

        library.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(place / library.name), str(library))
        print(
            f"fastnorm: built {library.name} in {time.monotonic() - start:.0f} s for "
            f"{', '.join(tools.capabilities)}; torch {tools.torch.version}; "
            f"{tools.compiler.version}",
            flush=True,
        )


if __name__ == "__main__":
    check_python()
    setup(
        ext_modules=[Extension("fastnorm._C", sources=[])],
        cmdclass={"build_ext": BuildWithNinja, "dist_info": CheckFirst},
        license="Apache-2.0",
    )
