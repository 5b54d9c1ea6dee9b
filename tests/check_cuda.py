"""Compiles the CUDA kernels and checks their machine code: `make check-cuda`. Needs nvcc, no GPU.

    python tests/check_cuda.py             for every architecture, or for those that TORCH_CUDA_ARCH_LIST names
    python tests/check_cuda.py --update    the same, and saves what it counts in tests/sass.json
    python tests/check_cuda.py --sample    sm_90, and one file for each of the others: what CI has the time for

tests/check_sass.py says what is checked. All architectures take half an hour on two cores. The record has the kernels,
registers and instructions of every object and architecture, and a digest of the code that they were compiled from:
while the code is the same, so is all that the same nvcc makes of it. --sample therefore fails where the digest differs,
or what it counts; it names the architectures that are not in the record, and tells their faults without failing. What
an nvcc of another version makes cannot be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, only its own folder is on the path

from benchmarks.results import json_text
from setup_cuda import by_generation, cuda_objects, find_cuda_codes, output_of
from tests.check_sass import MAX_KERNELS, Kernel, read_object
from tests.emulator.build import CSRC, ROOT, BuildError
from tests.ptx.build import ARCH, build_shipped, compile_objects, needed_nvcc

RECORD = ROOT / "tests" / "sass.json"

Row = dict[str, Any]


def toolkit() -> str:
    """nvcc's version: what it compiles depends on all of it."""
    found = re.search(r"release [\d.]+, (V[\d.]+)", output_of(needed_nvcc(), "--version"))
    return found[1] if found else "unknown"


def sources(csrc: Path) -> list[Path]:
    """The .cu files, and all of csrc that they include."""
    todo, found = sorted((csrc / "cuda").glob("*.cu")), set[Path]()
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^\s*#include "(.+)"', path.read_text(), re.MULTILINE):
            todo += [each for each in (path.parent / name, csrc / name) if each.is_file()][:1]
    return sorted(found)


def digest(csrc: Path = CSRC) -> str:
    """Of the code that the kernels are compiled from: not of its comments, nor of where its lines break."""
    found = hashlib.sha256()
    for path in sources(csrc):
        code = " ".join(re.sub(r"//.*", "", path.read_text()).split())
        found.update(f"{path.relative_to(csrc)}\n{code}\n".encode())
    return found.hexdigest()


def compile_for(codes: Sequence[str]) -> list[Path]:
    """sm_90 comes with the objects whose PTX the tests execute; the others a generation at a time."""
    paths = build_shipped(quiet=False) if ARCH in codes else []
    for those in by_generation([code for code in codes if code != ARCH]).values():
        name, objects = "-".join(["cuda", *those]), cuda_objects(CSRC, those, lines=False, strict=True)
        paths += compile_objects(name, objects, quiet=False)
    return paths


def compile_sample(codes: Sequence[str]) -> list[Path]:
    """sm_90, and one file for each other architecture; other files with every commit."""
    paths, commit = build_shipped(quiet=False), revision()
    for number, code in enumerate(code for code in codes if code != ARCH):
        objects = cuda_objects(CSRC, [code], lines=False, strict=True)
        paths += compile_objects(f"cuda-{code}", [objects[(commit + number * 7) % len(objects)]], quiet=False)
    return paths


def revision() -> int:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return int(done.stdout.strip() or "0", 16)


def rows_of(kernels: Sequence[Kernel]) -> list[Row]:
    """A row for every file and architecture."""
    parts: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        parts.setdefault((kernel.file, kernel.arch), []).append(kernel)
    return [
        {
            "file": file,
            "arch": arch,
            "kernels": len(those),
            "registers": sum(kernel.registers for kernel in those),
            "instructions": sum(kernel.count("") for kernel in those),
        }
        for (file, arch), those in sorted(parts.items())
    ]


def faults_of(kernels: Sequence[Kernel]) -> list[str]:
    faults = [f"{k.file} for {k.arch}: {k.name}: {'; '.join(found)}" for k in kernels if (found := list(k.faults()))]
    counted = Counter(kernel.arch for kernel in kernels)
    too_many = {arch: count for arch, count in counted.items() if count > MAX_KERNELS}
    return faults + [f"{arch}: {count} kernels, expected at most {MAX_KERNELS}" for arch, count in too_many.items()]


def differences(rows: Sequence[Row], recorded: Sequence[Row]) -> list[str]:
    """Of the architectures that are recorded."""
    saved = {(row["file"], row["arch"]): row for row in recorded}
    archs = {row["arch"] for row in recorded}
    found = [(row, saved.get((row["file"], row["arch"]))) for row in rows if row["arch"] in archs]
    return [f"{row} has become {new}" if row else f"{new} is new" for new, row in found if new != row]


def merged(rows: Sequence[Row], recorded: Sequence[Row]) -> list[Row]:
    """The rows, and those recorded of other architectures."""
    archs = {row["arch"] for row in rows}
    both = [*rows, *(row for row in recorded if row["arch"] not in archs)]
    return sorted(both, key=lambda row: (row["file"], row["arch"]))


def arguments_of(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--update", action="store_true", help="save the counts")
    how.add_argument("--sample", action="store_true", help="compile a part, and compare it with what is saved")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    args, record, nvcc, code = arguments_of(words), json.loads(RECORD.read_text()), toolkit(), digest()
    same_nvcc, same_code = record["nvcc"] == nvcc, record["digest"] == code
    if args.sample and same_nvcc and not same_code:
        print("the kernels' code is not that of tests/sass.json: run `make check-cuda ARGS=--update`")
        return 1
    codes = [code for code in find_cuda_codes(needed_nvcc(), []) if code.startswith("sm_")]
    recorded = record["rows"] if same_nvcc and same_code else []
    try:
        paths = (compile_sample if args.sample else compile_for)(codes)
    except BuildError as error:
        print(error)
        return 1
    with ThreadPoolExecutor() as threads:
        kernels = [kernel for found in threads.map(read_object, paths) for kernel in found]
    rows = rows_of(kernels)
    archs = {ARCH, *(row["arch"] for row in recorded)}
    held = [kernel for kernel in kernels if kernel.arch in archs or not args.sample]
    found = faults_of(held) + ([] if args.update else differences(rows, recorded))
    told = [fault for fault in faults_of(kernels) if fault not in found]
    if args.update and not found:
        recorded = merged(rows, recorded)
        RECORD.write_text(json_text({"nvcc": nvcc, "digest": code, "rows": recorded}))
    print(*(f"not recorded: {fault}\n" for fault in told), *(f"{fault}\n" for fault in found), sep="", end="")
    most = max(kernel.registers for kernel in kernels)
    missing = [code for code in codes if code not in {row["arch"] for row in recorded}]
    print(
        f"{len(paths)} objects, {len(kernels)} kernels: {len(found)} at fault; at most {most} registers; "
        f"not recorded: {', '.join(missing) or 'none'}"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
