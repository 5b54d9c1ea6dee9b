"""The planner's constants (csrc/plan/instructions.h), made of the table of executed instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.instructions import DIRECTIONS, GROUPS, HALF_AND_FULL, Row, key_of, number
from fastnorm import _C
from tests.common.cases import LAYOUTS

Table = Mapping[tuple[str, ...], Row]

# The planner's walks, and the layers that stand for them: kept in registers, where there is such a kernel; kept in
# shared memory; split in two passes; the second pass alone. The pieces of the second walk are whole rows, and what they
# cost beside their elements is counted with the elements.
WALKS = {
    "rows": ("planar", "", "BatchNorm", "BatchNorm, split", "BatchNorm, frozen"),
    "rows, weights change with every element": (
        "planar", "LayerNorm 4096", "LayerNorm 4096, shared", "LayerNorm 4096, split", "BatchNorm, frozen",
    ),
    "columns": ("channels_last", "", "BatchNorm", "BatchNorm, split", "BatchNorm, frozen"),
}  # fmt: skip
# Layer norm over the channels of planar maps, in which channels and positions of columns are exchanged.
POSITIONS = "LayerNorm2d"
PLAIN = f"GroupNorm({GROUPS})"  # what activations are counted on


def instructions(table: Table, *key: str) -> float:
    return number(table[key], "instructions")


def braces(*values: float | str) -> str:
    return "{" + ", ".join(v if isinstance(v, str) else f"{v:.1f}" for v in values) + "}"


def work(table: Table, walk: str, dtype: str, direction: str) -> str:
    layout, *families = WALKS[walk]
    registers, shared, split, apply = (instructions(table, f, layout, dtype, direction) if f else 0 for f in families)
    whole_rows = families[0] != ""
    piece = 0.0 if whole_rows else number(table[families[1], layout, dtype, direction], "piece_instructions")
    return braces(registers, shared, split - apply, apply, piece)


def positions_work(table: Table, dtype: str, direction: str) -> str:
    """As `work`. Taking sums counts for half of what rows in shared memory take."""
    at = "planar", dtype, direction
    shared, twice = (instructions(table, POSITIONS + way, *at) for way in ("", ", read twice"))
    return braces(0, shared, shared / 2, twice - shared / 2, number(table[(POSITIONS, *at)], "piece_instructions"))


def narrow(table: Table, dtype: str, direction: str) -> str:
    """How many times as much work narrower packs are: of 8 bytes in rows, single elements in rows, and in columns; of
    8 bytes and single elements of positions."""
    rows, columns = (instructions(table, "BatchNorm", layout, dtype, direction) for layout in LAYOUTS)
    single = instructions(table, "BatchNorm 7x7", "planar", dtype, direction)
    halves = "BatchNorm 14x14", "planar", dtype, direction
    half_packs = instructions(table, *halves) if halves in table else single
    odd = instructions(table, "BatchNorm, odd channels", "channels_last", dtype, direction)
    wide, *of_positions = (
        instructions(table, f"{POSITIONS}{size}", "planar", dtype, direction)
        for size in ("", " 14x14" if (f"{POSITIONS} 14x14", *halves[1:]) in table else " 7x7", " 7x7")
    )
    ratios = (half_packs / rows, single / rows, odd / columns, *(each / wide for each in of_positions))
    return braces(*(f"{ratio:.2f}" for ratio in ratios))


def residual(table: Table, dtype: str, direction: str) -> float:
    """That of the layout in which it adds less."""
    both = (
        [instructions(table, f"BatchNorm{add} + relu", layout, dtype, direction) for add in (" + add", "")]
        for layout in LAYOUTS
    )
    return max(0.0, min(more - less for more, less in both))


def added(table: Table, activation: str, dtype: str, direction: str) -> float:
    if activation == "none":
        return 0.0
    with_it, plain = (
        instructions(table, name, "channels_last", dtype, direction) for name in (f"{PLAIN} + {activation}", PLAIN)
    )
    return max(0.0, with_it - plain)


def header(rows: Sequence[Row]) -> str:
    """The text of csrc/plan/instructions.h."""
    table = {key_of(row): row for row in rows}
    lines = [
        "// Machine instructions that the kernels execute for an element of x. `make count-instructions ARGS=--update`",
        "// makes this file, of benchmarks/results/instructions.json. Every pair is for half types and for float32.",
        "#pragma once",
        "",
        "// clang-format off",
        '#include "core/activation.h"',
        "",
        "namespace fastnorm {",
        "",
        "// A fused launch that keeps x in registers, or in shared memory; the pass of split that takes sums; the pass",
        "// that writes. 0 where there is no such kernel. `piece`: what each thread of a fused launch executes for a",
        "// piece, beside its elements.",
        "struct ElementWork {",
        "  double registers, shared, reduce, apply, piece;",
        "};",
        "",
        "// [forward, backward][rows, rows whose weights change with every element, columns, positions], packs of 16",
        "// bytes, no activation.",
        "constexpr ElementWork kElementWork[2][4][2] = {",
    ]
    for direction in DIRECTIONS:
        pairs = [braces(*(work(table, walk, dtype, direction) for dtype in HALF_AND_FULL)) for walk in WALKS]
        pairs.append(braces(*(positions_work(table, dtype, direction) for dtype in HALF_AND_FULL)))
        lines.append("    {" + ",\n     ".join(pairs) + "},")
    lines += [
        "};",
        "",
        "// Times so much with narrower packs: [forward, backward], of 8 bytes in rows, single elements in rows and in",
        "// columns; of 8 bytes and single elements of positions.",
        "constexpr double kNarrowPacks[2][2][5] = {",
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
