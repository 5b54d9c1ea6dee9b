"""The planner's constants (csrc/plan/instructions.h), made of the table of executed instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.instructions import DIRECTIONS, HALF_AND_FULL, Row, number
from fastnorm import _C
from tests.common.cases import LAYOUTS

Table = Mapping[tuple[str, str, str, str], float]

# The planner's walks, and the layers that stand for them: kept in registers, where there is such a kernel; kept in
# shared memory; split in two passes; the second pass alone.
WALKS = {
    "rows": ("planar", "", "BatchNorm", "BatchNorm, split", "BatchNorm, frozen"),
    "rows, weights change with every element": (
        "planar", "LayerNorm 4096", "LayerNorm 4096, shared", "LayerNorm 4096, split", "BatchNorm, frozen",
    ),
    "columns": ("channels_last", "", "BatchNorm", "BatchNorm, split", "BatchNorm, frozen"),
}  # fmt: skip
PLAIN = "GroupNorm(32)"  # what activations are counted on


def instructions_of(rows: Sequence[Row]) -> Table:
    return {
        (str(r["family"]), str(r["layout"]), str(r["dtype"]), str(r["direction"])): number(r, "instructions")
        for r in rows
    }


def braces(*values: float | str) -> str:
    return "{" + ", ".join(v if isinstance(v, str) else f"{v:.1f}" for v in values) + "}"


def work(table: Table, walk: str, dtype: str, direction: str) -> str:
    layout, *families = WALKS[walk]
    registers, shared, split, apply = (table[f, layout, dtype, direction] if f else 0.0 for f in families)
    return braces(registers, shared, split - apply, apply)


def narrow(table: Table, dtype: str, direction: str) -> str:
    """How many times as much work narrower packs are: of 8 bytes in rows, single elements in rows, and in columns."""
    rows, columns = (table["BatchNorm", layout, dtype, direction] for layout in LAYOUTS)
    single = table["BatchNorm 7x7", "planar", dtype, direction]
    half_packs = table.get(("BatchNorm 14x14", "planar", dtype, direction), single)
    odd = table["BatchNorm, odd channels", "channels_last", dtype, direction]
    return braces(f"{half_packs / rows:.2f}", f"{single / rows:.2f}", f"{odd / columns:.2f}")


def residual(table: Table, dtype: str, direction: str) -> float:
    """That of layouts that adds less: the other one may be cut otherwise with a residual."""
    with_and_without = [f"BatchNorm{add} + relu" for add in (" + add", "")]
    both = ([table[family, layout, dtype, direction] for family in with_and_without] for layout in LAYOUTS)
    return max(0.0, min(more - less for more, less in both))


def added(table: Table, activation: str, dtype: str, direction: str) -> float:
    if activation == "none":
        return 0.0
    plain = table[PLAIN, "channels_last", dtype, direction]
    return max(0.0, table[f"{PLAIN} + {activation}", "channels_last", dtype, direction] - plain)


def header(rows: Sequence[Row]) -> str:
    """The text of csrc/plan/instructions.h."""
    table = instructions_of(rows)
    lines = [
        "// Machine instructions that the kernels execute for an element of x. `make count-instructions ARGS=--update`",
        "// makes this file, of benchmarks/results/instructions.json. Every pair is for half types and for float32.",
        "#pragma once",
        "",
        '#include "core/activation.h"',
        "",
        "namespace fastnorm {",
        "",
        "// A fused launch that keeps x in registers, or in shared memory; the pass of split that takes sums; the pass",
        "// that writes. 0 where there is no such kernel.",
        "struct ElementWork {",
        "  double registers, shared, reduce, apply;",
        "};",
        "",
        "// [forward, backward][rows, rows whose weights change with every element, columns], packs of 16 bytes, no",
        "// activation.",
        "constexpr ElementWork kElementWork[2][3][2] = {",
    ]
    for direction in DIRECTIONS:
        pairs = [braces(*(work(table, walk, dtype, direction) for dtype in HALF_AND_FULL)) for walk in WALKS]
        lines.append("    {" + ",\n     ".join(pairs) + "},")
    lines += [
        "};",
        "",
        "// Times so much with narrower packs: [forward, backward], of 8 bytes in rows, single elements in rows and in",
        "// columns.",
        "constexpr double kNarrowPacks[2][2][3] = {",
    ]
    for direction in DIRECTIONS:
        lines.append("    " + braces(*(narrow(table, dtype, direction) for dtype in HALF_AND_FULL)) + ",")
    lines += ["};", "", "// More with a residual: [forward, backward]."]
    pairs = [braces(*(residual(table, dtype, direction) for dtype in HALF_AND_FULL)) for direction in DIRECTIONS]
    lines.append(f"constexpr double kResidualWork[2][2] = {braces(*pairs)};")
    lines += ["", "// More with an activation: [forward, backward][Activation].",
              "constexpr double kActivationWork[2][kActivations][2] = {"]  # fmt: skip
    for direction in DIRECTIONS:
        lines.append("    {")
        for activation in _C.activations():
            values = (added(table, activation, dtype, direction) for dtype in HALF_AND_FULL)
            lines.append(f"        {braces(*values)},  // {activation}")
        lines.append("    },")
    lines += ["};", "", "}  // namespace fastnorm", ""]
    return "\n".join(lines)
