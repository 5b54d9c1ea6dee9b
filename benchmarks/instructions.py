"""The rows of the table of executed instructions, how a row is counted, and how two tables are compared.

A row is a kernel family, a dtype, a layout and a direction. nvcc's PTX is executed (tests/ptx), so a count is what a
GPU would execute, up to what ptxas makes of it (ptx_weights.py). Every number is of an element of x, and it is the
marginal cost of a large tensor: a large one's minus a smaller one's, over the difference in elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.ptx_weights import divisions, weighted
from fastnorm import _C
from tests.common.cases import LAYOUTS, Case, Layer
from tests.common.numerics import make_inputs
from tests.common.plan_model import Call as PlannedCall
from tests.common.raw_calls import RawCall

DTYPES = ("bfloat16", "float16", "float32")
DIRECTIONS = ("forward", "backward")
KEY = ("family", "layout", "dtype", "direction")
FLOAT32_LINE = 1.5  # a line's instructions for float32, in those for a half type
RISE = 1.03  # a row that rises or falls by more fails

Forced = Mapping[str, str | int]


def fused(gang: str, blocks_per_sm: int, **more: str | int) -> Forced:
    """Pinned down so far that both sizes have the same blocks."""
    return {"strategy": "fused", "gang": gang, "place": "shared", "stages": 1, "blocks_per_sm": blocks_per_sm, **more}


REGISTERS: Forced = {"strategy": "fused", "gang": "block", "place": "registers"}
SPLIT: Forced = {"strategy": "split"}


@dataclasses.dataclass(frozen=True)
class Counts:
    """What launches have executed. instructions: PTX, of threads, by opcode; a warp's count as all of its threads'."""

    instructions: Mapping[str, float]
    shared_accesses: float  # of threads
    global_bytes: float

    def per_element(self, smaller: Counts, elements: int) -> Counts:
        names = self.instructions.keys() | smaller.instructions.keys()
        difference = {n: self.instructions.get(n, 0) - smaller.instructions.get(n, 0) for n in names}
        return Counts(
            {name: count / elements for name, count in difference.items()},
            (self.shared_accesses - smaller.shared_accesses) / elements,
            (self.global_bytes - smaller.global_bytes) / elements,
        )

    def to_json(self) -> dict[str, float]:
        return {
            "instructions": round(weighted(self.instructions), 2),
            "ptx": round(sum(self.instructions.values()), 2),
            "divisions": round(divisions(self.instructions), 3),
            "shared_accesses": round(self.shared_accesses, 3),
            "global_bytes": round(self.global_bytes, 2),
        }


@dataclasses.dataclass(frozen=True)
class Family:
    """A layer in one layout with its epilogue, in two sizes that differ in the size of the sets alone; of LayerNorm, in
    their number. Threads go four and eight rounds through a piece, where the layer allows it.

    forced: its way through the kernels, which is what the planner chooses for such a layer of a usual size. A choice
    that it makes otherwise is no change of a kernel.
    lines: the most instructions that a half type should take, forward and backward; 0 where there is no line.
    """

    name: str
    norm: str
    layout: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    forced: Forced = dataclasses.field(hash=False)
    activation: str | None = None
    residual: bool = False
    frozen: bool = False
    dtypes: tuple[str, ...] = DTYPES
    lines: tuple[float, float] = (0, 0)

    def case(self, dtype: str, shape: tuple[int, ...]) -> Case:
        """Parameters are float32, as in training under autocast."""
        if dtype == "float32" and self.layout == "planar" and self.norm != "LayerNorm":
            sets_have_all_of_a_sample = self.norm.startswith(("Batch", "LayerNorm2d"))
            shape = halved(shape, 0 if sets_have_all_of_a_sample else 2)  # as many bytes
        channels = shape[1]
        args = (GROUPS, channels) if self.norm == "GroupNorm" else (channels,)
        kwargs = (("affine", True),) if self.norm.startswith("Instance") else ()
        layer = Layer(self.name, self.norm, shape, args, kwargs)
        mode = "frozen" if self.frozen else "train"
        return Case(layer, self.layout, (dtype, "float32"), self.activation, self.residual, mode)

    def line(self, dtype: str, direction: str) -> float:
        return self.lines[DIRECTIONS.index(direction)] * (FLOAT32_LINE if dtype == "float32" else 1)


def halved(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(size // 2 if i == axis else size for i, size in enumerate(shape))


GROUPS = 32
HALF_AND_FULL = ("bfloat16", "float32")


def batch_norm(layout: str, epilogue: str = "", forced: Forced | None = None, **more: Any) -> Family:
    name = f"BatchNorm{epilogue}"
    if layout == "planar":
        way = fused("cluster", 2, pieces=8) if forced is None else forced
        return Family(name, "BatchNorm2d", layout, ((32, 16, 56, 56), (64, 16, 56, 56)), way, **more)
    if forced is None:
        way, samples = fused("grid", 1, pieces=8, tile_bytes=128), (2, 4)
    else:
        way, samples = forced, (16, 32)  # many short pieces, however large the tensor is
    small, large = ((n, 256, 32, 32) for n in samples)
    return Family(name, "BatchNorm2d", layout, (small, large), way, **more)


def group_norm(layout: str, activation: str | None = None, **more: Any) -> Family:
    name = f"GroupNorm({GROUPS})" + (f" + {activation}" if activation else "")
    if layout == "planar":
        way, samples = fused("cluster", 2, pieces=4), 1
    else:
        way, samples = fused("cluster", 1, pieces=8, tile_bytes=64), 2
    small, large = ((samples, 128, size, 128 // samples) for size in (64, 128))
    return Family(name, "GroupNorm", layout, (small, large), way, activation, **more)


def instance_norm(layout: str, **more: Any) -> Family:
    name, norm, act = "InstanceNorm3d + leaky_relu", "InstanceNorm3d", "leaky_relu"
    if layout == "planar":
        way = fused("cluster", 2, pieces=4)
        return Family(name, norm, layout, ((1, 32, 32, 32, 32), (1, 32, 64, 32, 32)), way, act, **more)
    way = fused("grid", 1, pieces=8, tile_bytes=64)
    return Family(name, norm, layout, ((1, 32, 8, 16, 32), (1, 32, 16, 16, 32)), way, act, **more)


def layer_norm(width: int, way: str = "", forced: Forced = REGISTERS, **more: Any) -> Family:
    shapes = ((786432 // width, width), (2097152 // width, width))
    return Family(f"LayerNorm {width}{way}", "LayerNorm", "planar", shapes, forced, **more)


def layer_norm_2d(way: str, space: tuple[int, int], forced: Forced, **more: Any) -> Family:
    small, large = ((16 // (space[0] // 7), channels, *space) for channels in (128, 256))
    return Family(f"LayerNorm2d{way}", "LayerNorm2d", "planar", (small, large), forced, **more)


FAMILIES: tuple[Family, ...] = (
    # Layers of models, with the lines to reach.
    batch_norm("planar", " + relu", activation="relu", lines=(16, 26)),
    batch_norm("channels_last", " + relu", activation="relu", lines=(14, 24)),
    layer_norm(4096, lines=(15, 25)),
    layer_norm(8192, lines=(15, 25)),
    *(group_norm(layout, "silu", lines=(24, 38)) for layout in LAYOUTS),
    *(group_norm(layout, "gelu", lines=(30, 46)) for layout in LAYOUTS),
    *(instance_norm(layout, lines=(15, 26)) for layout in LAYOUTS),
    *(batch_norm(layout, " + add + relu", activation="relu", residual=True, dtypes=HALF_AND_FULL)
      for layout in LAYOUTS),
    # The ways through the kernels, without an epilogue.
    *(batch_norm(layout, dtypes=HALF_AND_FULL) for layout in LAYOUTS),
    *(batch_norm(layout, ", split", SPLIT, dtypes=HALF_AND_FULL) for layout in LAYOUTS),
    *(batch_norm(layout, ", frozen", {}, frozen=True, dtypes=HALF_AND_FULL) for layout in LAYOUTS),
    layer_norm(4096, ", shared", fused("block", 2), dtypes=HALF_AND_FULL),
    layer_norm(4096, ", split", SPLIT, dtypes=HALF_AND_FULL),
    # Packs of 8 bytes of a half type, and single elements.
    Family("BatchNorm 14x14", "BatchNorm2d", "planar", ((64, 32, 14, 14), (128, 32, 14, 14)),
           fused("block", 2, traversal="rows"), dtypes=("bfloat16",)),
    Family("BatchNorm 7x7", "BatchNorm2d", "planar", ((128, 32, 7, 7), (256, 32, 7, 7)),
           fused("block", 2, traversal="rows"), dtypes=HALF_AND_FULL),
    # The same maps with samples as rows of columns: half a warp of every two has none.
    Family("BatchNorm 7x7, columns", "BatchNorm2d", "planar", ((32, 32, 7, 7), (64, 32, 7, 7)),
           fused("block", 1, traversal="columns"), dtypes=HALF_AND_FULL),
    Family("BatchNorm, odd channels", "BatchNorm2d", "channels_last", ((8, 65, 28, 28), (16, 65, 28, 28)),
           fused("grid", 1, pieces=8, tile_bytes=32), dtypes=HALF_AND_FULL),
    # Layer norm over the channels of maps: packs of 16 bytes, the same with most channels read twice, packs of 8 bytes
    # of a half type, single elements.
    layer_norm_2d("", (28, 32), fused("block", 2, tile_bytes=128), dtypes=HALF_AND_FULL),
    layer_norm_2d(", read twice", (28, 32), fused("block", 2, tile_bytes=128, staged_length=32), dtypes=HALF_AND_FULL),
    layer_norm_2d(" 14x14", (14, 14), fused("block", 2, tile_bytes=64), dtypes=("bfloat16",)),
    layer_norm_2d(" 7x7", (7, 7), fused("block", 2, tile_bytes=32), dtypes=HALF_AND_FULL),
    # The other activations, and the layer without one.
    *(group_norm("channels_last", activation, dtypes=HALF_AND_FULL)
      for activation in (None, "relu", "leaky_relu", "gelu_tanh", "hardswish", "sigmoid", "tanh")),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """Two rows of the table, forward and backward, which one run counts."""

    family: Family
    dtype: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.family.name, self.family.layout, self.dtype

    @property
    def name(self) -> str:
        return " ".join(self.key)


def jobs() -> Iterator[Job]:
    return (Job(family, dtype) for family in FAMILIES for dtype in family.dtypes)


Outputs = dict[str, torch.Tensor]
Call = Callable[[], Outputs]


def threads_of_pieces(job: Job, raw: RawCall, facts: _C.DeviceInfo) -> dict[str, int]:
    """How many threads have a piece each, of fused launches by direction."""
    family = job.family
    call = PlannedCall(
        raw.shape,
        job.dtype,
        16,
        False,
        raw.frozen,
        True,
        not family.frozen,
        family.activation or "none",
        family.residual,
    )
    found = {}
    for direction, plan in zip(DIRECTIONS, (call.forward, call.backward), strict=True):
        planned = plan(facts, forced=family.forced)
        grid = planned.grid if isinstance(planned, _C.ForwardPlan) else planned.reduce
        if planned.strategy == "fused":
            found[direction] = grid.items * (grid.threads_x if grid.traversal == "rows" else grid.threads)
    return found


def count_job(
    job: Job, ops: object, count: Callable[[Call], tuple[Outputs, Counts]], facts: _C.DeviceInfo
) -> list[dict[str, Any]]:
    """The rows. ops: operators whose kernels are counted; count: makes a call, and says what it executed; facts: of the
    device that they are planned for."""
    found: dict[str, list[Counts]] = {direction: [] for direction in DIRECTIONS}
    elements: list[int] = []
    threads: dict[str, int] = {}
    for shape in job.family.shapes:
        case = job.family.case(job.dtype, shape)
        raw = RawCall(case, make_inputs(case, torch.device("cpu")), ops)
        elements.append(raw.x.numel())
        threads = threads or threads_of_pieces(job, raw, facts)
        saved, forward = count(raw.forward)
        output_mask = (True, not job.family.frozen, job.family.residual)
        _, backward = count(partial(raw.backward, saved["stats"], saved["mask"], output_mask))
        for direction, counts in zip(DIRECTIONS, (forward, backward), strict=True):
            found[direction].append(counts)
    rows: list[dict[str, Any]] = []
    for direction, (small, large) in found.items():
        about = dict(zip(KEY, (*job.key, direction), strict=True))
        line = job.family.line(job.dtype, direction)
        marginal = large.per_element(small, elements[1] - elements[0])
        counted = marginal.to_json()
        if direction in threads:
            rest = weighted(small.instructions) - weighted(marginal.instructions) * elements[0]
            counted["piece_instructions"] = round(rest / threads[direction], 1)
        rows.append(about | counted | ({"line": line} if line else {}))
    return rows


# ---- two tables ----

# What is compared, and the smallest change that is no noise.
COMPARED = {
    "instructions": 0.1,
    "divisions": 0.02,
    "shared_accesses": 0.02,
    "global_bytes": 0.1,
    "piece_instructions": 20,
}

Row = Mapping[str, object]


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row[part]) for part in KEY)


def number(row: Row, what: str) -> float:
    value = row.get(what, 0)
    assert isinstance(value, (int, float))
    return float(value)


@dataclasses.dataclass
class Comparison:
    """Sentences about rows that are not what was saved."""

    rises: list[str]
    falls: list[str]


def merge(
    saved: Sequence[Row],
    counted: Sequence[Row],
    keys: Iterable[tuple[str, ...]],
    key_of: Callable[[Row], tuple[str, ...]],
) -> list[Row]:
    """The rows of these keys, counted ones where there are any."""
    known = {key_of(row): row for row in (*saved, *counted)}
    return [known[key] for key in keys if key in known]


def compare(
    saved: Sequence[Row], counted: Sequence[Row], key_of: Callable[[Row], tuple[str, ...]] = key_of
) -> Comparison:
    """A row that was not saved rises, because nothing holds it; one that was and is gone falls."""
    before = {key_of(row): row for row in saved}
    found = Comparison([], [])
    for row in counted:
        name = " ".join(key_of(row))
        old = before.pop(key_of(row), None)
        if old is None:
            found.rises.append(f"{name}: is not in the table")
            continue
        for what, least in COMPARED.items():
            was, now = number(old, what), number(row, what)
            text = f"{name}: {what} {was:g} -> {now:g}"
            if now > was * RISE and now - was > least:
                found.rises.append(text)
            elif now < was / RISE and was - now > least:
                found.falls.append(text)
    found.falls += [f"{' '.join(key)}: is no longer counted" for key in before]
    return found
