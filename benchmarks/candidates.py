"""The jobs of tune.py, the most important first, and the plans that run in each.

A job is one direction of a row. Its candidates are the planner's own choice, the best plan of every other kind, and the
next best; each with what forces exactly that plan on a call.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from benchmarks.contestants import CUDA_LAYERS, DTYPES, Row, passes
from fastnorm import _C
from tests.common import cases
from tests.common.plan_model import GROUP, Call, Shape, shape_of

Plan = _C.ForwardPlan | _C.BackwardPlan
Forced = dict[str, str | int]
Kind = tuple[str, str, int]

BLOCKS_PER_SM = (1, 2, 4)  # plans divide an SM's shared memory among so many


def _of(label: str) -> list[cases.Layer]:
    return [layer for layer in (*cases.BENCH, *CUDA_LAYERS) if layer.label == label]


def _resized(layer: cases.Layer, *sizes: int, label: str = "") -> cases.Layer:
    """The layer with these sizes for the first of its input, or for all."""
    return dataclasses.replace(layer, label=label or layer.label, shape=(*sizes, *layer.shape[len(sizes) :]))


_RESNET = [layer for layer in cases.BENCH if layer.label == "ResNet-50"]
_CONVNEXT = _of("ConvNeXt")
SMALL = (  # of a megabyte or less: launches and latency
    cases.TINY,
    _resized(_RESNET[-1], 2, label="small"),
    _resized(_of("UNet")[-1], 2, 1280, 8, 8, label="small"),
    _resized(_CONVNEXT[-1], 64, label="small"),
)
LAYERS = (
    *(_resized(layer, 256) for layer in _RESNET),
    *_of("UNet"),
    *_of("VAE"),
    *_of("nnU-Net"),
    *_of("transformer"),
    _CONVNEXT[0],
    *_RESNET,
    *SMALL,
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One direction of one row, with all gradients."""

    row: Row
    backward: bool

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"

    @property
    def name(self) -> str:
        """The text that --filter searches."""
        return f"{self.row.name} {self.direction}"

    @property
    def family(self) -> str:
        """The group of jobs that share a line to reach; "small" has none."""
        return "small" if self.row.layer in SMALL else re.sub("[123]d$", "", self.row.layer.norm)

    @property
    def passes(self) -> int:
        """The least number of reads and writes of a tensor of the input's size."""
        forward, step = (passes(mode, self.row.activation, self.row.residual) for mode in ("forward", "step"))
        return step - forward if self.backward else forward

    @property
    def case(self) -> cases.Case:
        row = self.row
        return cases.Case(row.layer, row.layout, (row.dtype, "float32"), row.activation, row.residual)

    @property
    def call(self) -> Call:
        """The question to the planner. It counts a residual where backward reads it: where no mask is saved."""
        read_again = self.row.residual and self.row.activation not in (None, "relu", "leaky_relu")
        shape, activation = shape_of(self.row.layer, self.row.layout), self.row.activation or "none"
        adds = self.row.residual and not (self.backward and activation == "none")  # then dresidual is dy
        return Call(shape, self.row.dtype, 16, read_again, False, True, True, activation, adds)

    def compare(self, facts: _C.DeviceInfo) -> list[Plan]:
        """All plans there are, cheapest first."""
        return [*(self.call.all_backward(facts) if self.backward else self.call.all_forward(facts))]

    def plan(self, facts: _C.DeviceInfo, forced: Forced) -> Plan | None:
        """None where no plan is as forced."""
        try:
            return (self.call.backward if self.backward else self.call.forward)(facts, forced=forced)
        except ValueError:
            return None


