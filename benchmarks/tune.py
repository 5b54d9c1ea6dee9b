"""Time the CUDA planner's candidate plans against each other, and its predictions against what they take.

    python benchmarks/tune.py --json tune.json              # on a GPU: eight minutes, the most important rows first
    python benchmarks/tune.py --facts H200                  # without one: what would be tried, and what is predicted
    python benchmarks/tune.py --filter 'GroupNorm.*bfloat16' --candidates 12

Of every row the planner's own choice and its nearest rivals of other kinds are forced in turn and raced on the raw
operators, beside a plain copy; inputs rotate, so that none is found in L2. The last table says by which factor each
part of the estimate (csrc/plan_cost.cpp) is off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from contestants import cases, copies_for, in_turn
from fastnorm import _C
from fastnorm.ops import ACTIVATIONS
from machine import cache_bytes, describe
from plan_model import BATCH, DEVICES, DTYPES, LAYER, Call, shape_of
from timing import race

Layer = cases.Layer
Plan = _C.ForwardPlan | _C.BackwardPlan
AFFINE = (("affine", True),)

#: Family -> share of the copy's bandwidth that is aimed at, forward and backward.
TARGETS = {
    "BatchNorm": (0.85, 0.85),
    "GroupNorm": (0.85, 0.80),
    "InstanceNorm": (0.85, 0.85),
    "LayerNorm": (0.90, 0.85),
}
SPACES = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7), (64, 56))


def layers() -> Iterator[tuple[Layer, str]]:
    """The shapes of the families, the most important first, and the activation that follows them."""
    for c, s in SPACES[:2]:
        yield Layer("ResNet-50", "BatchNorm2d", (32, c, s, s), (c,)), "relu"
        yield Layer("ResNet-50", "BatchNorm2d", (256, c, s, s), (c,)), "relu"
    yield Layer("VAE", "GroupNorm", (1, 128, 20, 256, 256), (32, 128)), "silu"
    yield Layer("UNet", "GroupNorm", (2, 320, 64, 64), (32, 320)), "silu"
    yield Layer("nnU-Net", "InstanceNorm3d", (2, 32, 128, 128, 128), (32,), AFFINE), "leaky_relu"
    yield Layer("transformer", "LayerNorm", (1024, 12288), (12288,)), "gelu"
    yield Layer("transformer", "LayerNorm", (16384, 4096), (4096,)), "gelu"
    yield Layer("ConvNeXt", "LayerNorm", (401408, 96), (96,)), "gelu"
    for c, s in SPACES[2:]:
        yield Layer("ResNet-50", "BatchNorm2d", (256, c, s, s), (c,)), "relu"
        yield Layer("ResNet-50", "BatchNorm2d", (32, c, s, s), (c,)), "relu"
    yield Layer("VAE", "GroupNorm", (1, 512, 64, 64), (32, 512)), "silu"
    yield Layer("UNet", "GroupNorm", (2, 640, 32, 32), (32, 640)), "silu"
    yield Layer("UNet", "GroupNorm", (2, 1280, 16, 16), (32, 1280)), "silu"
    yield Layer("nnU-Net", "InstanceNorm3d", (2, 320, 8, 8, 8), (320,), AFFINE), "leaky_relu"
    yield Layer("small", "BatchNorm2d", (8, 64, 16, 16), (64,)), "relu"
    yield Layer("small", "LayerNorm", (64, 768), (768,)), "gelu"


@dataclasses.dataclass(frozen=True)
class Row:
    """One direction of one layer. streams: tensors that must be read and written, at least."""

    layer: Layer
    layout: str
    dtype: str
    activation: str | None
    residual: bool
    backward: bool

    @property
    def name(self) -> str:
        act = self.activation or "plain"
        epilogue = f"add+{act}" if self.residual else act
        shape = "x".join(map(str, self.layer.shape))
        direction = "backward" if self.backward else "forward"
        return f"{self.layer.label} {self.layer.norm} {shape} {self.dtype} {self.layout} {epilogue} {direction}"

    @property
    def family(self) -> str:
        return re.sub(r"[123]d$", "", self.layer.norm)

    @property
    def recomputes(self) -> bool:
        """Backward makes z again, of x and residual: no mask was saved."""
        return self.residual and self.activation not in (None, "relu", "leaky_relu")

    @property
    def streams(self) -> int:
        if not self.backward:
            return 2 + self.residual
        return 3 + self.recomputes + (self.residual and self.activation is not None)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.layer.shape)) * DTYPES[self.dtype]

    @property
    def call(self) -> Call:
        return Call(shape_of(self.layer, self.layout), self.dtype, 16, self.recomputes, False, True, True)


def rows(pattern: str = "") -> list[Row]:
    """Plain rows of all layers come before the epilogues of any."""
    found = []
    for epilogue in (0, 1, 2):
        for layer, activation in layers():
            for layout in layer.layouts:
                for dtype in ("bfloat16", "float32"):
                    for backward in (False, True):
                        act = activation if epilogue else None
                        found.append(Row(layer, layout, dtype, act, epilogue == 2, backward))
    return [row for row in found if re.search(pattern, row.name)]


# ---- candidates ----


def main_grid(plan: Plan) -> _C.Grid:
    return plan.grid if isinstance(plan, _C.ForwardPlan) else plan.reduce


def kind_of(plan: Plan) -> tuple[str, str, int]:
    return plan.strategy, main_grid(plan).gang, main_grid(plan).buffers


def compare(row: Row, facts: _C.DeviceInfo) -> list[Plan]:
    return [*(row.call.all_backward(facts) if row.backward else row.call.all_forward(facts))]


def plan_of(row: Row, facts: _C.DeviceInfo, forced: dict[str, str | int]) -> Plan | None:
    """None where nothing is as forced."""
    try:
        return (row.call.backward if row.backward else row.call.forward)(facts, forced=forced)
    except ValueError:
        return None


def force_of(row: Row, facts: _C.DeviceInfo, plan: Plan) -> dict[str, str | int] | None:
    """What forces exactly this plan; None where it is always second to one that only other knobs tell apart."""
    if plan.strategy != "fused":
        return {"strategy": plan.strategy}
    grid = main_grid(plan)
    forced: dict[str, str | int] = {"strategy": "fused", "gang": grid.gang, "buffers": grid.buffers}
    if grid.gang != "block":
        forced["pieces"] = grid.pieces
    tiles = [{"tile_bytes": b} for b in (64, 128, 256)] if grid.traversal == "columns" else [{}]
    for tile in tiles:
        for residents in (1, 2):
            knobs = forced | tile | {"residents": residents}
            if plan_of(row, facts, knobs) == plan:
                return knobs
    return None


@dataclasses.dataclass
class Candidate:
    plan: Plan
    forced: dict[str, str | int]
    us: float = 0.0
    quartiles: tuple[float, float] = (0.0, 0.0)

    @property
    def predicted(self) -> float:
        return self.plan.estimate.total


def candidates(row: Row, facts: _C.DeviceInfo, count: int) -> list[Candidate]:
    """The planner's choice first; then the best of each other kind, and the next best, as far as they can be forced."""
    plans = compare(row, facts)
    best_of_kind = {kind_of(plan): plan for plan in reversed(plans)}.values()
    found: list[Candidate] = []
    for plan in [plans[0], *sorted(best_of_kind, key=plans.index), *plans]:
        if len(found) == count:
            break
        if any(plan == c.plan for c in found):
            continue
        forced = force_of(row, facts, plan)
        if forced is not None:
            found.append(Candidate(plan, forced))
        elif plan is plans[0]:
            found.append(Candidate(plan, {}))
    return found


