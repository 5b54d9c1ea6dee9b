"""The interpreter of tests/ptx: floating point against exact arithmetic in fractions, rounded once. Approximations are
in test_ptx_approximations.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest

from tests.common.float_formats import BF16, F16, F32, F64, Format, flush, samples, tuples
from tests.common.ptx_programs import check_table, execute

pytestmark = pytest.mark.interpreter


# ---- correctly rounded arithmetic ----

EXACT: dict[str, Callable[..., Fraction | None]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b if b else None,
    "rcp": lambda a: 1 / a if a else None,
    "fma": lambda a, b, c: a * b + c,
}
OPERANDS = {"rcp": 1, "fma": 3}


def sign_of_zero(name: str, f: Format, operands: tuple[int, ...], mode: str) -> int:
    """Of an exact 0, as IEEE 754 has it."""
    signs = [bits >> (f.width - 1) for bits in operands]
    if name in ("mul", "div", "rcp"):
        return sum(signs) % 2
    product_and_rest = (
        [(signs[0] + signs[1]) % 2, signs[2]] if name == "fma" else [signs[0], signs[1] ^ (name == "sub")]
    )
    return product_and_rest[0] if product_and_rest[0] == product_and_rest[1] else int(mode == "rm")


def check_exact(name: str, f: Format, mode: str, flushes: bool = False, packed: bool = False) -> None:
    rows = [
        row
        for row in tuples(f, OPERANDS.get(name, 2))
        if EXACT[name](*(f.value(flush(f, bits) if flushes else bits) for bits in row)) is not None
    ]
    opcode = f"{name}.{mode}{'.ftz' * flushes}.{f.name}{'x2' * packed}"
    if packed:
        pairs = list(zip(rows[::2], rows[1::2], strict=False))
        both = [tuple(high << 16 | low for low, high in zip(*pair, strict=True)) for pair in pairs]
        results = execute(opcode, " ".join(["32"] * len(rows[0])) + " -> 32", both)
        rows = [row for pair in pairs for row in pair]
        found = [half for (r,) in results for half in (r & 0xFFFF, r >> 16)]
    else:
        found = [r for (r,) in execute(opcode, " ".join([str(f.width)] * len(rows[0])) + f" -> {f.width}", rows)]
    for row, result in zip(rows, found, strict=True):
        used = tuple(flush(f, bits) for bits in row) if flushes else row
        exact = EXACT[name](*map(f.value, used))
        assert exact is not None
        expected = f.rounded(exact, mode, sign_of_zero(name, f, used, mode))
        if flushes:
            expected = flush(f, expected)
        assert result == expected, (opcode, [hex(bits) for bits in row], hex(result), hex(expected))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("f", [F32, F64], ids=lambda f: f.name)
def test_rounded_once(f: Format, name: str, mode: str) -> None:
    check_exact(name, f, mode)


@pytest.mark.parametrize("name", EXACT)
def test_subnormal_numbers_are_flushed(name: str) -> None:
    check_exact(name, F32, "rn", flushes=True)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("f", [BF16, F16], ids=lambda f: f.name)
def test_halves(f: Format, name: str, packed: bool) -> None:
    check_exact(name, f, "rn", packed=packed)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("f", [F32, F64], ids=lambda f: f.name)
def test_square_roots(f: Format, mode: str) -> None:
    rows = [(bits & ~(1 << (f.width - 1)),) for bits in samples(f)]
    found = execute(f"sqrt.{mode}.{f.name}", f"{f.width} -> {f.width}", rows)
    for (bits,), (result,) in zip(rows, found, strict=True):
        square = f.value(bits)
        if square == 0:
            assert result == 0
            continue
        # A root from more bits than count, with a sticky one below them.
        scaled = square * Fraction(4) ** 600
        root = math.isqrt(math.floor(scaled))
        exact = (root + Fraction(root * root != scaled, 2)) / Fraction(2) ** 600
        assert result == f.rounded(exact, mode), hex(bits)


# ---- values that no fraction is ----

INF, NINF, NAN = 0x7F800000, 0xFF800000, 0x7FC01234
CANONICAL = 0x7FFFFFFF
ONE, TWO, HALF, MINUS = 0x3F800000, 0x40000000, 0x3F000000, 0xBF800000
ZERO, NZERO = 0, 0x80000000
TINY, NTINY = 0x00000001, 0x80000001
L_INF, L_NAN = 0x7FF << 52, 0x7FF8 << 48 | 5
L_ONE, L_TWO = 0x3FF << 52, 1 << 62

TABLE: tuple[tuple[str, str, tuple[tuple[int, ...], ...]], ...] = (
    ("add.f32", "32 32 -> 32", ((INF, NINF, CANONICAL), (NAN, ONE, CANONICAL), (ONE, NAN, CANONICAL), (INF, ONE, INF))),
    ("mul.f32", "32 32 -> 32", ((INF, ZERO, CANONICAL), (NAN, ONE, CANONICAL))),
    ("fma.rn.f32", "32 32 32 -> 32", ((INF, ONE, NINF, CANONICAL), (ONE, ONE, NAN, CANONICAL))),
    ("div.rn.f32", "32 32 -> 32", ((ONE, ZERO, INF), (ONE, NZERO, NINF), (ZERO, ZERO, CANONICAL), (ONE, INF, ZERO))),
    ("rcp.rn.f32", "32 -> 32", ((ZERO, INF), (NZERO, NINF), (NINF, NZERO))),
    ("sqrt.rn.f32", "32 -> 32", ((MINUS, CANONICAL), (NZERO, NZERO), (INF, INF))),
    ("add.sat.f32", "32 32 -> 32", ((ONE, ONE, ONE), (MINUS, ZERO, ZERO), (NAN, ONE, ZERO), (HALF, ZERO, HALF))),
    ("fma.rn.sat.f32", "32 32 32 -> 32", ((TWO, TWO, ZERO, ONE), (TWO, MINUS, ZERO, ZERO))),
    ("fma.rn.ftz.sat.f32", "32 32 32 -> 32", ((TINY, TWO, ZERO, ZERO), (HALF, ONE, ZERO, HALF))),
    (
        "min.f32",
        "32 32 -> 32",
        ((ONE, TWO, ONE), (NAN, TWO, TWO), (ONE, NAN, ONE), (ZERO, NZERO, NZERO), (NZERO, ZERO, NZERO)),
    ),
    (
        "max.f32",
        "32 32 -> 32",
        ((ONE, TWO, TWO), (NAN, TWO, TWO), (NAN, NAN, CANONICAL), (ZERO, NZERO, ZERO), (NZERO, ZERO, ZERO)),
    ),
    ("min.NaN.f32", "32 32 -> 32", ((ONE, TWO, ONE), (NAN, TWO, CANONICAL), (ONE, NAN, CANONICAL))),
    (
        "max.NaN.f32",
        "32 32 -> 32",
        ((ONE, TWO, TWO), (NAN, TWO, CANONICAL), (ONE, NAN, CANONICAL), (NINF, MINUS, MINUS)),
    ),
    ("max.ftz.f32", "32 32 -> 32", ((TINY, NINF, ZERO),)),
    ("min.f64", "64 64 -> 64", ((L_ONE, L_TWO, L_ONE), (L_NAN, L_TWO, L_TWO))),
    ("max.f64", "64 64 -> 64", ((L_ONE, L_TWO, L_TWO), (L_ONE, L_NAN, L_ONE))),
    ("neg.f32", "32 -> 32", ((ONE, MINUS), (NAN, NAN | 1 << 31), (ZERO, NZERO))),
    ("neg.ftz.f32", "32 -> 32", ((TINY, NZERO),)),
    ("abs.f32", "32 -> 32", ((MINUS, ONE), (NZERO, ZERO), (NTINY, TINY))),
    ("abs.ftz.f32", "32 -> 32", ((NTINY, ZERO),)),
    ("neg.f64", "64 -> 64", ((L_ONE, L_ONE | 1 << 63),)),
    ("abs.f64", "64 -> 64", ((L_ONE | 1 << 63, L_ONE),)),
    ("copysign.f32", "32 32 -> 32", ((MINUS, TWO, TWO | 1 << 31), (ONE, MINUS, ONE), (NZERO, NAN, NAN | 1 << 31))),
    ("copysign.f64", "64 64 -> 64", ((1 << 63, L_TWO, L_TWO | 1 << 63),)),
    ("testp.finite.f32", "32 -> p", ((ONE, 1), (INF, 0), (NAN, 0))),
    ("testp.infinite.f32", "32 -> p", ((ONE, 0), (NINF, 1), (NAN, 0))),
    ("testp.notanumber.f64", "64 -> p", ((L_ONE, 0), (L_NAN, 1), (L_INF, 0))),
    ("setp.eq.f32", "32 32 -> p", ((ZERO, NZERO, 1), (NAN, NAN, 0), (ONE, TWO, 0))),
    ("setp.ne.f32", "32 32 -> p", ((ONE, TWO, 1), (NAN, ONE, 0), (ONE, ONE, 0))),
    ("setp.lt.f32", "32 32 -> p", ((MINUS, ONE, 1), (NAN, ONE, 0), (ONE, ONE, 0))),
    ("setp.le.f32", "32 32 -> p", ((ONE, ONE, 1), (ONE, NAN, 0))),
    ("setp.gt.f32", "32 32 -> p", ((ONE, MINUS, 1), (NAN, ONE, 0))),
    ("setp.ge.f32", "32 32 -> p", ((ONE, ONE, 1), (NAN, ONE, 0))),
    ("setp.equ.f32", "32 32 -> p", ((ONE, ONE, 1), (NAN, ONE, 1), (ONE, TWO, 0))),
    ("setp.neu.f32", "32 32 -> p", ((ONE, ONE, 0), (NAN, ONE, 1), (ONE, TWO, 1))),
    ("setp.ltu.f32", "32 32 -> p", ((ONE, TWO, 1), (NAN, ONE, 1), (ONE, ONE, 0))),
    ("setp.leu.f32", "32 32 -> p", ((ONE, ONE, 1), (NAN, ONE, 1), (TWO, ONE, 0))),
    ("setp.gtu.f32", "32 32 -> p", ((TWO, ONE, 1), (NAN, ONE, 1), (ONE, ONE, 0))),
    ("setp.geu.f32", "32 32 -> p", ((ONE, ONE, 1), (NAN, ONE, 1), (ONE, TWO, 0))),
    ("setp.num.f32", "32 32 -> p", ((ONE, ONE, 1), (NAN, ONE, 0))),
    ("setp.nan.f32", "32 32 -> p", ((ONE, ONE, 0), (ONE, NAN, 1))),
    ("setp.gt.ftz.f32", "32 32 -> p", ((TINY, ZERO, 0),)),
    ("setp.gt.f32", "32 32 -> p", ((TINY, ZERO, 1),)),
    ("setp.lt.f64", "64 64 -> p", ((L_ONE, L_TWO, 1), (L_NAN, L_ONE, 0))),
    ("setp.gt.bf16", "16 16 -> p", ((0x4000, 0x3F80, 1), (0x7FFF, 0, 0))),
    ("setp.le.f16", "16 16 -> p", ((0x3C00, 0x3C00, 1), (0x7E00, 0, 0))),
    # halves
    ("neg.bf16", "16 -> 16", ((0x3F80, 0xBF80),)),
    ("abs.f16x2", "32 -> 32", ((0xBC00C000, 0x3C004000),)),
    ("neg.f16x2", "32 -> 32", ((0xBC00C000, 0x3C004000),)),
    ("max.bf16x2", "32 32 -> 32", ((0x3F807FC0, 0x40003F80, 0x40003F80),)),
    ("max.NaN.bf16x2", "32 32 -> 32", ((0x3F807FC0, 0x40003F80, 0x40007FFF),)),
    ("min.f16", "16 16 -> 16", ((0x3C00, 0x4000, 0x3C00), (0x7E00, 0x4000, 0x4000), (0x0000, 0x8000, 0x8000))),
    ("fma.rn.relu.bf16x2", "32 32 32 -> 32", ((0x3F803F80, 0xBF803F80, 0, 0x00003F80),)),
    ("add.sat.f16", "16 16 -> 16", ((0x3C00, 0x3C00, 0x3C00), (0xBC00, 0, 0))),
    ("mul.ftz.f16", "16 16 -> 16", ((0x0001, 0x4000, 0), (0x0400, 0x3800, 0))),
    # conversions
    ("cvt.rzi.s32.f32", "32 -> 32", ((0xC0200000, 0xFFFFFFFE), (NAN, 0), (INF, 0x7FFFFFFF), (NINF, 0x80000000))),
    ("cvt.rni.s32.f32", "32 -> 32", ((0x40200000, 2), (0x40600000, 4), (0xC0200000, 0xFFFFFFFE))),
    ("cvt.rmi.s32.f32", "32 -> 32", ((0xC0200000, 0xFFFFFFFD),)),
    ("cvt.rpi.s32.f32", "32 -> 32", ((0x40200000, 3),)),
    ("cvt.rzi.u32.f32", "32 -> 32", ((MINUS, 0), (0x4F800000, 0xFFFFFFFF), (0x40200000, 2))),
    ("cvt.rzi.s64.f64", "64 -> 64", ((0xC004 << 48, 0xFFFFFFFFFFFFFFFE), (L_NAN, 1 << 63))),
    ("cvt.rzi.s64.f32", "32 -> 64", ((0x5F000000, 0x7FFFFFFFFFFFFFFF), (ONE, 1))),
    ("cvt.rzi.s32.f64", "64 -> 32", ((L_NAN, 0x80000000), (L_TWO, 2))),
    ("cvt.rzi.u16.f32", "32 -> 16", ((0x47800000, 0xFFFF),)),
    ("cvt.rn.f32.s32", "32 -> 32", ((0x01000001, 0x4B800000), (0xFFFFFFFF, MINUS))),
    ("cvt.rp.f32.s32", "32 -> 32", ((0x01000001, 0x4B800001),)),
    ("cvt.rz.f32.s32", "32 -> 32", ((0x01000003, 0x4B800001),)),
    ("cvt.rn.f32.u32", "32 -> 32", ((0xFFFFFFFF, 0x4F800000),)),
    ("cvt.rn.f32.s64", "64 -> 32", ((0xFFFFFFFFFFFFFFFF, MINUS), ((1 << 62) + (1 << 38) + 1, 0x5E800001))),
    ("cvt.rn.f32.u64", "64 -> 32", ((0xFFFFFFFFFFFFFFFF, 0x5F800000),)),
    ("cvt.rn.f64.s64", "64 -> 64", (((1 << 53) + 1, 0x4340 << 48),)),
    ("cvt.rn.f64.u32", "32 -> 64", ((0xFFFFFFFF, 0x41EFFFFFFFE00000),)),
    ("cvt.f64.f32", "32 -> 64", ((ONE, L_ONE), (TINY, 0x36A0 << 48))),
    ("cvt.rn.f32.f64", "64 -> 32", ((L_ONE + (1 << 28), ONE), (L_ONE + (1 << 28) + 1, ONE + 1), (L_NAN, CANONICAL))),
    ("cvt.rz.f32.f64", "64 -> 32", ((L_ONE + (1 << 29) - 1, ONE),)),
    ("cvt.rp.f32.f64", "64 -> 32", ((L_ONE + 1, ONE + 1),)),
    ("cvt.sat.f32.f32", "32 -> 32", ((TWO, ONE), (MINUS, ZERO), (NAN, ZERO), (HALF, HALF))),
    ("cvt.ftz.f32.f32", "32 -> 32", ((TINY, ZERO), (ONE, ONE))),
    ("cvt.rzi.f32.f32", "32 -> 32", ((0xC0200000, 0xC0000000),)),
    ("cvt.rni.f64.f64", "64 -> 64", ((0x4004 << 48, L_TWO),)),
    ("cvt.f32.bf16", "16 -> 32", ((0x3F80, ONE), (0xFF80, NINF))),
    ("cvt.f32.f16", "16 -> 32", ((0x3C00, ONE), (0x0001, 0x33800000), (0x7C00, INF))),
    ("cvt.rn.bf16.f32", "32 -> 16", ((0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (NAN, 0x7FFF), (0x7F7FFFFF, 0x7F80))),
    ("cvt.rz.bf16.f32", "32 -> 16", ((0x3F81FFFF, 0x3F81), (0x7F7FFFFF, 0x7F7F))),
    ("cvt.rn.relu.bf16.f32", "32 -> 16", ((MINUS, 0), (TWO, 0x4000), (NAN, 0x7FFF))),
    ("cvt.rn.f16.f32", "32 -> 16", ((0x477FF000, 0x7C00), (0x477FEFFF, 0x7BFF), (0x33000000, 0), (0x33000001, 1))),
    ("cvt.rn.bf16x2.f32", "32 32 -> 32", ((ONE, TWO, 0x3F804000), (NAN, MINUS, 0x7FFFBF80))),
    ("cvt.rn.f16x2.f32", "32 32 -> 32", ((ONE, TWO, 0x3C004000),)),
    ("cvt.rn.relu.f16x2.f32", "32 32 -> 32", ((ONE, MINUS, 0x3C000000),)),
)


@pytest.mark.parametrize(("instruction", "signature", "rows"), TABLE, ids=[f"{row[0]} ({row[1]})" for row in TABLE])
def test_table(instruction: str, signature: str, rows: tuple[tuple[int, ...], ...]) -> None:
    check_table(instruction, signature, rows)


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("source", [F32, F64], ids=lambda f: f.name)
@pytest.mark.parametrize("f", [BF16, F16], ids=lambda f: f.name)
def test_narrowing(f: Format, source: Format, mode: str) -> None:
    rows = [(bits,) for bits in samples(source, 300)]
    # Numbers whose last places decide.
    step = 1 << (source.mantissa - f.mantissa)
    base = source.bias << source.mantissa
    rows += [(base + k * step // 2 + d,) for k, d in itertools.product(range(20), (-1, 0, 1))]
    for (bits,), (result,) in zip(
        rows, execute(f"cvt.{mode}.{f.name}.{source.name}", f"{source.width} -> 16", rows), strict=True
    ):
        value = source.value(bits)
        assert value is not None
        assert result == f.rounded(value, mode, bits >> (source.width - 1)), hex(bits)
