"""Formats of floating point, and rounding to them, in exact arithmetic."""

from __future__ import annotations

import dataclasses
import math
import random
from fractions import Fraction


@dataclasses.dataclass(frozen=True)
class Format:
    name: str
    width: int
    mantissa: int
    nan: int

    @property
    def bias(self) -> int:
        return (1 << (self.width - 2 - self.mantissa)) - 1

    @property
    def infinity(self) -> int:
        return (2 * self.bias + 1) << self.mantissa

    def value(self, bits: int) -> Fraction | None:
        """None for infinity and NaN."""
        sign, magnitude = bits >> (self.width - 1), bits & ((1 << (self.width - 1)) - 1)
        if magnitude >= self.infinity:
            return None
        exponent, fraction = magnitude >> self.mantissa, magnitude & ((1 << self.mantissa) - 1)
        whole = fraction + ((1 << self.mantissa) if exponent else 0)
        scale = max(exponent, 1) - self.bias - self.mantissa
        return (-1) ** sign * whole * Fraction(2) ** scale

    def rounded(self, v: Fraction, mode: str = "rn", zero: int = 0) -> int:
        """zero: the sign bit of an exact 0."""
        if v == 0:
            return zero << (self.width - 1)
        sign = int(v < 0)
        magnitude = abs(v)
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        exponent -= Fraction(2) ** exponent > magnitude
        exponent = max(exponent, 1 - self.bias)
        units = magnitude / Fraction(2) ** (exponent - self.mantissa)
        whole = math.floor(units)
        rest = units - whole
        away = {"rz": False, "rm": bool(sign), "rp": not sign}.get(mode)
        if away is None:
            whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
        else:
            whole += away and rest > 0
        result = whole * Fraction(2) ** (exponent - self.mantissa)
        if result > self.value(self.infinity - 1):
            to_infinity = away is None or away
            return sign << (self.width - 1) | (self.infinity - (not to_infinity))
        bits = whole if whole < 1 << self.mantissa else whole + ((exponent + self.bias - 1) << self.mantissa)
        return sign << (self.width - 1) | bits


F32, F64 = Format("f32", 32, 23, 0x7FFFFFFF), Format("f64", 64, 52, 0x7FF8 << 48)
BF16, F16 = Format("bf16", 16, 7, 0x7FFF), Format("f16", 16, 10, 0x7FFF)


def samples(f: Format, count: int = 60) -> list[int]:
    """Numbers of all sizes with short and long fractions, subnormal ones, and zeros."""
    generator = random.Random(f.name)
    top = f.width - 1
    special = [0, 1 << top, 1, (1 << f.mantissa) - 1, 1 << f.mantissa, f.infinity - 1, f.bias << f.mantissa]
    near = [
        generator.randrange(1 << f.mantissa) | (f.bias + generator.randrange(-12, 12)) << f.mantissa
        for _ in range(count)
    ]
    anywhere = [generator.randrange(f.infinity) for _ in range(count)]
    return [bits | generator.randrange(2) << top for bits in (*special, *near, *anywhere)]


def flush(f: Format, bits: int) -> int:
    return bits & (1 << (f.width - 1)) if bits & f.infinity == 0 else bits


def tuples(f: Format, operands: int, count: int = 300) -> list[tuple[int, ...]]:
    generator, all_of = random.Random(operands), samples(f)
    return [tuple(generator.choice(all_of) for _ in range(operands)) for _ in range(count)]
