"""Holds the CUDA planner of today against the times of a run of tune.py, to find better constants for
csrc/plan/cost.cpp.

    python benchmarks/refit.py tune.json                     # all rows
    python benchmarks/refit.py tune.json --filter 'channels_last' --by tile --by gang
    python benchmarks/refit.py tune.json --held-out          # only every third job, of which no constant was fitted

The planner estimates every measured plan anew. What it would choose among them is held against the best of them, and
the estimates against the times.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.candidates import Candidate, Job, Plan, grid_of, jobs, kind_text, parts_of
from benchmarks.results import geometric_mean, timing_from_json
from benchmarks.tune_report import LOSS_LINE, Outcome, Table, as_text, fit_parts, losses
from fastnorm import _C
from tests.common.plan_model import words

HELD_OUT = 3  # every third job
SHOWN = 20


def is_held_out(job: Job) -> bool:
    """The same jobs in every run. Both directions and all epilogues of a layer in a dtype and a layout go together."""
    return zlib.crc32(f"{job.row.title} {job.row.dtype} {job.row.layout}".encode()) % HELD_OUT == 0


def planned(job: Job, facts: _C.DeviceInfo, text: str, forced: dict[str, Any]) -> Plan | None:
    """The plan of these words, as it is made today; None where it is not made any more."""
    plan = job.plan(facts, forced)
    if plan is not None and words(plan) == text:
        return plan
    return next((plan for plan in job.compare(facts) if words(plan) == text), None)


def outcome_of(saved: dict[str, Any], facts: _C.DeviceInfo) -> Outcome | None:
    """The measured candidates in the order in which the planner prefers them today. None where none is left."""
    (job,) = jobs(f"^{re.escape(saved['row'])} {saved['direction']}$")
    found = []
    for each in saved["candidates"]:
        if each.get("refused_launches"):  # its time is another plan's
            continue
        if plan := planned(job, facts, words(each["plan"]), each["forced"]):
            candidate = Candidate(plan, each["forced"], parts_of(plan.estimate))
            found.append((candidate, timing_from_json(each["us"])))
    if not found:
        return None
    found.sort(key=lambda pair: (pair[0].predicted.total, pair[0].predicted.memory + pair[0].predicted.issue))
    candidates, times = zip(*found, strict=True)
    return Outcome(job, facts, candidates, times, timing_from_json(saved["copy_us"]))


def read(path: Path, pattern: str = "") -> tuple[list[Outcome], int]:
    """The outcomes, and how many measured plans are not made any more, or were refused by the GPU."""
    saved = json.loads(path.read_text())
    facts = _C.DeviceInfo(**saved["facts"])
    chosen = [each for each in saved["jobs"] if re.search(pattern, f"{each['row']} {each['direction']}")]
    outcomes = [outcome for each in chosen if (outcome := outcome_of(each, facts))]
    return outcomes, sum(len(each["candidates"]) for each in chosen) - sum(len(o.candidates) for o in outcomes)


# ---- kinds of plans ----


def size_class(job: Job) -> str:
    megabytes = job.row.nbytes / 2**20
    return next((f"under {limit} MB" for limit in (1, 4, 16, 64) if megabytes < limit), "64 MB and more")


def tile_bytes(job: Job, plan: Plan) -> str:
    grid = grid_of(plan)
    if plan.strategy != "fused" or grid.traversal == "rows":
        return "none"
    return "all channels" if grid.tile == job.call.shape.C else f"{grid.tile * job.call.size} B"


GROUPS: dict[str, Callable[[Job, Plan], str]] = {
    "kind": lambda job, plan: kind_text(plan),
    "bound": lambda job, plan: "memory" if plan.estimate.memory >= plan.estimate.issue else "issue",
    "traversal": lambda job, plan: f"{plan.strategy} {grid_of(plan).traversal}",
    "tile": tile_bytes,
    "size": lambda job, plan: size_class(job),
    "dtype": lambda job, plan: f"{job.row.dtype} {job.direction}",
    "family": lambda job, plan: f"{job.family} {job.row.layout}",
    "epilogue": lambda job, plan: job.row.epilogue,
}


def ratios(outcomes: Sequence[Outcome]) -> Iterator[tuple[Job, Plan, float]]:
    """Every plan's measured time over the estimate."""
    for o in outcomes:
        for i, candidate in enumerate(o.candidates):
            yield o.job, candidate.plan, o.us(i) / candidate.predicted.total


def misfit_table(outcomes: Sequence[Outcome], by: Sequence[str]) -> Table:
    heads = ("kind of plan", "", "plans", "measured/estimated", "lower", "upper", "misfit", "")
    lines: list[tuple[str, Sequence[str]]] = []
    for name in by:
        groups: dict[str, list[float]] = {}
        for job, plan, ratio in ratios(outcomes):
            groups.setdefault(GROUPS[name](job, plan), []).append(ratio)
        for group, found in sorted(groups.items()):
            low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
            misfit = statistics.median(abs(ratio - 1) for ratio in found)
            numbers = (f"{middle:.2f}", f"{low:.2f}", f"{high:.2f}", f"{misfit:.0%}")
            lines.append((f"by {name}", [group, "", str(len(found)), *numbers, ""]))
    return heads, lines


@dataclasses.dataclass(frozen=True)
class Regret:
    """How far the choices among the measured plans are from the best of them."""

    jobs: int
    mean: float  # geometric
    above: int  # the line
    worst: float
    misfit: float  # the median, of all plans
    unmeasured: int  # jobs whose choice among all plans there are is none of the measured ones

    def __str__(self) -> str:
        return (
            f"{self.jobs} jobs: the choice takes {self.mean:.3f} times the best plan's time, "
            f"more than {LOSS_LINE} times in {self.above}, at most {self.worst:.2f}; "
            f"estimates are off by {self.misfit:.1%}; {self.unmeasured} jobs prefer a plan that was not measured"
        )


def regret(outcomes: Sequence[Outcome]) -> Regret:
    found = [o.loss for o in outcomes]
    misfit = statistics.median(abs(ratio - 1) for _, _, ratio in ratios(outcomes))
    above = sum(loss > LOSS_LINE for loss in found)
    unmeasured = sum(o.job.plan(o.facts, {}) not in [c.plan for c in o.candidates] for o in outcomes)
    return Regret(len(found), geometric_mean(found), above, max(found), misfit, unmeasured)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("json", type=Path, help="a file of tune.py")
    add("--filter", default="", metavar="REGEX", help="only jobs whose name has it; '^((?!add).)*$': no residual")
    add("--by", action="append", choices=GROUPS, help="what misfits are grouped by; default: everything")
    add("--held-out", action="store_true", help="only the jobs that are kept for judging")
    args = parser.parse_args(arguments)
    outcomes, gone = read(args.json, args.filter)
    if args.held_out:
        outcomes = [o for o in outcomes if is_held_out(o.job)]
    if not outcomes:
        sys.exit("no measured plan of such a job is made today")
    print(as_text(misfit_table(outcomes, args.by or [*GROUPS])))
    for line in losses(outcomes)[:SHOWN]:
        print(line)
    if fitted := fit_parts(outcomes):
        print(f"measured over estimated: {fitted.factors}; that leaves {fitted.misfit:.1%} of {fitted.plans} plans")
    for name, kept in (("fitted", False), ("held out", True)):
        if of_them := [o for o in outcomes if is_held_out(o.job) == kept]:
            print(f"{name}: {regret(of_them)}")
    if gone:
        print(f"{gone} measured plans are not made any more, or were refused")


if __name__ == "__main__":
    main()
