"""No processor meets an instruction that it does not have: inline functions are not shared between instruction sets.

The linker keeps the first copy of an inline function. A kernel object for AVX2 or AVX-512 may therefore define only
functions whose names say so, or functions of which an object for any processor comes first in link order.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from fastnorm import _C

BUILD = Path(__file__).parents[1] / "build"
PLACE = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
WIDE = ("avx2", "avx512")
WEAK = "WVu"  # nm's letters for symbols that several objects may define


def weak_symbols(obj: Path) -> set[str]:
    """The mangled names that the object defines and another object may define too."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("there is no nm")
    done = subprocess.run([nm, "-P", str(obj)], capture_output=True, text=True, check=True)
    return {name for name, kind, *_ in map(str.split, done.stdout.splitlines()) if kind in WEAK}


def capability_of(name: str) -> str:
    """The wider instruction set an object file is compiled for, or nothing."""
    return next((c for c in WIDE if name.endswith(f".{c}.o")), "")


def shared_symbols(objects: Mapping[str, set[str]]) -> list[str]:
    """The weak symbols of objects, given in link order, of which the linker keeps a wide copy that may run anywhere."""
    seen: set[str] = set()
    found = []
    for name, symbols in objects.items():
        capability = capability_of(name)
        if capability:
            own = f"{len(capability)}{capability}"  # a namespace as it is mangled
            found += [f"{symbol} in {name}" for symbol in sorted(symbols - seen) if own not in symbol]
        else:
            seen |= symbols
    return found


def linked_objects() -> list[Path]:
    """The object files of the extension that is loaded, in link order."""
    if not sys.platform.startswith("linux"):
        pytest.skip("objects are not ELF")
    rules, loaded = BUILD / f"{PLACE}.ninja", Path(str(_C.__file__))
    built = BUILD / PLACE / loaded.name
    if not rules.is_file() or not built.is_file() or built.read_bytes() != loaded.read_bytes():
        pytest.skip(f"the extension was not built in build/{PLACE}: there are no object files to look at")
    line = next(line for line in rules.read_text().splitlines() if ": link " in line)
    return [BUILD / name for name in line.partition(": link ")[2].split()]


def test_wide_kernels_share_no_function() -> None:
    objects = linked_objects()
    names = [path.name for path in objects]
    built = {capability_of(name) for name in names} - {""}
    assert built == set(_C.build_info()["cpu_capabilities"].split()) - {"baseline"}
    symbols = {path.name: weak_symbols(path) for path in objects}
    # Kernels are templates: where an object has no weak symbols, nm is not understood.
    assert all(symbols[name] for name in names if "kernels" in name)
    assert not shared_symbols(symbols)


SHARED = """
inline __attribute__((noinline)) int shared(int x) { return x * 3; }
namespace NAMESPACE {
template <class T> __attribute__((noinline)) T own(T x) { return x + 1; }
int entry(int x) { return own(shared(x)); }
}
"""
NOT_SHARED = SHARED.replace("shared(x)", "x")


@pytest.mark.parametrize("capability", WIDE)
def test_the_check_bites(capability: str, tmp_path: Path) -> None:
    """A shared inline function is found unless a copy for any processor comes first; others are no fault."""
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")
    if not sys.platform.startswith("linux") or shutil.which(compiler[0]) is None:
        pytest.skip("no compiler for ELF objects")

    def symbols(name: str, code: str) -> set[str]:
        path, namespace = tmp_path / name, capability_of(name) or "baseline"
        flags = ["-x", "c++", "-", f"-DNAMESPACE={namespace}", "-c", "-o", str(path)]
        subprocess.run([*compiler, *flags], input=code, text=True, check=True)
        return weak_symbols(path)

    plain, wide = "kernels.baseline.o", f"kernels.{capability}.o"
    both = {name: symbols(name, SHARED) for name in (plain, wide)}
    assert all(any("shared" in symbol for symbol in own) for own in both.values())
    assert not shared_symbols(both)
    assert [f.split()[-1] for f in shared_symbols(dict(reversed(both.items())))] == [wide]
    only_wide = {plain: symbols(plain, NOT_SHARED), wide: both[wide]}
    assert [f.split()[-1] for f in shared_symbols(only_wide)] == [wide]
    neither = {wide: symbols(wide, NOT_SHARED), plain: only_wide[plain]}
    assert all(neither.values()) and not shared_symbols(neither)