def jobs(pattern: str = "") -> Iterator[Job]:
    """The jobs whose name matches the regular expression. A model's own epilogue comes first, and bfloat16."""
    for rank in range(len(cases.EPILOGUES)):
        for dtype in sorted(DTYPES):
            for layer in LAYERS:
                own = ("plain", "act", "add_act") if layer.norm == "LayerNorm" else ("act", "add_act", "plain")
                for layout in layer.layouts:
                    for backward in (False, True):
                        job = Job(Row(layer, dtype, layout, own[rank]), backward)
                        if re.search(pattern, job.name):
                            yield job


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of an estimate, in microseconds."""

    memory: float
    issue: float
    waits: float
    launches: float

    @property
    def counted(self) -> dict[str, float]:
        """What the parts add to the total. Memory and the issue of instructions go on side by side, and together take
        the square root of the sum of their squares: each is counted in proportion to its square."""
        both = math.hypot(self.memory, self.issue) or 1.0
        return {
            "memory": self.memory**2 / both,
            "issue": self.issue**2 / both,
            "waits": self.waits,
            "launches": self.launches,
        }

    @property
    def total(self) -> float:
        return sum(self.counted.values())


@dataclasses.dataclass(frozen=True)
class Candidate:
    plan: Plan
    forced: Forced
    predicted: Parts

    @property
    def label(self) -> str:
        """The forced dict in words."""
        f = self.forced
        if f["strategy"] != "fused":
            return str(f["strategy"])
        pieces = f" of {f['pieces']}" if "pieces" in f else ""
        walk = ", columns" if f.get("traversal") == "columns" else ""
        tile = f", tiles of {f['tile_bytes']} B" if "tile_bytes" in f else ""
        stages = ", 2 stages" if f["stages"] == 2 else ""
        place = ", registers" if f.get("place") == "registers" else ""
        kept = f", {f['staged_length']} positions kept" if "staged_length" in f else ""
        scattered = ", scattered" if f.get("exchange") == "scatter" else ""
        return f"{f['gang']}{walk}{place}{pieces}, {f['blocks_per_sm']} per SM{tile}{stages}{kept}{scattered}"


def grid_of(plan: Plan) -> _C.Grid:
    """The grid of the launch that tells plans apart."""
    return plan.grid if isinstance(plan, _C.ForwardPlan) else plan.reduce


def kind_of(plan: Plan) -> Kind:
    grid = grid_of(plan)
    return plan.strategy, "registers" if grid.thread_packs > 0 else grid.gang, grid.stages


def kind_text(plan: Plan) -> str:
    strategy, gang, stages = kind_of(plan)
    return f"{gang}{', 2 stages' if stages == 2 else ''}" if strategy == "fused" else strategy


def parts_of(estimate: _C.Estimate) -> Parts:
    return Parts(estimate.memory, estimate.issue, estimate.barriers, estimate.launches)


def copy_parts(job: Job, facts: _C.DeviceInfo) -> Parts:
    """Of reading x once and writing it, by the same estimate. A copy executes less than the kernel that this plan is
    of: no issue is counted."""
    numel = job.call.shape.numel
    flat = Shape(GROUP, 1, 1, numel, 1, False).geometry
    e = _C.plan_forward(flat, job.row.dtype, facts, frozen=True).estimate
    return Parts(e.memory, 0.0, e.barriers, e.launches)


def predict_copy(job: Job, facts: _C.DeviceInfo) -> float:
    """Microseconds."""
    return copy_parts(job, facts).total


def force(job: Job, plan: Plan, facts: _C.DeviceInfo) -> Forced | None:
    """The options that force exactly this plan. None where a cheaper one agrees in all that can be forced."""
    if plan.strategy != "fused":
        return {"strategy": plan.strategy}
    grid = grid_of(plan)
    forced: Forced = {
        "strategy": "fused", "gang": grid.gang, "stages": grid.stages, "traversal": grid.traversal
    }  # fmt: skip
    if grid.gang != "block":
        forced["pieces"] = grid.pieces
    else:
        forced["place"] = "registers" if grid.thread_packs > 0 else "shared"
    if grid.traversal == "columns":
        forced["tile_bytes"] = grid.tile * job.call.size
        if grid.gang == "grid":
            forced["exchange"] = grid.exchange
        if grid.staged_length < grid.piece_length:
            forced["staged_length"] = grid.staged_length
    choices = ({**forced, "blocks_per_sm": blocks_per_sm} for blocks_per_sm in BLOCKS_PER_SM)
    return next((each for each in choices if job.plan(facts, each) == plan), None)


def candidates(job: Job, facts: _C.DeviceInfo, count: int) -> list[Candidate]:
    """The planner's choice first, then the best of each other kind, then the next best."""
    plans = job.compare(facts)
    forced: dict[int, Forced] = {}  # by index in `plans`
    kinds = {kind_of(plan) for plan in plans}
    for i, plan in enumerate(plans):
        if len(forced) < count and kind_of(plan) in kinds and (found := force(job, plan, facts)):
            forced[i] = found
            kinds.remove(kind_of(plan))
    for i, plan in enumerate(plans):
        if len(forced) < count and i not in forced and (found := force(job, plan, facts)):
            forced[i] = found
    return [Candidate(plans[i], found, parts_of(plans[i].estimate)) for i, found in forced.items()]