# ---- measuring ----


def make_call(row: Row, seed: int) -> Callable[[], tuple[Tensor, ...]]:
    """One call of the row's operator on tensors of its own."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def tensor() -> Tensor:
        t = torch.randn(row.layer.shape, device="cuda", generator=generator)
        return cases.to_layout(t.to(cases.DTYPES[row.dtype]), row.layout)

    shape = row.call.shape
    groups = 1 if shape.kind == LAYER else 0 if shape.kind == BATCH else shape.G
    weight, bias = (torch.randn(shape.C, device="cuda", generator=generator) for _ in range(2))
    x, residual = tensor(), tensor() if row.residual else None
    about = (shape.kind, groups)
    act = (ACTIVATIONS[row.activation], 0.01)
    ops = torch.ops.fastnorm

    def forward() -> tuple[Tensor, ...]:
        return ops.norm_forward(x, weight, bias, residual, None, None, *about, 1e-5, *act, row.backward)

    if not row.backward:
        return forward
    _, stats, mask = forward()
    dy, again = tensor(), residual if row.recomputes else None
    needs = [True, True, row.residual]
    return lambda: ops.norm_backward(dy, x, weight, bias, again, stats, mask, *about, False, *act, needs)


def disagreement(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference of what two plans compute, as a share of the largest value."""
    worst = 0.0
    for ours, theirs in zip(a, b, strict=True):
        if ours.is_floating_point() and ours.numel():
            scale = max(1.0, float(theirs.abs().max()))
            worst = max(worst, float((ours.float() - theirs.float()).abs().max()) / scale)
    return worst


