"""The rules for ninja and the flags for torch, shared by setup.py and tests/emulator/build.py."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Object(NamedTuple):
    path: str
    source: Path
    flags: list[str]
    rule: str = "compile"
    """Or "nvcc", or "cubin", which keeps ptxas's report beside the object."""


def torch_include_flags(root: Path) -> list[str]:
    return [f"-isystem{path}" for path in (root / "include", root / "include/torch/csrc/api/include")]


def torch_link_flags(root: Path, system: str = sys.platform) -> list[str]:
    # Every torch has libtorch.so, which brings the CUDA half along where there is one. No rpath:
    # Python imports torch first. No OpenMP: the kernels' loops run on torch's own threads.
    libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if system == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup", *libraries]
    return ["-shared", "-Wl,--no-as-needed", *libraries, "-Wl,--as-needed"]


def ninja_file(library: str, objects: Sequence[Object], cxx: list[str], link: list[str], nvcc: str = "nvcc") -> str:
    """Rules that compile the objects and link them into `library`; without a name, nothing is linked."""

    def command(words: Sequence[str]) -> str:
        return " ".join(map(shlex.quote, words)).replace("$", "$$")

    def name(path: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    nvcc_lines = ["  depfile = $out.d", "  deps = gcc", "  description = compile $out"]
    by_nvcc = f"  command = {command([nvcc])} $flags -MD -MT $out -MF $out.d $in -o $out"
    lines = [
        *("rule nvcc", by_nvcc, *nvcc_lines),
        *("rule cubin", f"{by_nvcc} 2> $out.ptxas || {{ cat $out.ptxas; exit 1; }}", *nvcc_lines),
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
        lines += [f"build {name(o.path)}: {o.rule} {name(o.source)}", f"  flags = {command(o.flags)}"]
    lines += [f"build {name(library)}: link {' '.join(name(o.path) for o in objects)}"] * bool(library)
    return "\n".join(lines) + "\n"
