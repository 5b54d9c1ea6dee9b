"""Compiles what the tests run the CUDA kernels on without a GPU, before a test's time begins.

    python -m tests.prepare [--backend NAME ...]    --backend: as for pytest, whose other arguments may stand beside it

The tests compile what is missing themselves, in silence; a whole build takes minutes, more than the first test may.
"""

from __future__ import annotations

import argparse
import sys

from tests.emulator import build as emulator
from tests.ptx import build as ptx


def prepare_emulator() -> None:
    for path in emulator.all_targets():
        try:
            emulator.runner(path.split("/")[0])
        except emulator.BuildError as error:  # the tests of this variant skip themselves
            print(f"tests: without {path}: {error}")
            continue
        emulator.build(path, quiet=False)


def prepare_ptx() -> None:
    ptx.build_interpreter(quiet=False)
    if ptx.nvcc() is None:
        print("tests: without the kernels' PTX: there is no nvcc")
        return
    ptx.build_library(quiet=False)
    ptx.build_kernels("sm_90", quiet=False)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--backend", action="append")
    named = parser.parse_known_args(arguments)[0].backend
    try:
        if named is None or "emulated" in named:
            prepare_emulator()
        if named is None or "ptx" in named:
            prepare_ptx()
    except emulator.BuildError as error:
        raise SystemExit(f"tests: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
