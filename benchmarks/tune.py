"""Races the plans that the CUDA planner chooses between, and shows by how much its estimates are off.

    python benchmarks/tune.py --json tune.json              # on a GPU: eight minutes, the most important rows first
    python benchmarks/tune.py --facts H200                  # without one: what would be tried, and what is predicted
    python benchmarks/tune.py --filter 'GroupNorm.*bfloat16' --candidates 12

For each row and direction it forces the planner's choice and its nearest rivals of other kinds on the raw operators.
They and a plain copy of x take turns (timing.py), on so many inputs that L2 holds none. The last lines say how far the
choices are from the best plans, and by which factors the parts of the estimate (csrc/plan/cost.cpp) are off.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

# Run as a file, its own folder is on the path, and not the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.candidates import Candidate, Forced, Job, candidates, jobs
from benchmarks.contestants import Row, copies_for, in_turn
from benchmarks.machine import cache_bytes, describe, refusals
from benchmarks.results import CLONE_PASSES, json_text
from benchmarks.tables import make_console
from benchmarks.timing import race
from benchmarks.tune_report import (
    Ceilings,
    Outcome,
    as_markdown,
    fit_parts,
    measured_table,
    predicted_table,
    print_report,
)
from fastnorm import _C
from tests.common import cases
from tests.common.numerics import Inputs
from tests.common.plan_model import DEVICES
from tests.common.raw_calls import RawCall

Outputs = dict[str, Tensor]

BUDGET_S, CANDIDATES = 480.0, 6
LEAST_S, MOST_S = 0.2, 2.0  # of one race; what is left when time is up is skipped
RACING = 0.5  # of a job's time; the rest is for its tensors, the check and warming up
LARGE_BYTES, CEILINGS_S = 1 << 29, 1.0


def make_raw_call(job: Job, device: str, seed: int) -> RawCall:
    """A call on tensors of its own."""
    row, generator = job.row, torch.Generator(device).manual_seed(seed)

    def tensor() -> Tensor:
        t = torch.randn(row.layer.shape, device=device, generator=generator)
        return cases.to_layout(t.to(cases.DTYPES[row.dtype]), row.layout)

    x = tensor()
    inputs = Inputs(x, tensor() if row.residual else None, tensor() if job.backward else x)
    return RawCall(job.case, inputs, device=torch.device(device))


def timed_call(job: Job, raw: RawCall) -> Callable[[], Outputs]:
    """The direction alone: the tensors that backward takes from forward are made before."""
    if not job.backward:
        return raw.forward
    saved = raw.forward()
    return partial(raw.backward, saved["stats"], saved["mask"], (True, True, job.row.residual))


def run_forced(forced: Forced, call: Callable[[], Outputs]) -> Outputs:
    _C.set_plan_options(forced=forced)
    return call()


def disagreement(ours: Outputs, theirs: Outputs) -> float:
    """The largest difference, in epsilons of an output's dtype times the larger of 1 and its largest value, since sums
    may cancel out. Masks are left out: their bits flip where a rounding does.
    """
    errors = [0.0]
    for name, theirs_of in theirs.items():
        if theirs_of.is_floating_point() and theirs_of.numel() > 0:
            error = (ours[name].float() - theirs_of).abs_().max()
            errors.append(float(error / theirs_of.abs().max().float().clamp_min(1)) / torch.finfo(theirs_of.dtype).eps)
    return float(torch.tensor(errors).max())  # of NaNs, NaN


def measure(job: Job, facts: _C.DeviceInfo, found: Sequence[Candidate], budget_s: float, device: str) -> Outcome:
    """Race the candidates, for about `budget_s` seconds."""
    raws = [make_raw_call(job, device, seed) for seed in range(copies_for(job.row.nbytes, cache_bytes(device)))]
    calls = [timed_call(job, raw) for raw in raws]
    ring = in_turn(calls)  # one for all candidates: a dozen outputs of the largest tensors would not fit
    try:
        wrong, refused, before = [], [], _C.refused_gangs()
        expected = run_forced(found[0].forced, calls[0])
        for each in found:
            wrong.append(disagreement(run_forced(each.forced, calls[0]), expected))
            refused.append(_C.refused_gangs() - before)  # at its first call: later ones know
            before += refused[-1]
        del expected
        contestants = {each.label: partial(run_forced, each.forced, ring) for each in found}
        times = race({**contestants, "copy": in_turn([raw.x.clone for raw in raws])}, budget_s, device)
    finally:
        _C.set_plan_options()
    us = tuple(times[each.label] for each in found)
    return Outcome(job, facts, tuple(found), us, times["copy"], tuple(wrong), tuple(refused))


def measure_ceilings(device: str) -> Ceilings:
    """The bandwidth of a large copy, and the time of the shortest call: nearly all of it is the launch."""
    tiny = Job(Row(cases.TINY, "float32", "planar", "plain"), False)
    source = torch.randn(LARGE_BYTES // 4, device=device)
    call = timed_call(tiny, make_raw_call(tiny, device, 0))
    times = race({"copy": source.clone, "call": call}, CEILINGS_S, device)
    return Ceilings(CLONE_PASSES * LARGE_BYTES / (times["copy"].median * 1e6), times["call"].median * 1e6)


def measure_all(
    todo: Sequence[Job], facts: _C.DeviceInfo, count: int, budget_s: float, device: str
) -> tuple[list[Outcome], list[tuple[str, str]]]:
    """The outcomes, and the jobs that were skipped with the reason. Whatever happens, measured outcomes are kept."""
    outcomes, skipped, stopped = [], [], ""
    deadline = time.perf_counter() + budget_s
    # No refreshing in the background: its thread would take time from the timed ones.
    bar = track(todo, "measuring", console=Console(stderr=True), transient=True, auto_refresh=False)
    for i, job in enumerate(bar):
        left = deadline - time.perf_counter()
        if stopped or left < LEAST_S:
            skipped.append((job.name, stopped or "no time left"))
            continue
        try:
            part = min(MOST_S, max(LEAST_S, RACING * left / (len(todo) - i)))
            outcomes.append(measure(job, facts, candidates(job, facts, count), part, device))
            if device == "cuda":
                torch.cuda.empty_cache()
        except RuntimeError as error:  # out of memory, or a launch that failed
            skipped.append((job.name, str(error).partition("\n")[0]))
        except KeyboardInterrupt:
            stopped = "interrupted"
            skipped.append((job.name, stopped))
    return outcomes, skipped


def facts_json(facts: _C.DeviceInfo) -> dict[str, int]:
    return {name: getattr(facts, name) for name in dir(facts) if not name.startswith("_")}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--facts", choices=DEVICES, help="predict for such a device, and measure nothing")
    add(
        "--filter", default="", metavar="REGEX", help="only jobs whose name has it, e.g. 'GroupNorm.*bfloat16.*forward'"
    )
    add("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help=f"of measuring; default {BUDGET_S:.0f}")
    add("--candidates", type=int, default=CANDIDATES, metavar="N", help=f"plans of a job; default {CANDIDATES}")
    add("--json", type=Path, metavar="PATH", help="save everything")
    add("--markdown", type=Path, metavar="PATH", help="save the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    todo = list(jobs(args.filter))
    if not todo:
        sys.exit(f"no job matches --filter {args.filter!r}; --facts H200 prints them all")
    if not args.facts and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --facts H200 predicts without one")
    facts = DEVICES[args.facts] if args.facts else _C.cuda_device_info(0)
    about = describe("cpu" if args.facts else "cuda")
    console, ceilings, skipped = make_console(), None, []
    console.print(f"[bold]fastnorm[/] ({about['commit']}) on {args.facts or torch.cuda.get_device_name(0)}")
    if args.facts:
        outcomes = [Outcome(job, facts, tuple(candidates(job, facts, args.candidates))) for job in todo]
    else:
        ceilings = measure_ceilings("cuda")
        outcomes, skipped = measure_all(todo, facts, args.candidates, args.budget, "cuda")
    print_report(console, outcomes, facts, skipped, ceilings)
    if not args.facts:
        console.print(refusals())
    if args.json:
        fitted = fit_parts(outcomes)
        saved = about | {
            "facts": facts_json(facts),
            "options": {"facts": args.facts, "budget_s": args.budget, "candidates": args.candidates},
            "refused_launches": None if args.facts else _C.refused_gangs(),
            "ceilings": asdict(ceilings) if ceilings else None,
            "fit": asdict(fitted) if fitted else None,
            "jobs": [outcome.to_json() for outcome in outcomes],
            "skipped": [{"job": name, "why": why} for name, why in skipped],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json_text(saved))
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(as_markdown((predicted_table if args.facts else measured_table)(outcomes)))


if __name__ == "__main__":
    main()
