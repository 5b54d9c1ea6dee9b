"""Count the instructions that the CUDA kernels execute for an element: nvcc's PTX, executed on the CPU.

    python benchmarks/count_instructions.py                     count, compare with the table that is saved
    python benchmarks/count_instructions.py --filter LayerNorm  a part of it
    python benchmarks/count_instructions.py --update            save, and make the planner's constants anew

The table is benchmarks/results/instructions.json. A row that has risen or fallen by more than 3% fails: the table says
what the kernels take, and the next rise is measured from there. `instructions` are machine instructions, by the weights
of ptx_weights.py. Needs nvcc and no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.instruction_constants import header
from benchmarks.instructions import (
    DIRECTIONS,
    Call,
    Comparison,
    Counts,
    Job,
    Row,
    compare,
    count_job,
    jobs,
    key_of,
    merge,
    number,
)
from benchmarks.results import json_text
from fastnorm import _C
from setup_cuda import output_of
from tests.emulator.backend import Device
from tests.ptx import backend, build

ROOT = Path(__file__).resolve().parents[1]
SAVED = ROOT / "benchmarks" / "results" / "instructions.json"
CONSTANTS = ROOT / "csrc" / "plan" / "instructions.h"

SMS = 8  # of the pretended device: enough for clusters, and a megabyte is several waves


def pretended() -> Device:
    """A part of an H200, so that tensors which can be executed in seconds are large ones."""
    whole = backend.load().device("h200")
    return dataclasses.replace(
        whole,
        num_sms=SMS,
        l2_bytes=whole.l2_bytes * SMS // whole.num_sms,
        bytes_per_us=whole.bytes_per_us * SMS // whole.num_sms,
        largest_cluster=SMS,
        cluster_sms=SMS,
    )


def count(call: Call) -> tuple[dict[str, Tensor], Counts]:
    with backend.load().executing() as executed:
        outputs = call()
    instructions = {opcode: 32.0 * each.issued for opcode, each in executed.instructions.items()}
    shared = executed.shared_read.threads + executed.shared_written.threads
    return outputs, Counts(instructions, shared, executed.global_read.bytes + executed.global_written.bytes)


def count_rows(job: Job) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    ptx, device = backend.load(), pretended()
    try:
        with ptx.configured(device=device, forced=job.family.forced):
            return count_job(job, torch.ops.fastnorm_ptx, count, _C.DeviceInfo(**dataclasses.asdict(device)))
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"{job.name}: {error}") from error


def count_all(todo: Sequence[Job], processes: int) -> list[dict[str, Any]]:
    """The rows in order, the jobs in several processes."""
    backend.load()  # builds, so that the others find it built
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for job, found in zip(todo, pool.map(count_rows, todo), strict=True):
            rows += found
            print(job.name, *(f"{row['direction']} {row['instructions']:.1f}" for row in found), flush=True)
    return rows


@functools.cache
def nvcc_version() -> str:
    found = re.search(r"release ([\d.]+)", output_of(build.needed_nvcc(), "--version"))
    return found[1] if found else "?"


def print_table(rows: Sequence[Row], saved: Sequence[Row]) -> None:
    before = {key_of(row): number(row, "instructions") for row in saved}
    heads = ("", "layout", "dtype", "", "instr.", "saved", "line", "ptx", "div", "shared", "bytes", "piece")
    print("{:28} {:13} {:8} {:8} {:>7} {:>6} {:>5} {:>6} {:>5} {:>6} {:>6} {:>6}".format(*heads))
    for row in rows:
        family, layout, dtype, direction = key_of(row)
        was = f"{before[key_of(row)]:.1f}" if key_of(row) in before else "new"
        line = f"{number(row, 'line'):g}" if "line" in row else ""
        print(
            f"{family:28} {layout:13} {dtype:8} {direction:8} {number(row, 'instructions'):7.1f} {was:>6} {line:>5}"
            f" {number(row, 'ptx'):6.1f} {number(row, 'divisions'):5.2f} {number(row, 'shared_accesses'):6.2f}"
            f" {number(row, 'global_bytes'):6.1f} {number(row, 'piece_instructions'):6.0f}"
        )
    missed = [row for row in rows if "line" in row and number(row, "instructions") > number(row, "line")]
    lines = sum("line" in row for row in rows)
    print(f"{lines - len(missed)} of {lines} rows within their line")


def verdict(found: Comparison, target: str = "count-instructions") -> int:
    """Prints what has changed. 1 where anything has. target: of make."""
    for heading, sentences in (("rise", found.rises), ("fall", found.falls)):
        for sentence in sentences:
            print(f"{heading}: {sentence}")
    if found.rises:
        print(f"If they have to rise, save them: make {target} ARGS=--update")
    elif found.falls:
        print(f"Nothing has risen. Save what has fallen: make {target} ARGS=--update")
    return 1 if found.rises or found.falls else 0


def save(rows: Sequence[Row]) -> None:
    SAVED.write_text(json_text({"nvcc": nvcc_version(), "sms": SMS, "rows": list(rows)}))
    CONSTANTS.write_text(header(rows))
    print(f"saved {len(rows)} rows in {SAVED.relative_to(ROOT)} and the constants in {CONSTANTS.relative_to(ROOT)}")


def merged(saved: Sequence[Row], counted: Sequence[Row]) -> list[Row]:
    """All rows in the order of the jobs, counted ones where there are any."""
    return merge(saved, counted, ((*job.key, direction) for job in jobs() for direction in DIRECTIONS), key_of)


class Named(Protocol):
    @property
    def name(self) -> str: ...


AnyJob = TypeVar("AnyJob", bound=Named)


def parse(arguments: Sequence[str] | None, description: str | None, saved: str) -> argparse.Namespace:
    """saved: what --update saves."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", metavar="REGEX", help="only jobs whose name has it")
    parser.add_argument("--update", action="store_true", help=f"save {saved}")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N")
    return parser.parse_args(arguments)


def chosen(among: Iterable[AnyJob], regex: str) -> list[AnyJob]:
    todo = [job for job in among if re.search(regex, job.name)]
    if not todo:
        sys.exit(f"no job matches --filter {regex!r}")
    return todo


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments, __doc__, "the counts and the planner's constants")
    start = time.perf_counter()
    todo = chosen(jobs(), args.filter)
    saved = json.loads(SAVED.read_text()) if SAVED.exists() else {"rows": []}
    rows = count_all(todo, args.processes)
    print_table(rows, saved["rows"])
    print(f"{len(todo)} jobs in {time.perf_counter() - start:.0f} s")
    if args.update:
        save(merged(saved["rows"], rows))
        return 0
    if saved.get("nvcc") != nvcc_version():
        print(f"nvcc {nvcc_version()} compiles otherwise than {saved.get('nvcc')}, by which the table was saved")
    keys = {job.key for job in todo}
    return verdict(compare([row for row in saved["rows"] if not args.filter or key_of(row)[:3] in keys], rows))


if __name__ == "__main__":
    sys.exit(main())
