"""How many machine instructions a PTX instruction becomes, by its opcode.

PTX is what can be counted without a GPU; a GPU executes SASS, which ptxas makes of it. Most PTX instructions become one
SASS instruction. The table has those that do not. tests/test_instructions.py holds it against loops of the kernels in
SASS.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

# The first pattern that matches the beginning of the opcode counts.
WEIGHTS: tuple[tuple[str, float], ...] = (
    # Divisions: a guess by the special function unit, Newton's steps, and a test for operands that need the slow path.
    (r"div\.rn(\.ftz)?\.f32", 10),
    (r"(rcp|sqrt)\.rn(\.ftz)?\.f32", 7),
    (r"div\.(full|approx)(\.ftz)?\.f32", 3),
    (r"(div|sqrt|rcp)\.rn\.f64", 30),
    (r"(div|rem)\.[us]32", 18),
    (r"(div|rem)\.[us]64", 60),
    # Machine registers have 32 bits.
    (r"mul\.lo\.[us]64", 3),
    (r"(add|sub|shl|shr|and|or|min|max)\.[usb]64", 2),
    (r"(setp\.\w+|selp)\.[usb]64", 2),
    # Signs are parts of the operands of other instructions, and half of the selections become predicates of them.
    (r"(neg|abs)\.f32", 0),
    (r"selp\.f32", 0.5),
    # Register allocation removes most moves, and all that only give a number another type: a narrow register is a wide
    # one.
    (r"mov\.b32", 0),
    (r"mov\.", 0.3),
    (r"cvta", 0.3),
    (r"cvt\.[us](64|16)\.[us]32|cvt\.[us]32\.[us](64|16)", 0.3),
    # Parameters are operands of the instructions that use them.
    (r"ld\.param", 0.3),
    # Two values become one packed conversion.
    (r"cvt\.rn\.(bf16|f16)\.f32", 0.5),
)

_WEIGHTS = [(re.compile(pattern), weight) for pattern, weight in WEIGHTS]


@functools.cache
def weight(opcode: str) -> float:
    """The machine instructions of `ld.global.f32` and the like."""
    return next((weight for pattern, weight in _WEIGHTS if pattern.match(opcode)), 1.0)


def weighted(counts: Mapping[str, float]) -> float:
    """The machine instructions of so many instructions of each opcode."""
    return sum(count * weight(opcode) for opcode, count in counts.items())


_DIVISION = re.compile(r"(div|rem|rcp|sqrt)\.")


def divisions(counts: Mapping[str, float]) -> float:
    """Divisions, reciprocals, remainders and roots, precise or not, of integers or not."""
    return sum(count for opcode, count in counts.items() if _DIVISION.match(opcode))
