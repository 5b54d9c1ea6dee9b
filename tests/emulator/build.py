"""Builds the emulator, which runs the CUDA kernels without a GPU, with ninja, incrementally, into build/emulator.

    python tests/emulator/build.py                    all of it
    python tests/emulator/build.py thread/self_test   one target

Every target is VARIANT/NAME. Variants: `plain`; `address`, AddressSanitizer and UndefinedBehaviorSanitizer; `thread`,
ThreadSanitizer. Names:

    self_test               the emulator's own tests
    drive_kernels           the production kernels under several schedules, without torch
    fastnorm_emulated.so    the ops of torch.ops.fastnorm_emulated and the emulator's controls; plain only

CXX names the compiler (default g++; C++20), MAX_JOBS the number of compilations at a time.
"""

from __future__ import annotations

import fcntl
import functools
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # run as a file, only its own folder is on the path

import setup_cuda  # noqa: E402
from setup_cuda import STORAGE_TYPES  # noqa: E402
from setup_ninja import Object, ninja_file, torch_include_flags, torch_link_flags  # noqa: E402

CSRC = ROOT / "csrc"
EMULATOR = ROOT / "tests" / "emulator"
PLACE = ROOT / "build" / "emulator"
LIBRARY = "plain/fastnorm_emulated.so"

VARIANTS = ("plain", "address", "thread")

COMMON = ["-std=c++20", "-DFASTNORM_EMULATE", f"-I{CSRC}", f"-I{EMULATOR}", f"-ffile-prefix-map={ROOT}/="]
COMMON += ["-fPIC", "-fvisibility=hidden", "-pthread", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# g++ does not see that a value which one branch reads is used in that branch alone.
COMMON += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
SANITIZE = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread"],
}
# The storage types whose kernels a variant compiles. Two types of a size are the same to a sanitizer, and to that of
# threads all are: it looks for the order of events. drive_kernels_types.cpp stands in for the others.
VARIANT_TYPES = {"plain": STORAGE_TYPES, "address": ["float", "BFloat16"], "thread": ["float"]}
SANITIZER_MACRO = {
    "plain": [],
    "address": ["-DFASTNORM_SANITIZE_ADDRESS"],
    "thread": ["-DFASTNORM_SANITIZE_THREAD"],
}
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=66 atexit_sleep_ms=0",
}


class Target(NamedTuple):
    path: str
    objects: list[Object]
    flags: list[str]


class BuildError(Exception):
    pass


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "").strip() or "g++")


@functools.cache
def machine_flags() -> list[str]:
    """Flags for this machine's instructions: without them every fused multiply-add is a call of the C library."""
    trial = [*compiler(), "-march=native", "-fsyntax-only", "-x", "c++", os.devnull]
    return ["-march=native"] if subprocess.run(trial, capture_output=True).returncode == 0 else []


# Objects and their flags.


def plain_object(variant: str, source: Path, *flags: str, suffix: str = "", optimize: str = "-O2") -> Object:
    """One source. In the variant `thread` all but the emulator is compiled for ThreadSanitizer: see sanitizer.h."""
    name = "_".join(source.relative_to(ROOT).with_suffix("").parts) + suffix
    sanitize = [] if variant == "thread" and source.name == "emulator.cpp" else SANITIZE[variant]
    own = [*COMMON, *machine_flags(), optimize, *sanitize, *SANITIZER_MACRO[variant], *flags]
    return Object(f"{variant}/{name}.o", source, own)


def emulator_objects(variant: str) -> list[Object]:
    return [plain_object(variant, EMULATOR / "emulator.cpp")]


@functools.cache
def kernel_files() -> tuple[tuple[str, str], ...]:
    return tuple(setup_cuda.kernel_files(CSRC))


def kernel_objects(variant: str) -> list[Object]:
    """The CUDA half of csrc without the binding. Without optimization AddressSanitizer takes a third of the time."""
    optimize = {"plain": "-O2", "address": "-O0", "thread": "-O1"}[variant]
    objects = [
        plain_object(
            variant,
            CSRC / "cuda" / f"{name}.cu",
            *([f"-DFASTNORM_DTYPE={dtype}"] if dtype else []),
            *("-x", "c++"),
            suffix=f".{dtype}" if dtype else "",
            optimize=optimize,
        )
        for name, dtype in kernel_files()
        if dtype in ("", *VARIANT_TYPES[variant])
    ]
    return objects + planner_objects(variant)


def planner_objects(variant: str) -> list[Object]:
    """What chooses a kernel and its launch."""
    planners = [path for path in sorted((CSRC / "plan").glob("*.cpp")) if path.name != "cpu.cpp"]
    plain = (CSRC / "cuda" / "dispatch.cpp", CSRC / "core" / "geometry.cpp", *planners)
    return [plain_object(variant, source) for source in plain]


def torch_root() -> Path:
    import torch

    return Path(torch.__path__[0])


