"""Race the plans that the CUDA planner chooses between, and see by how much its estimates are off.

    python benchmarks/tune.py --json tune.json              # on a GPU: eight minutes, the most important rows first
    python benchmarks/tune.py --facts H200                  # without one: what would be tried, and what is predicted
    python benchmarks/tune.py --filter 'GroupNorm.*bfloat16' --candidates 12

Of each row and direction the planner's choice and its nearest rivals of other kinds are forced in turn on the raw
operators, beside a plain copy of x, all taking turns (timing.py); so many inputs take turns that none is found in L2.
What is printed last says how far the choices are from the best plans, and by which factors the parts of the estimate
(csrc/plan_cost.cpp) are off.
"""

from __future__ import annotations

import argparse
import json
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

sys.path.insert(0, str(Path(__file__).resolve().parent))

from candidates import Candidate, Forced, Job, candidates, jobs
from contestants import Row, cases, copies_for, in_turn
from fastnorm import _C
from machine import cache_bytes, describe
from numerics import Inputs
from plan_model import DEVICES
from raw_calls import RawCall
from tables import make_console
from timing import Timing, race
from tune_report import Ceilings, Outcome, as_markdown, fit_parts, measured_table, predicted_table, print_report

Outputs = dict[str, Tensor]

BUDGET_S, CANDIDATES = 480.0, 6
LEAST_S, MOST_S = 0.2, 2.0  # of one race: a long list gets the least, and what is left when time is up is skipped
LARGE_BYTES, CEILING_S = 1 << 29, 0.5

# ---- measuring ----


def make_raw_call(job: Job, device: str, seed: int) -> RawCall:
    """On tensors of its own."""
    row, generator = job.row, torch.Generator(device).manual_seed(seed)

    def tensor() -> Tensor:
        t = torch.randn(row.layer.shape, device=device, generator=generator)
        return cases.to_layout(t.to(cases.DTYPES[row.dtype]), row.layout)

    x = tensor()
    inputs = Inputs(x, tensor() if row.residual else None, tensor() if job.backward else x)
    return RawCall(job.case, inputs, device=torch.device(device))


def timed_call(job: Job, raw: RawCall) -> Callable[[], Outputs]:
    """The direction alone: what backward takes from forward is there before."""
    if not job.backward:
        return raw.forward
    saved = raw.forward()
    return partial(raw.backward, saved["stats"], saved["mask"], (True, True, job.row.residual))


def under(forced: Forced, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        _C.set_plan_options(forced=forced)
        return call()

    return run


def disagreement(ours: Outputs, theirs: Outputs) -> float:
    """The largest difference, in epsilons of each output's dtype times the larger of 1 and its largest value: sums over
    a channel may cancel out. Masks are left out, whose bits flip where a rounding does.
    """
    errors = [torch.zeros(())]
    for name, a in ours.items():
        if a.is_floating_point() and a.numel() > 0:
            scale = theirs[name].abs().max().float().clamp_min(1) * torch.finfo(a.dtype).eps
            errors.append((a.float().sub_(theirs[name]).abs_().max() / scale).cpu())
    return float(torch.stack(errors).max())  # a NaN stays one


def measure(job: Job, facts: _C.DeviceInfo, found: Sequence[Candidate], budget_s: float, device: str) -> Outcome:
    """Races the candidates for about so many seconds. What they return shares one ring, or it would not fit."""
    try:
        calls = [make_raw_call(job, device, seed) for seed in range(copies_for(job.row.nbytes, cache_bytes(device)))]
        runs = [timed_call(job, raw) for raw in calls]
        outputs = [under(candidate.forced, runs[0]) for candidate in found]
        first = runs_of(outputs[0])
        wrong = tuple(disagreement(runs_of(run), first) for run in outputs)
        del first
        contestants = {str(i): under(candidate.forced, in_turn(runs)) for i, candidate in enumerate(found)}
        times = race(contestants | {"copy": in_turn([raw.x.clone for raw in calls])}, budget_s, device)
    finally:
        _C.set_plan_options()
    return Outcome(job, facts, tuple(found), tuple(times[str(i)] for i in range(len(found))), times["copy"], wrong)
