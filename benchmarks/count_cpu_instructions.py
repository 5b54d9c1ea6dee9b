"""Count the instructions that the CPU kernels execute for a pack of 32 elements, by single steps: no timer, no noise.

    python benchmarks/count_cpu_instructions.py                    count, compare with the table that is saved
    python benchmarks/count_cpu_instructions.py --filter columns   a part of it
    python benchmarks/count_cpu_instructions.py --update           save

The table is benchmarks/results/cpu_instructions.json: each walk, with each epilogue, in each direction, for each type
and instruction set. A count is the difference between a larger tensor and a smaller one, so that what a call does once
is in none. A row that has risen or fallen by more than 3% fails. Other compilers count otherwise: the table names its
own, and is compared with that one's major version alone. It needs the objects of `make build`, and Linux on a processor
that has the instructions: --update marks what this one has not as stale, which is not compared until one that has them
counts it anew. So it names by --filter what a change is about.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.count_instructions import chosen, parse, verdict
from benchmarks.instructions import Row, compare, merge, number
from benchmarks.results import json_text
from fastnorm import _C
from fastnorm.activations import CODES

ROOT = Path(__file__).resolve().parents[1]
SAVED = ROOT / "benchmarks" / "results" / "cpu_instructions.json"
DRIVER = Path(__file__).with_name("cpu_instructions.cpp")
OBJECTS = ("cpu_dispatch", "cpu_kernels.*", "core_geometry", "plan_cpu")
PACK = 32  # elements
KEY = ("walk", "epilogue", "direction", "dtype", "capability")
OTHER_PROCESSOR, NOT_PERMITTED = 3, 4  # exit statuses of the driver
TARGET = "count-cpu-instructions"  # of make
DTYPES, CAPABILITIES = ("float32", "bfloat16"), ("avx512", "avx2")


class NotCounted(Exception):
    """There is nothing to compare here, and the message says why."""


@dataclasses.dataclass(frozen=True)
class Walk:
    """A geometry (csrc/core/geometry.h) with two numbers of samples, and the activation that it is counted with."""

    name: str
    kind: str
    samples: tuple[int, int]
    channels: int
    size: int
    groups: int
    layout: str
    activation: str
    eval: bool = False

    def elements(self, samples: int) -> int:
        return samples * self.channels * self.size


WALKS = (
    Walk("columns, batch", "batch", (2, 6), 64, 16, 0, "last", "relu", eval=True),
    Walk("columns, groups", "group", (1, 3), 32, 64, 4, "last", "silu"),
    Walk("short runs", "batch", (8, 24), 32, 9, 0, "planar", "relu"),
    Walk("runs, batch", "batch", (1, 3), 2, 1088, 0, "planar", "relu", eval=True),
    Walk("runs, short cells", "group", (1, 3), 16, 128, 2, "planar", "silu"),
    Walk("runs, instances", "group", (1, 2), 2, 2048, 2, "planar", "relu"),
    Walk("positions", "layer", (1, 3), 96, 128, 1, "planar", "gelu"),
    Walk("layer of 96", "layer", (16, 48), 96, 1, 1, "planar", "gelu"),
    Walk("layer of 768", "layer", (8, 16), 768, 1, 1, "planar", "gelu"),
)


@dataclasses.dataclass(frozen=True)
class Job:
    walk: Walk
    epilogue: str  # "plain", or "+" and an activation; "+add" before it for a residual
    direction: str
    dtype: str
    capability: str

    @property
    def name(self) -> str:
        return f"{self.walk.name} {self.epilogue} {self.direction} {self.dtype} {self.capability}"

    def arguments(self, samples: int) -> list[str]:
        walk, residual = self.walk, self.epilogue.startswith("+add")
        activation = None if self.epilogue == "plain" else walk.activation
        numbers = (samples, walk.channels, walk.size, walk.groups)
        return [
            self.capability, walk.kind, *map(str, numbers), walk.layout, self.dtype,
            str(CODES[activation]), str(int(residual)), self.direction,
        ]  # fmt: skip

    def row(self, instructions: float) -> Row:
        return {
            "walk": self.walk.name, "epilogue": self.epilogue, "direction": self.direction, "dtype": self.dtype,
            "capability": self.capability, "instructions": round(instructions, 2),
        }  # fmt: skip


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row[part]) for part in KEY)


def jobs() -> Iterator[Job]:
    for walk in WALKS:
        own = f"+add+{walk.activation}" if walk.activation == "relu" else f"+{walk.activation}"
        for epilogue in ("plain", own):
            for direction in ("forward", "backward", "eval") if walk.eval else ("forward", "backward"):
                for dtype in DTYPES:
                    for capability in CAPABILITIES:
                        yield Job(walk, epilogue, direction, dtype, capability)


def compiler() -> str:
    return str(_C.build_info()["compiler"])


def major_of(text: str) -> str:
    """The compiler's name and major version: "g++ 12"."""
    name, version = text.split()[0], re.findall(r"(\d+)\.\d+\.\d+", text)
    return f"{name} {version[-1] if version else '?'}"