def torch_compile_flags() -> list[str]:
    import torch

    flags = torch_include_flags(torch_root())
    return [*flags, "-O1", "-DNDEBUG", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]


def torch_objects(namespace: str = "fastnorm_emulated") -> list[Object]:
    """The binding, whose ops are those of torch.ops.NAMESPACE."""
    flags = torch_compile_flags()
    objects = [
        plain_object("plain", CSRC / "torch" / f"{name}.cpp", *flags)
        for name in ("backend", "backend_cuda", "images", "ops")
    ]
    named = [*flags, f"-DFASTNORM_NAMESPACE={namespace}"]
    return [*objects, plain_object("plain", CSRC / "torch" / "library.cpp", *named, suffix=f".{namespace}")]


def make_target(path: str) -> Target:
    variant, name = path.split("/")
    link = [*SANITIZE[variant], "-pthread"]
    if path == LIBRARY:
        bindings = plain_object(variant, EMULATOR / "bindings.cpp")
        objects = [*torch_objects(), *kernel_objects(variant), *emulator_objects(variant), bindings]
        return Target(path, objects, [*link, *torch_link_flags(torch_root())])
    sources = sorted(EMULATOR.glob(f"{name}*.cpp"))
    if variant not in VARIANTS or not sources:
        raise BuildError(f"no target {path}")
    absent = " ".join(f"ABSENT({dtype})" for dtype in STORAGE_TYPES if dtype not in VARIANT_TYPES[variant])
    objects = [
        plain_object(variant, source, f"-DFASTNORM_ABSENT={absent}", optimize="-O2" if variant == "plain" else "-O1")
        for source in sources
    ]
    objects += emulator_objects(variant) + (kernel_objects(variant) if name == "drive_kernels" else [])
    return Target(path, objects, link)


def all_targets() -> list[str]:
    return [LIBRARY, *(f"{variant}/{name}" for name in ("self_test", "drive_kernels") for variant in VARIANTS)]


def build(path: str, quiet: bool = True) -> Path:
    """Brings a target up to date and returns its file. Raises BuildError with what the compiler says."""
    target = make_target(path)
    run_ninja(path, ninja_file(target.path, target.objects, compiler(), target.flags, place=PLACE), quiet)
    return PLACE / path


def run_ninja(name: str, text: str, quiet: bool = True, place: Path = PLACE) -> None:
    """Brings all that ninja's file makes, in the folder, up to date."""
    place.mkdir(parents=True, exist_ok=True)
    rules = place / (name.replace("/", "_") + ".ninja")
    with open(place / "lock", "w") as lock:  # pytest-xdist: one process builds, the others find it built
        fcntl.flock(lock, fcntl.LOCK_EX)
        rules.write_text(text)
        command = [sys.executable, "-m", "ninja", "-C", str(place), "-f", rules.name]
        if os.environ.get("MAX_JOBS", "").strip():
            command += ["-j", os.environ["MAX_JOBS"]]
        run = subprocess.run(command, stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT, text=True)
    if run.returncode != 0:
        raise BuildError(f"{name} cannot be built:\n{run.stdout or ''}")


# Running a program under its sanitizer.


@functools.cache
def runner(variant: str) -> list[str]:
    """The words to put before the command. Raises BuildError where this machine cannot run the variant."""
    trial = PLACE / f"trial_{variant}"
    PLACE.mkdir(parents=True, exist_ok=True)
    link = [*compiler(), *SANITIZE[variant], "-x", "c++", "-", "-o", str(trial)]
    linked = subprocess.run(link, input="int main() {}", capture_output=True, text=True)
    if linked.returncode != 0:
        raise BuildError(f"the compiler has no runtime for {SANITIZE[variant]}: {linked.stderr.strip()[-300:]}")
    # The ThreadSanitizer of older compilers does not know the address layout of newer kernels, unless it is not random.
    found = ""
    for prefix in ([], ["setarch", platform.machine(), "--addr-no-randomize"]):
        try:
            run = subprocess.run([*prefix, str(trial)], capture_output=True, text=True)
        except OSError as error:
            found = str(error)
            continue
        if run.returncode == 0:
            return prefix
        found = run.stderr.strip()[-300:]
    raise BuildError(f"a program with {SANITIZE[variant]} does not run here: {found}")


def run(path: str, *arguments: str, timeout: float = 550) -> subprocess.CompletedProcess[str]:
    """Runs a built program; stdout and stderr come back as one text."""
    variant = path.split("/")[0]
    return subprocess.run(
        [*runner(variant), str(PLACE / path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env={**os.environ, **SANITIZER_OPTIONS},
    )


if __name__ == "__main__":
    try:
        for wanted in sys.argv[1:] or all_targets():
            build(wanted, quiet=False)
    except BuildError as error:
        raise SystemExit(f"emulator: {error}") from None
