"""The rules for ninja and the flags for torch, shared by setup.py, tests/emulator/build.py and tests/ptx/build.py."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent


class Object(NamedTuple):
    path: str
    source: Path
    flags: list[str]
    rule: str = "compile"
    """Or "nvcc"."""


def torch_include_flags(root: Path) -> list[str]:
    return [f"-isystem{path}" for path in (root / "include", root / "include/torch/csrc/api/include")]


def torch_link_flags(root: Path, system: str = sys.platform) -> list[str]:
    # Every torch has libtorch.so, which brings the CUDA half along where there is one. No rpath:
    # Python imports torch first. No OpenMP: the kernels' loops run on torch's own threads.
    libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if system == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup", *libraries]
    return ["-shared", "-Wl,--no-as-needed", *libraries, "-Wl,--as-needed"]


def ninja_file(
    library: str,
    objects: Sequence[Object],
    cxx: list[str],
    link: list[str],
    nvcc: str = "nvcc",
    built: Sequence[Path] = (),
    place: Path | None = None,
) -> str:
    """Rules that compile the objects and link them, and those that are built, into `library`; without a name, nothing
    is linked. place: the folder that ninja works in. The C++ compiler gets paths of this checkout relative to it: a
    compiler cache then finds what another checkout has compiled."""
    to_root = f"{os.path.relpath(ROOT, place)}/" if place else f"{ROOT}/"

    def command(words: Sequence[str]) -> str:
        return " ".join(map(shlex.quote, words)).replace("$", "$$")

    def name(path: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    lines = [
        "rule nvcc",
        f"  command = {command([nvcc])} $flags -MD -MT $out -MF $out.d $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule compile",
        # The flags come first: -x c++ applies to the files after it.
        f"  command = {command(cxx)} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {command(cxx)} $in {command(link)} -o $out",
        "  description = link $out",
    ]
    # The longest compilations start first: the kernels.
    for o in sorted(objects, key=lambda o: o.rule == "compile" and "kernels" not in o.path):
        source, flags = str(o.source), o.flags
        if o.rule == "compile":
            source, *flags = (word.replace(f"{ROOT}/", to_root) for word in (source, *flags))
        lines += [f"build {name(o.path)}: {o.rule} {name(source)}", f"  flags = {command(flags)}"]
    inputs = [*(o.path for o in objects), *built]
    lines += [f"build {name(library)}: link {' '.join(map(name, inputs))}"] * bool(library)
    return "\n".join(lines) + "\n"
