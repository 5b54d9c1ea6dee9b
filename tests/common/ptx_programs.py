"""Small programs in PTX, written by hand, for the tests of the interpreter in tests/ptx."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch

from tests.ptx import backend

LANES = 32

# Registers by the first letter of their names: predicates; 16, 32 and 64 bits.
REGISTERS = ".reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .b64 %d<32>;"


def program(body: str, parameters: Sequence[str] = (), variables: str = "") -> str:
    """A module of one kernel, k. Its parameters are pointers: %d0, %d1 and so on hold them. %r0 is the thread's index
    in the launch, %r1 the block's, %r2 the block's size, %r3 the thread's index in the block."""
    declared = ", ".join(f".param .u64 {p}" for p in parameters)
    loads = "\n".join(f"ld.param.u64 %d{i}, [{p}];" for i, p in enumerate(parameters))
    return f"""
.version 9.0
.target sm_90
.address_size 64
{variables}
.visible .entry k({declared})
{{
    {REGISTERS}
    {loads}
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.s32 %r0, %r1, %r2, %r3;
    {body}
}}
"""


def run(text: str, *tensors: torch.Tensor, **shape: Any) -> None:
    """Runs k. RuntimeError with what the interpreter finds."""
    interpreter = backend.interpreter()
    interpreter.load_text(text)
    interpreter.run("k", struct.pack(f"<{len(tensors)}Q", *(t.data_ptr() for t in tensors)), memory=tensors, **shape)


# One instruction, lane by lane.

BITS = {"p": 32, "16": 16, "32": 32, "64": 64}
DTYPES = {16: torch.int16, 32: torch.int32, 64: torch.int64}
LETTERS = {"p": "p", "16": "h", "32": "r", "64": "d"}


def signed(bits: int, width: int) -> int:
    bits &= (1 << width) - 1
    return bits - (1 << width) if bits >> (width - 1) else bits


def execute(instruction: str, signature: str, rows: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """What the instruction gives for each row of operands. Operands are bits; signature: their widths and the results',
    such as "32 32 -> 32", p being a predicate. instruction: with {a}, {b}, {c}, {d} for the operands and {x}, {y} for
    the results, or an opcode alone, for a result and the operands after it."""
    inputs, outputs = (side.split() for side in signature.split("->"))
    names = dict(zip("abcde", (f"%{LETTERS[kind]}{10 + i}" for i, kind in enumerate(inputs)), strict=False))
    names |= dict(zip("xy", (f"%{LETTERS[kind]}{8 + i}" for i, kind in enumerate(outputs)), strict=False))
    if "{" not in instruction:
        instruction += " {x}, " + ", ".join("{" + name + "}" for name in "abcde"[: len(inputs)])
    lines = []
    for i, (kind, name) in enumerate(zip(inputs, "abcde", strict=False)):
        register = names[name] if kind != "p" else "%r60"
        lines += [f"mad.wide.u32 %d30, %r0, {BITS[kind] // 8}, %d{i};", f"ld.global.b{BITS[kind]} {register}, [%d30];"]
        lines += [f"setp.ne.b32 {names[name]}, %r60, 0;"] * (kind == "p")
    lines.append(instruction.format(**names) + ";")
    for i, (kind, name) in enumerate(zip(outputs, "xy", strict=False)):
        register = names[name] if kind != "p" else "%r60"
        lines += [f"selp.u32 %r60, 1, 0, {names[name]};"] * (kind == "p")
        lines += [f"mad.wide.u32 %d30, %r0, {BITS[kind] // 8}, %d{len(inputs) + i};"]
        lines += [f"st.global.b{BITS[kind]} [%d30], {register};"]
    # Lanes beyond the last row repeat it.
    count = -(-len(rows) // LANES) * LANES
    columns = list(zip(*rows, *[rows[-1]] * (count - len(rows)), strict=True))
    tensors = [
        torch.tensor([signed(v, BITS[kind]) for v in column], dtype=DTYPES[BITS[kind]])
        for kind, column in zip(inputs, columns, strict=True)
    ]
    results = [torch.zeros(count, dtype=DTYPES[BITS[kind]]) for kind in outputs]
    parameters = [f"operand{i}" for i in range(len(tensors) + len(results))]
    run(program("\n".join(lines), parameters), *tensors, *results, blocks=count // LANES, threads=LANES)
    found = [[v & ((1 << BITS[kind]) - 1) for v in r.tolist()] for kind, r in zip(outputs, results, strict=True)]
    return list(zip(*found, strict=True))[: len(rows)]


def check_table(instruction: str, signature: str, rows: Sequence[Sequence[int]]) -> None:
    """rows: operands, then results."""
    inputs = len(signature.split("->")[0].split())
    found = execute(instruction, signature, [row[:inputs] for row in rows])
    for row, result in zip(rows, found, strict=True):
        assert list(map(hex, result)) == list(map(hex, row[inputs:])), list(map(hex, row))