def measure(row: Row, found: list[Candidate], budget_s: float) -> float:
    """Fills in what the candidates take; returns the copy's microseconds for one tensor."""
    copies = copies_for(row.streams * row.nbytes, cache_bytes("cuda"))
    call = in_turn([make_call(row, seed) for seed in range(copies)])
    source = torch.empty(row.nbytes, dtype=torch.uint8, device="cuda")
    clones = in_turn([source.clone for _ in range(copies)])

    def forced(candidate: Candidate) -> Callable[[], object]:
        def run() -> object:
            _C.set_plan_options(forced=candidate.forced)
            return call()

        return run

    single, reference = make_call(row, 0), None
    for candidate in found:
        _C.set_plan_options(forced=candidate.forced)
        outputs = single()
        reference = reference or outputs
        if disagreement(outputs, reference) > 64 * torch.finfo(cases.DTYPES[row.dtype]).eps:
            print(f"DISAGREES with the planner's choice: {row.name}: {candidate.plan}")
    try:
        calls = {str(i): forced(candidate) for i, candidate in enumerate(found)}
        times = race(calls | {"copy": clones}, budget_s, "cuda")
    finally:
        _C.set_plan_options()
    for i, candidate in enumerate(found):
        timing = times[str(i)]
        candidate.us, candidate.quartiles = timing.median * 1e6, (timing.low * 1e6, timing.high * 1e6)
    return times["copy"].median * 1e6


# ---- reporting ----


@dataclasses.dataclass
class Outcome:
    row: Row
    found: list[Candidate]
    copy_us: float  # 0: not measured

    @property
    def floor(self) -> float:
        """The least bytes at the copy's bandwidth, which reads and writes one tensor."""
        return self.row.streams / 2 * self.copy_us

    @property
    def chosen(self) -> Candidate:
        return self.found[0]

    @property
    def best(self) -> Candidate:
        return min(self.found, key=lambda c: c.us if self.copy_us else c.predicted)

    def to_json(self) -> dict[str, Any]:
        plans = [
            {
                "plan": str(c.plan),
                "forced": c.forced,
                "predicted_us": {
                    name: getattr(c.plan.estimate, name) for name in ("memory", "barriers", "launches", "total")
                },
                "us": c.us,
                "quartiles_us": c.quartiles,
            }
            for c in self.found
        ]
        return {"row": self.row.name, "bytes": self.row.nbytes, "streams": self.row.streams, "copy_us": self.copy_us,
                "plans": plans}  # fmt: skip


def predicted_floor(row: Row, facts: _C.DeviceInfo) -> float:
    """Of the tensors that the planner knows of: not forward's residual, nor dresidual."""
    streams = 3 + row.recomputes if row.backward else 2
    return streams * row.nbytes / facts.bytes_per_us


