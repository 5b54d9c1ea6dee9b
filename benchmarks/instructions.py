"""The rows of the table of executed instructions, how a row is counted, and how two tables are compared.

A row is a kernel family, a dtype, a layout and a direction. nvcc's PTX is executed (tests/ptx), so a count is what a
GPU would execute, up to what ptxas makes of it (ptx_weights.py). Every number is of an element of x, and it is the
marginal cost of a large tensor: a large one's minus a smaller one's, over the difference in elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.ptx_weights import divisions, weighted
from tests.common.cases import Case, Layer
from tests.common.numerics import make_inputs
from tests.common.raw_calls import RawCall

DTYPES = ("bfloat16", "float16", "float32")
DIRECTIONS = ("forward", "backward")
FLOAT32_LINE = 1.5  # a line's instructions for float32, in those for a half type
RISE = 1.03  # a row that rises by more fails

Forced = Mapping[str, str | int]
# What the planner chooses for such layers of a usual size. A choice that it makes otherwise is no change of a kernel.
REGISTERS: Forced = {"strategy": "fused", "gang": "block", "place": "registers"}
BLOCK: Forced = {"strategy": "fused", "gang": "block", "place": "shared"}
CLUSTER: Forced = {"strategy": "fused", "gang": "cluster"}
GRID: Forced = {"strategy": "fused", "gang": "grid"}
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
    """A layer with its epilogue and its way through the kernels, on two numbers of samples.

    lines: the most instructions that a half type should take, forward and backward; 0 where there is no line.
    """

    name: str
    norm: str
    shape: tuple[int, ...]  # of a sample
    args: tuple[object, ...]
    samples: tuple[int, int]
    layouts: tuple[str, ...] = ("planar", "channels_last")
    activation: str | None = None
    residual: bool = False
    frozen: bool = False
    forced: Forced = dataclasses.field(default_factory=lambda: CLUSTER, hash=False)
    dtypes: tuple[str, ...] = DTYPES
    lines: tuple[float, float] = (0, 0)

    def case(self, layout: str, dtype: str, samples: int) -> Case:
        """Parameters are float32, as in training under autocast."""
        kwargs = (("affine", True),) if self.norm.startswith("Instance") else ()
        layer = Layer(self.name, self.norm, (samples, *self.shape), self.args, kwargs)
        mode = "frozen" if self.frozen else "train"
        return Case(layer, layout, (dtype, "float32"), self.activation, self.residual, mode)

    def line(self, dtype: str, direction: str) -> float:
        return self.lines[DIRECTIONS.index(direction)] * (FLOAT32_LINE if dtype == "float32" else 1)


PLANAR, LAST, BOTH = ("planar",), ("channels_last",), ("planar", "channels_last")
HALF_AND_FULL = ("bfloat16", "float32")


def batch_norm(name: str, layout: str, **more: Any) -> Family:
    if layout == "planar":
        return Family(name, "BatchNorm2d", (64, 56, 56), (64,), (8, 16), PLANAR, **more)
    return Family(name, "BatchNorm2d", (256, 28, 28), (256,), (4, 12), LAST, **{"forced": GRID, **more})


def group_norm(activation: str | None, layouts: tuple[str, ...], **more: Any) -> Family:
    name = f"GroupNorm(32) + {activation}" if activation else "GroupNorm(32)"
    return Family(name, "GroupNorm", (128, 64, 64), (32, 128), (1, 3), layouts, activation, **more)


def layer_norm(name: str, width: int, **more: Any) -> Family:
    samples = (786432 // width, 2097152 // width)
    return Family(name, "LayerNorm", (width,), (width,), samples, PLANAR, **{"forced": REGISTERS, **more})


FAMILIES: tuple[Family, ...] = (
    # Layers of models, with the lines to reach.
    batch_norm("BatchNorm + relu", "planar", activation="relu", lines=(16, 26)),
    batch_norm("BatchNorm + relu", "channels_last", activation="relu", lines=(14, 24)),
    layer_norm("LayerNorm 4096", 4096, lines=(15, 25)),
    layer_norm("LayerNorm 8192", 8192, lines=(15, 25)),
    group_norm("silu", BOTH, lines=(24, 38)),
    group_norm("gelu", BOTH, lines=(30, 46)),
    Family("InstanceNorm3d + leaky_relu", "InstanceNorm3d", (32, 16, 32, 32), (32,), (1, 3), BOTH, "leaky_relu",
           lines=(15, 26)),
    *(batch_norm("BatchNorm + add + relu", layout, activation="relu", residual=True, dtypes=HALF_AND_FULL)
      for layout in BOTH),
    # The ways through the kernels, without an epilogue.
    *(batch_norm(name, layout, dtypes=HALF_AND_FULL, **way)
      for name, way in (("BatchNorm", {}),
                        ("BatchNorm, split", {"forced": SPLIT}),
                        ("BatchNorm, frozen", {"forced": {}, "frozen": True}))
      for layout in BOTH),
    *(layer_norm(f"LayerNorm 4096, {name}", 4096, forced=way, dtypes=HALF_AND_FULL)
      for name, way in (("shared", BLOCK), ("split", SPLIT))),
    # Packs of 8 bytes of a half type, and single elements.
    Family("BatchNorm 14x14", "BatchNorm2d", (256, 14, 14), (256,), (16, 48), PLANAR,
           forced=BLOCK, dtypes=("bfloat16",)),
    Family("BatchNorm 7x7", "BatchNorm2d", (512, 7, 7), (512,), (32, 96), PLANAR, forced=BLOCK,
           dtypes=HALF_AND_FULL),
    Family("BatchNorm, odd channels", "BatchNorm2d", (65, 28, 28), (65,), (8, 24), LAST, forced=GRID,
           dtypes=HALF_AND_FULL),
    # The other activations, and the layer without one.
    *(group_norm(activation, LAST, dtypes=HALF_AND_FULL)
      for activation in (None, "relu", "leaky_relu", "gelu_tanh", "hardswish", "sigmoid", "tanh")),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """Two rows of the table, forward and backward, which one run counts."""

    family: Family
    dtype: str
    layout: str

    @property
    def name(self) -> str:
        return f"{self.family.name} {self.layout} {self.dtype}"


def jobs() -> Iterator[Job]:
    for family in FAMILIES:
        for layout in family.layouts:
            for dtype in family.dtypes:
                yield Job(family, dtype, layout)


Outputs = dict[str, torch.Tensor]
Call = Callable[[], Outputs]


def count_job(job: Job, ops: object, count: Callable[[Call], tuple[Outputs, Counts]]) -> list[dict[str, Any]]:
    """The rows. ops: operators whose kernels are counted; count: makes a call, and says what it executed."""
    found: dict[str, list[Counts]] = {direction: [] for direction in DIRECTIONS}
    elements = []
    for samples in job.family.samples:
        case = job.family.case(job.layout, job.dtype, samples)
        raw = RawCall(case, make_inputs(case, torch.device("cpu")), ops)
        elements.append(raw.x.numel())
        saved, forward = count(raw.forward)
        output_mask = (True, not job.family.frozen, job.family.residual)
        _, backward = count(partial(raw.backward, saved["stats"], saved["mask"], output_mask))
        for direction, counts in zip(DIRECTIONS, (forward, backward), strict=True):
            found[direction].append(counts)
    rows: list[dict[str, Any]] = []
    for direction, (small, large) in found.items():
        about = {"family": job.family.name, "layout": job.layout, "dtype": job.dtype, "direction": direction}
        line = job.family.line(job.dtype, direction)
        counted = large.per_element(small, elements[1] - elements[0]).to_json()
        rows.append(about | counted | ({"line": line} if line else {}))
    return rows


# ---- two tables ----

KEY = ("family", "layout", "dtype", "direction")
COMPARED = ("instructions", "divisions", "shared_accesses", "global_bytes")
LEAST = {
    "instructions": 0.1,
    "divisions": 0.02,
    "shared_accesses": 0.02,
    "global_bytes": 0.1,
}  # a smaller rise is noise

Row = Mapping[str, object]


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row[part]) for part in KEY)


def number(row: Row, what: str) -> float:
    value = row[what]
    assert isinstance(value, (int, float))
    return float(value)


@dataclasses.dataclass
class Comparison:
    """Sentences about rows. rises: what fails; falls: what asks for an update."""

    rises: list[str]
    falls: list[str]


def compare(saved: Sequence[Row], counted: Sequence[Row]) -> Comparison:
    """A row that was not saved rises, because nothing holds it; one that was and is gone falls."""
    before = {key_of(row): row for row in saved}
    found = Comparison([], [])
    for row in counted:
        name = " ".join(key_of(row))
        old = before.pop(key_of(row), None)
        if old is None:
            found.rises.append(f"{name}: is not in the table")
            continue
        for what in COMPARED:
            was, now = number(old, what), number(row, what)
            text = f"{name}: {what} {was:g} -> {now:g} an element"
            if now > was * RISE and now - was > LEAST[what]:
                found.rises.append(text)
            elif now < was / RISE and was - now > LEAST[what]:
                found.falls.append(text)
    found.falls += [f"{' '.join(key)}: is no longer counted" for key in before]
    return found
