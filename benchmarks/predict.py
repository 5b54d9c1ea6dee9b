"""Predict, without a GPU, the share of a copy's bandwidth that each row of the benchmark table reaches.

    python benchmarks/predict.py                             # on an H200 and an H100
    python benchmarks/predict.py --filter 'GroupNorm.*bfloat16' --device H200
    python benchmarks/predict.py --markdown predicted.md

The prediction is the planner's estimate (csrc/plan/cost.cpp) of the plan that it chooses; bench.py on a GPU measures
the same shares. A letter says what most of the time beyond the copy's is lost by: m bytes that a copy does not move, i
the issue of instructions, w waits and launches.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.candidates import Job, copy_parts, parts_of
from benchmarks.contestants import table
from benchmarks.results import CLONE_PASSES, geometric_mean
from benchmarks.tune_report import Table, as_markdown, as_text
from fastnorm import _C
from tests.common import cases
from tests.common.plan_model import DEVICES

LINES = {"forward": 0.85, "backward": 0.80}
SHOWN_DEVICES = ("H200", "H100")


@dataclasses.dataclass(frozen=True)
class Prediction:
    job: Job
    share: float
    loss: str

    @property
    def reached(self) -> bool:
        return self.share >= LINES[self.job.direction]

    @property
    def text(self) -> str:
        return f"{self.share:.0%} {self.loss}"


def prediction(job: Job, facts: _C.DeviceInfo) -> Prediction:
    plan = job.plan(facts, {})
    assert plan is not None
    parts = parts_of(plan.estimate)
    copy, copies = copy_parts(job, facts), job.passes / CLONE_PASSES
    lost = {
        "m": parts.memory - copies * copy.memory,
        "i": math.hypot(parts.memory, parts.issue) - parts.memory,
        "w": parts.waits + parts.launches - copies * (copy.waits + copy.launches),
    }
    return Prediction(job, copies * copy.total / parts.total, max(lost, key=lambda part: lost[part]))


Predictions = dict[str, list[Prediction]]  # by device, rows of forward and backward in turn


def predictions(pattern: str, devices: Iterable[str]) -> Predictions:
    jobs = [Job(row, backward) for row in table(pattern, device="cuda") for backward in (False, True)]
    jobs = [job for job in jobs if job.row.layer != cases.TINY]  # launches, and nothing else
    return {name: [prediction(job, DEVICES[name]) for job in jobs] for name in devices}


def row_table(found: Predictions) -> Table:
    heads = ("variant", "", *(f"{name} {direction}" for name in found for direction in LINES))
    lines: list[tuple[str, Sequence[str]]] = []
    for of_row in zip(*(pairs for each in found.values() for pairs in (each[::2], each[1::2])), strict=True):
        row = of_row[0].job.row
        lines.append((row.title, [row.variant, "", *(p.text for p in of_row)]))
    return heads, lines


def family_table(found: Predictions) -> Table:
    """Geometric means of each norm, and how many rows reach their line."""
    heads = ("", "", *(f"{name} {direction}" for name in found for direction in LINES))
    lines: list[tuple[str, Sequence[str]]] = []
    norms = dict.fromkeys(p.job.row.layer.norm for each in found.values() for p in each)
    for norm, layout in product(norms, cases.LAYOUTS):
        cells = []
        for each, direction in product(found.values(), LINES):
            those = [
                p
                for p in each
                if (p.job.row.layer.norm, p.job.row.layout, p.job.direction) == (norm, layout, direction)
            ]
            if those:
                reached = sum(p.reached for p in those)
                cells.append(f"{geometric_mean(p.share for p in those):.0%}, {reached} of {len(those)}")
        if cells:
            lines.append((norm, [layout, "", *cells]))
    return heads, lines


def markdown(found: Predictions) -> str:
    """Both tables, as the newest entry of benchmarks/results/LOG.md has them."""
    return as_markdown(family_table(found)) + "\n" + as_markdown(row_table(found))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", metavar="REGEX", help="only rows whose name has it")
    parser.add_argument("--device", action="append", choices=DEVICES, help="default: H200 and H100")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="save both tables")
    args = parser.parse_args(arguments)
    found = predictions(args.filter, args.device or SHOWN_DEVICES)
    if not all(found.values()):
        sys.exit(f"no row matches --filter {args.filter!r}")
    rows, families = row_table(found), family_table(found)
    print(as_text(rows))
    lines = " and ".join(f"{line:.0%} {direction}" for direction, line in LINES.items())
    print(f"\nGeometric means, and the rows that reach {lines}")
    print(as_text(families))
    if args.markdown:
        args.markdown.write_text(markdown(found))


if __name__ == "__main__":
    main()