def family_shares(outcomes: Sequence[Outcome], facts: _C.DeviceInfo) -> dict[tuple[str, bool], list[float]]:
    """Of the bandwidth on the least bytes, by family and direction: measured, or predicted of the peak's."""
    shares: dict[tuple[str, bool], list[float]] = {}
    for o in outcomes:
        if o.row.layer.label == "small":
            continue
        share = o.floor / o.chosen.us if o.copy_us else predicted_floor(o.row, facts) / o.chosen.predicted
        shares.setdefault((o.row.family, o.row.backward), []).append(share)
    return shares


def fit(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """By which factor each part of the estimate is off: least squares of relative errors, none below 0."""
    measured = [c for o in outcomes if o.copy_us for c in o.found if c.us > 0]
    names = ["memory", "barriers", "launches"]
    while names and measured:
        parts = np.array([[getattr(c.plan.estimate, n) / c.us for n in names] for c in measured])
        factors = np.linalg.lstsq(parts, np.ones(len(measured)), rcond=None)[0]
        if (factors >= 0).all():
            return dict(zip(names, map(float, factors), strict=True))
        names.pop(int(np.argmin(factors)))
    return {}


def report(console: Console, outcomes: Sequence[Outcome], facts: _C.DeviceInfo) -> None:
    table = Table("row", "us", "predicted", "share", "best", "best/chosen")
    for o in outcomes:
        share = o.floor / o.chosen.us if o.copy_us else predicted_floor(o.row, facts) / o.chosen.predicted
        taken = f"{o.chosen.us:.1f}" if o.copy_us else "-"
        ratio = f"{o.best.us / o.chosen.us:.2f}" if o.copy_us else "-"
        kind = " ".join(map(str, kind_of(o.best.plan)))
        table.add_row(o.row.name, taken, f"{o.chosen.predicted:.1f}", f"{share:.0%}", kind, ratio)
    console.print(table)
    for (family, backward), shares in sorted(family_shares(outcomes, facts).items()):
        mean, line = statistics.geometric_mean(shares), TARGETS[family][backward]
        direction = "backward" if backward else "forward"
        below = sum(share < line for share in shares)
        console.print(
            f"{family} {direction}: {mean:.0%} of bandwidth, aim {line:.0%}; {below} of {len(shares)} rows below"
        )
    lost = [o for o in outcomes if o.copy_us and o.best.us < 0.95 * o.chosen.us]
    for o in lost:
        console.print(f"better by {1 - o.best.us / o.chosen.us:.0%}: {o.row.name}: {o.best.plan}")
    for name, factor in fit(outcomes).items():
        console.print(f"{name}: takes {factor:.2f} times what the estimate says")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--facts", choices=sorted(DEVICES), help="predict for this device, and measure nothing")
    add("--filter", default="", metavar="REGEX", help="only rows whose name has it")
    add("--budget", type=float, default=480.0, metavar="SECONDS", help="rows that do not fit are left out")
    add("--row-budget", type=float, default=1.5, metavar="SECONDS", help="of one row")
    add("--candidates", type=int, default=6, metavar="N", help="plans of a row")
    add("--json", type=Path, metavar="PATH", help="save everything measured")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    console = Console(width=200)
    if not args.facts and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here: --facts H200 predicts without one")
    facts = DEVICES[args.facts] if args.facts else _C.cuda_device_info(0)
    chosen, outcomes = rows(args.filter), []
    deadline = time.monotonic() + args.budget
    for row in chosen:
        found = candidates(row, facts, args.candidates)
        if args.facts:
            outcomes.append(Outcome(row, found, 0.0))
        elif time.monotonic() + args.row_budget < deadline:
            outcomes.append(Outcome(row, found, measure(row, found, args.row_budget)))
            torch.cuda.empty_cache()
    report(console, outcomes, facts)
    console.print(f"{len(outcomes)} of {len(chosen)} rows")
    if args.json and not args.facts:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(describe("cuda") | {"rows": [o.to_json() for o in outcomes]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