def build() -> Path:
    """The driver, linked with the objects of the extension."""
    place = ROOT / "build" / "kernels"
    if not place.is_dir():
        raise NotCounted("there are no objects of the extension: run `make build`")
    objects = [str(path) for pattern in OBJECTS for path in sorted(place.glob(f"{pattern}.o"))]
    driver = place / "cpu_instructions"
    new = driver.with_name(f"{driver.name}.{os.getpid()}")  # another process may run the old one
    command = [compiler().split()[0], "-O2", "-std=c++20", f"-I{ROOT / 'csrc'}", str(DRIVER), *objects]
    done = subprocess.run([*command, "-o", str(new)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the driver does not compile:\n{done.stderr}")
    new.replace(driver)
    return driver


def steps(driver: Path, job: Job, samples: int) -> int:
    done = subprocess.run([str(driver), *job.arguments(samples)], capture_output=True, text=True, check=False)
    if done.returncode in (OTHER_PROCESSOR, NOT_PERMITTED):
        raise NotCounted(f"{job.capability}: {done.stderr.strip()}")
    if done.returncode:
        raise RuntimeError(f"{job.name}: {done.stderr.strip() or done.returncode}")
    return int(done.stdout)


def count(driver: Path, job: Job) -> float:
    """Instructions for a pack."""
    few, many = job.walk.samples
    more = steps(driver, job, many) - steps(driver, job, few)
    return PACK * more / (job.walk.elements(many) - job.walk.elements(few))


def count_all(todo: Sequence[Job], processes: int) -> tuple[list[Row], set[str]]:
    """The rows, and why others are missing."""
    driver, rows, missing = build(), [], set()
    with ThreadPoolExecutor(processes) as pool:
        for job, future in [(job, pool.submit(count, driver, job)) for job in todo]:
            try:
                rows.append(job.row(future.result()))
            except NotCounted as reason:
                missing.add(str(reason))
    return rows, missing


def load() -> dict[str, object]:
    saved: dict[str, object] = json.loads(SAVED.read_text())
    return saved


def why_not(saved: Mapping[str, object]) -> str | None:
    """Why the saved table says nothing of this build; None where it does."""
    ours, its = major_of(compiler()), major_of(str(saved["compiler"]))
    return None if ours == its else f"the table is of {its}, and {ours} compiles otherwise"


def updated(saved: Sequence[Row], counted: Sequence[Row], todo: Iterable[Job]) -> list[Row]:
    """All rows in the order of the jobs; those that were to be counted and could not be are stale."""
    known = {key_of(row): row for row in saved}
    stale: list[Row] = [{**known[key], "stale": True} for job in todo if (key := key_of(job.row(0))) in known]
    return merge(saved, [*stale, *counted], (key_of(job.row(0)) for job in jobs()), key_of)


def print_table(rows: Sequence[Row], saved: Sequence[Row]) -> None:
    before = {key_of(row): number(row, "instructions") for row in saved}
    print("{:20} {:10} {:9} {:9} {:7} {:>7} {:>7}".format("walk", "", "", "", "", "a pack", "saved"))
    for row in rows:
        was = f"{before[key_of(row)]:.1f}" if key_of(row) in before else "new"
        print("{:20} {:10} {:9} {:9} {:7}".format(*key_of(row)), f"{number(row, 'instructions'):7.1f} {was:>7}")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments, __doc__, "the counts")
    start = time.perf_counter()
    todo = chosen(jobs(), args.filter)
    try:
        counted, missing = count_all(todo, args.processes)
    except NotCounted as reason:
        sys.exit(f"nothing is counted: {reason}")
    saved = load() if SAVED.exists() else {"compiler": compiler(), "rows": []}
    rows = saved["rows"]
    assert isinstance(rows, list)
    print_table(counted, rows)
    print(*(f"not counted: {reason}" for reason in sorted(missing)), sep="\n", end="\n" if missing else "")
    print(f"{len(counted)} counts in {time.perf_counter() - start:.0f} s")
    if args.update:
        kept = updated(rows, counted, todo)
        SAVED.write_text(json_text({"compiler": compiler(), "rows": kept}))
        print(f"saved {len(kept)} rows in {SAVED.relative_to(ROOT)}")
        return 0
    if other := why_not(saved):
        print(f"nothing is compared: {other}")
        return 0
    # What this processor cannot run is not missed.
    expected = {key_of(row) for row in counted} if missing else {key_of(job.row(0)) for job in todo}
    stale = {key_of(row) for row in rows if row.get("stale")} & expected
    if stale:
        print(f"not compared: {len(stale)} saved rows are stale; save them: make count-cpu-instructions ARGS=--update")
    wanted = [row for row in rows if key_of(row) in expected - stale]
    return verdict(compare(wanted, [row for row in counted if key_of(row) not in stale], key_of), TARGET)


if __name__ == "__main__":
    sys.exit(main())
