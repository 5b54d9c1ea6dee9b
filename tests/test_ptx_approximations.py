"""The interpreter of tests/ptx: approximate instructions against the errors that the PTX manual promises."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable

import pytest

from tests.common.float_formats import BF16, F16, F64, Format, flush, samples
from tests.common.ptx_programs import check_table, execute

pytestmark = pytest.mark.interpreter

INF, NINF, NAN, CANONICAL = 0x7F800000, 0xFF800000, 0x7FC01234, 0x7FFFFFFF
ONE, MINUS, ZERO, NZERO = 0x3F800000, 0xBF800000, 0, 0x80000000
TINY, NTINY = 0x00000001, 0x80000001
L_ONE, L_INF, L_NAN = 0x3FF << 52, 0x7FF << 52, 0x7FFFFFFF << 32


def number(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def bits_of(v: float) -> int:
    return struct.unpack("<I", struct.pack("<f", v))[0]


def ulp(v: float) -> float:
    return 2.0 ** (max(math.frexp(v)[1] - 1, -126) - 23)


def spread(low: float, high: float, count: int = 500) -> list[int]:
    generator = random.Random(f"{low} {high}")
    return [bits_of(generator.uniform(low, high)) for _ in range(count)]


def sizes(low: int, high: int, count: int = 500) -> list[int]:
    generator = random.Random(f"{low} {high}")
    return [
        bits_of(generator.choice((1.0, 1.5, 1 + generator.random())) * 2.0 ** generator.randrange(low, high))
        for _ in range(count)
    ]


# opcode, inputs, exact, the largest error
APPROXIMATE: tuple[tuple[str, list[int], Callable[[float], float], Callable[[float, float], float]], ...] = (
    ("ex2.approx.f32", spread(-126, 127), lambda x: 2.0**x, lambda x, y: 2 * ulp(y)),
    ("ex2.approx.ftz.f32", spread(-126, 127), lambda x: 2.0**x, lambda x, y: 2 * ulp(y)),
    ("rcp.approx.f32", sizes(-125, 125), lambda x: 1 / x, lambda x, y: ulp(y)),
    ("rcp.approx.ftz.f32", sizes(-125, 125), lambda x: 1 / x, lambda x, y: ulp(y)),
    ("rsqrt.approx.f32", sizes(-125, 125), lambda x: 1 / math.sqrt(x), lambda x, y: y * 2.0**-22),
    ("sqrt.approx.f32", sizes(-125, 125), math.sqrt, lambda x, y: y * 2.0**-23),
    ("lg2.approx.f32", sizes(-125, 125), math.log2, lambda x, y: 2.0**-22 * max(abs(y), 0.5 < x < 2)),
    ("lg2.approx.ftz.f32", spread(0.5, 2), math.log2, lambda x, y: 2.0**-22),
    ("tanh.approx.f32", spread(-8, 8), math.tanh, lambda x, y: abs(y) * 2.0**-11),
    ("sin.approx.f32", spread(-3, 3), math.sin, lambda x, y: 2.0**-20.5),
    ("cos.approx.ftz.f32", spread(-3, 3), math.cos, lambda x, y: 2.0**-20.5),
)


@pytest.mark.parametrize(("opcode", "inputs", "exact", "error"), APPROXIMATE, ids=[row[0] for row in APPROXIMATE])
def test_approximations(
    opcode: str, inputs: list[int], exact: Callable[[float], float], error: Callable[[float, float], float]
) -> None:
    """Within the promised error, and not much better: half of it is used at least once. The same every time."""
    rows = [(bits,) for bits in inputs]
    found = execute(opcode, "32 -> 32", rows)
    worst = 0.0
    for (bits,), (result,) in zip(rows, found, strict=True):
        x = number(bits)
        share = abs(number(result) - exact(x)) / error(x, exact(x))
        assert share <= 1.001, (x, number(result), exact(x))
        worst = max(worst, share)
    assert worst > 0.5
    assert execute(opcode, "32 -> 32", rows) == found


@pytest.mark.parametrize("opcode", ["ex2.approx.f32", "ex2.approx.ftz.f32"])
def test_powers_of_two_are_exact(opcode: str) -> None:
    exponents = range(-126, 128)
    found = execute(opcode, "32 -> 32", [(bits_of(float(e)),) for e in exponents])
    assert [number(result) for (result,) in found] == [2.0**e for e in exponents]


@pytest.mark.parametrize("opcode", ["div.approx.f32", "div.approx.ftz.f32", "div.full.f32", "div.full.ftz.f32"])
def test_approximate_division(opcode: str) -> None:
    rows = list(zip(sizes(-40, 40), sizes(-39, 41), strict=True))
    worst = 0.0
    for (a, b), (result,) in zip(rows, execute(opcode, "32 32 -> 32", rows), strict=True):
        exact = number(a) / number(b)
        share = abs(number(result) - exact) / (2 * ulp(exact))
        assert share <= 1.001
        worst = max(worst, share)
    assert worst > 0.5


SPECIAL: tuple[tuple[str, str, tuple[tuple[int, ...], ...]], ...] = (
    ("ex2.approx.f32", "32 -> 32", ((ZERO, ONE), (NZERO, ONE), (INF, INF), (NINF, ZERO), (NAN, CANONICAL))),
    ("ex2.approx.ftz.f32", "32 -> 32", ((TINY, ONE), (bits_of(-130.0), ZERO), (bits_of(200.0), INF))),
    ("rcp.approx.f32", "32 -> 32", ((ZERO, INF), (NZERO, NINF), (INF, ZERO), (NAN, CANONICAL))),
    ("rcp.approx.ftz.f32", "32 -> 32", ((TINY, INF), (NTINY, NINF), (bits_of(1.5 * 2.0**126), ZERO))),
    ("rsqrt.approx.f32", "32 -> 32", ((ZERO, INF), (INF, ZERO), (MINUS, CANONICAL))),
    ("sqrt.approx.f32", "32 -> 32", ((ZERO, ZERO), (NZERO, NZERO), (MINUS, CANONICAL), (INF, INF))),
    ("lg2.approx.f32", "32 -> 32", ((ZERO, NINF), (MINUS, CANONICAL), (INF, INF))),
    ("lg2.approx.ftz.f32", "32 -> 32", ((TINY, NINF),)),
    (
        "rcp.approx.ftz.f64",
        "64 -> 64",
        (
            (0, L_INF),
            (1 << 63, L_INF | 1 << 63),
            (L_INF, 0),
            (1 << 51, L_INF),
            (L_INF | 1 << 32, L_NAN),
        ),
    ),
    ("rsqrt.approx.ftz.f64", "64 -> 64", ((0, L_INF), (L_INF, 0), (L_ONE | 1 << 63, L_NAN))),
    ("tanh.approx.f32", "32 -> 32", ((ZERO, ZERO), (NZERO, NZERO), (NAN, CANONICAL))),
    (
        "div.approx.f32",
        "32 32 -> 32",
        ((ONE, ZERO, INF), (ONE, bits_of(1.5 * 2.0**126), ZERO), (INF, bits_of(2.0**127), CANONICAL)),
    ),
)


@pytest.mark.parametrize(("instruction", "signature", "rows"), SPECIAL, ids=[row[0] for row in SPECIAL])
def test_special_values_of_approximations(instruction: str, signature: str, rows: tuple[tuple[int, ...], ...]) -> None:
    check_table(instruction, signature, rows)


@pytest.mark.parametrize(
    ("opcode", "f", "exact", "error"),
    [
        ("ex2.approx.ftz.bf16", BF16, lambda x: 2.0**x, 2.0**-7),
        ("ex2.approx.f16", F16, lambda x: 2.0**x, 2.0**-9.9),
        ("tanh.approx.bf16", BF16, math.tanh, 2.0**-8),
        ("tanh.approx.f16", F16, math.tanh, 2.0**-10.9),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_approximations_of_halves(opcode: str, f: Format, exact: Callable[[float], float], error: float) -> None:
    rows = [(bits,) for bits in samples(f) if abs(f.value(bits)) < 6 and flush(f, bits) & 0x7FFF]
    found = execute(opcode, "16 -> 16", rows)
    packed = execute(opcode + "x2", "32 -> 32", [(bits << 16 | bits,) for (bits,) in rows])
    for (bits,), (result,), (both,) in zip(rows, found, packed, strict=True):
        value = exact(float(f.value(bits)))
        assert abs(float(f.value(result)) - value) <= abs(value) * error * 1.01 + 2.0**-24
        assert both == result << 16 | result


@pytest.mark.parametrize(
    ("opcode", "exact"), [("rcp", lambda x: 1 / x), ("rsqrt", lambda x: x**-0.5)], ids=["rcp", "rsqrt"]
)
def test_approximations_of_doubles(opcode: str, exact: Callable[[float], float]) -> None:
    """From and to the upper 32 bits, to 20 places: the beginning of an iteration."""
    rows = [(bits & ~(1 << 63),) for bits in samples(F64) if 1 << 56 < bits & ~(1 << 63) < 0x7F8 << 52]
    for (bits,), (result,) in zip(rows, execute(f"{opcode}.approx.ftz.f64", "64 -> 64", rows), strict=True):
        x, found = (struct.unpack("<d", struct.pack("<Q", v))[0] for v in (bits & ~0xFFFFFFFF, result))
        assert result & 0xFFFFFFFF == 0
        assert abs(found / exact(x) - 1) <= 2.0**-19
