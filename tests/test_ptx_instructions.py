"""The interpreter of tests/ptx: each instruction on integers and bits against a table of operands and results.

Where the table has one row, the operands were chosen so that a likely mistake (a sign, a width, an order of operands)
gives another result. The tables of floating point are in test_ptx_floats.py."""

from __future__ import annotations

import pytest

from tests.common.ptx_programs import check_table, execute, program, run

pytestmark = pytest.mark.interpreter

M1 = 0xFFFFFFFF  # -1 in 32 bits
L1 = 0xFFFFFFFFFFFFFFFF
MIN, MAX = 0x80000000, 0x7FFFFFFF
LMIN = 1 << 63

# instruction, signature, rows of operands and results
TABLE: tuple[tuple[str, str, tuple[tuple[int, ...], ...]], ...] = (
    # arithmetic
    ("add.s32", "32 32 -> 32", ((1, 2, 3), (MAX, 1, MIN), (M1, 1, 0))),
    ("add.u32", "32 32 -> 32", ((M1, 2, 1),)),
    ("add.s64", "64 64 -> 64", ((L1, 2, 1), (M1, 1, 1 << 32))),
    ("add.u64", "64 64 -> 64", ((L1, L1, L1 - 1),)),
    ("add.s16", "16 16 -> 16", ((0x7FFF, 1, 0x8000), (0xFFFF, 2, 1))),
    ("add.u16", "16 16 -> 16", ((0xFFFF, 2, 1),)),
    ("sub.s32", "32 32 -> 32", ((3, 5, M1 - 1), (MIN, 1, MAX))),
    ("sub.s64", "64 64 -> 64", ((3, 5, L1 - 1),)),
    ("mul.lo.s32", "32 32 -> 32", ((M1, 7, M1 - 6), (0x10000, 0x10000, 0))),
    ("mul.lo.u64", "64 64 -> 64", ((1 << 33, 3 << 31, 0), (1 << 20, 5, 5 << 20))),
    ("mul.lo.s64", "64 64 -> 64", ((L1, 9, L1 - 8),)),
    ("mul.lo.s16", "16 16 -> 16", ((300, 300, 90000 & 0xFFFF),)),
    ("mul.hi.u32", "32 32 -> 32", ((M1, M1, 0xFFFFFFFE), (1 << 31, 6, 3))),
    ("mul.hi.s32", "32 32 -> 32", ((M1, M1, 0), (MIN, 2, M1))),
    ("mul.hi.u64", "64 64 -> 64", ((L1, L1, L1 - 1), (1 << 63, 6, 3))),
    ("mul.hi.s64", "64 64 -> 64", ((L1, 5, L1),)),
    ("mul.wide.u32", "32 32 -> 64", ((M1, M1, 0xFFFFFFFE00000001),)),
    ("mul.wide.s32", "32 32 -> 64", ((M1, 3, L1 - 2), (MIN, MIN, 1 << 62))),
    ("mul.wide.u16", "16 16 -> 32", ((0xFFFF, 0xFFFF, 0xFFFE0001),)),
    ("mul.wide.s16", "16 16 -> 32", ((0xFFFF, 3, M1 - 2),)),
    ("mad.lo.s32", "32 32 32 -> 32", ((3, 4, 5, 17), (M1, 2, 1, M1))),
    ("mad.lo.u64", "64 64 64 -> 64", ((1 << 32, 1 << 31, 7, (1 << 63) + 7),)),
    ("mad.hi.u32", "32 32 32 -> 32", ((M1, M1, 3, 1),)),
    ("mad.wide.u32", "32 32 64 -> 64", ((M1, M1, 1 << 33, (0xFFFFFFFE00000001 + (1 << 33)) & L1),)),
    ("mad.wide.s32", "32 32 64 -> 64", ((M1, 3, 1, L1 - 1),)),
    ("mad.wide.s16", "16 16 32 -> 32", ((0xFFFF, 3, 1, M1 - 1),)),
    ("div.s32", "32 32 -> 32", ((M1 - 6, 2, M1 - 2), (7, M1 - 1, M1 - 2), (MIN, M1, MIN), (5, 0, M1))),
    ("div.u32", "32 32 -> 32", ((M1, 2, MAX), (5, 0, M1))),
    ("div.s64", "64 64 -> 64", ((L1 - 6, 2, L1 - 2), (LMIN, L1, LMIN))),
    ("div.u64", "64 64 -> 64", ((L1, 2, L1 >> 1),)),
    ("rem.s32", "32 32 -> 32", ((M1 - 6, 4, M1 - 2), (7, M1 - 3, 3), (MIN, M1, 0), (5, 0, 5))),
    ("rem.u32", "32 32 -> 32", ((M1, 16, 15),)),
    ("rem.s64", "64 64 -> 64", ((L1 - 6, 4, L1 - 2),)),
    ("rem.u64", "64 64 -> 64", ((L1, 16, 15),)),
    ("min.s32", "32 32 -> 32", ((M1, 1, M1),)),
    ("min.u32", "32 32 -> 32", ((M1, 1, 1),)),
    ("max.s32", "32 32 -> 32", ((M1, 1, 1),)),
    ("max.u32", "32 32 -> 32", ((M1, 1, M1),)),
    ("min.s64", "64 64 -> 64", ((L1, 1, L1),)),
    ("max.s64", "64 64 -> 64", ((L1, 1, 1),)),
    ("min.u64", "64 64 -> 64", ((L1, 1, 1),)),
    ("min.s16", "16 16 -> 16", ((0xFFFF, 1, 0xFFFF),)),
    ("max.u16", "16 16 -> 16", ((0xFFFF, 1, 0xFFFF),)),
    ("neg.s32", "32 -> 32", ((1, M1), (MIN, MIN))),
    ("neg.s64", "64 -> 64", ((1, L1),)),
    ("neg.s16", "16 -> 16", ((1, 0xFFFF),)),
    ("abs.s32", "32 -> 32", ((M1, 1), (5, 5), (MIN, MIN))),
    ("abs.s64", "64 -> 64", ((L1, 1),)),
    ("sad.u32", "32 32 32 -> 32", ((3, 10, 100, 107), (M1, 0, 1, 0))),
    ("sad.s32", "32 32 32 -> 32", ((M1, 2, 10, 13),)),
    # bits
    ("and.b32", "32 32 -> 32", ((0xF0F0, 0xFF00, 0xF000),)),
    ("or.b32", "32 32 -> 32", ((0xF0F0, 0xFF00, 0xFFF0),)),
    ("xor.b32", "32 32 -> 32", ((0xF0F0, 0xFF00, 0x0FF0),)),
    ("and.b64", "64 64 -> 64", ((L1 << 8 & L1, 0xFF << 32, 0xFF << 32),)),
    ("or.b64", "64 64 -> 64", ((1 << 63, 1, 1 << 63 | 1),)),
    ("xor.b64", "64 64 -> 64", ((L1, 1, L1 - 1),)),
    ("and.b16", "16 16 -> 16", ((0xF0F0, 0xFF00, 0xF000),)),
    ("or.b16", "16 16 -> 16", ((0xF0F0, 0x0F00, 0xFFF0),)),
    ("not.b32", "32 -> 32", ((0xFFFF0000, 0xFFFF),)),
    ("not.b64", "64 -> 64", ((1, L1 - 1),)),
    ("not.b16", "16 -> 16", ((1, 0xFFFE),)),
    ("cnot.b32", "32 -> 32", ((0, 1), (7, 0))),
    ("and.pred", "p p -> p", ((0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1))),
    ("or.pred", "p p -> p", ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1))),
    ("xor.pred", "p p -> p", ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0))),
    ("not.pred", "p -> p", ((0, 1), (1, 0))),
    ("mov.pred", "p -> p", ((0, 0), (1, 1))),
    ("shl.b32", "32 32 -> 32", ((1, 31, MIN), (1, 32, 0), (3, 300, 0))),
    ("shl.b64", "64 32 -> 64", ((1, 63, LMIN), (1, 64, 0))),
    ("shl.b16", "16 32 -> 16", ((1, 15, 0x8000), (1, 16, 0))),
    ("shr.u32", "32 32 -> 32", ((MIN, 31, 1), (MIN, 32, 0))),
    ("shr.s32", "32 32 -> 32", ((MIN, 31, M1), (MIN, 40, M1), (MAX, 40, 0))),
    ("shr.u64", "64 32 -> 64", ((LMIN, 63, 1), (L1, 64, 0))),
    ("shr.s64", "64 32 -> 64", ((LMIN, 62, L1 - 1), (LMIN, 70, L1))),
    ("shr.s16", "16 32 -> 16", ((0x8000, 3, 0xF000),)),
    ("shr.b32", "32 32 -> 32", ((MIN, 4, MIN >> 4),)),
    ("shf.l.wrap.b32", "32 32 32 -> 32", ((0x12345678, 0x9ABCDEF0, 8, 0xBCDEF012), (1, 2, 32, 2))),
    ("shf.l.clamp.b32", "32 32 32 -> 32", ((0x12345678, 0x9ABCDEF0, 40, 0x12345678),)),
    ("shf.r.wrap.b32", "32 32 32 -> 32", ((0x12345678, 0x9ABCDEF0, 8, 0xF0123456), (1, 2, 32, 1))),
    ("shf.r.clamp.b32", "32 32 32 -> 32", ((0x12345678, 0x9ABCDEF0, 40, 0x9ABCDEF0),)),
    ("bfe.u32", "32 32 32 -> 32", ((0xABCD1234, 8, 12, 0xD12), (M1, 28, 8, 15), (M1, 3, 0, 0), (M1, 40, 4, 0))),
    ("bfe.s32", "32 32 32 -> 32", ((0xABCD1234, 8, 12, 0xFFFFFD12), (MIN, 40, 4, M1), (MIN, 28, 8, M1 << 3 & M1))),
    ("bfe.u64", "64 32 32 -> 64", ((0xABCD << 40, 40, 8, 0xCD), (L1, 0, 64, L1))),
    ("bfe.s64", "64 32 32 -> 64", ((0xABCD << 40, 40, 8, L1 - 0xFF + 0xCD),)),
    (
        "bfi.b32",
        "32 32 32 32 -> 32",
        ((0xFF, 0x12345678, 8, 4, 0x12345F78), (M1, 0, 28, 8, 0xF0000000), (1, 2, 40, 1, 2)),
    ),
    ("bfi.b64", "64 64 32 32 -> 64", ((5, 7, 32, 32, 5 << 32 | 7),)),
    ("bfind.u32", "32 -> 32", ((1, 0), (0x00F0, 7), (0, M1))),
    ("bfind.s32", "32 -> 32", ((M1 - 8, 3), (M1, M1))),
    ("bfind.u64", "64 -> 32", ((1 << 40, 40),)),
    ("popc.b32", "32 -> 32", ((0xF0F1, 9),)),
    ("popc.b64", "64 -> 32", ((L1, 64),)),
    ("clz.b32", "32 -> 32", ((1, 31), (0, 32))),
    ("clz.b64", "64 -> 32", ((1, 63), (0, 64))),
    ("brev.b32", "32 -> 32", ((0x1, MIN), (0x00FF0001, 0x8000FF00))),
    ("brev.b64", "64 -> 64", ((1, LMIN),)),
    ("lop3.b32 {x}, {a}, {b}, {c}, 0xe8", "32 32 32 -> 32", ((0xF0, 0xCC, 0xAA, 0xE8),)),
    ("lop3.b32 {x}, {a}, {b}, {c}, 0x1b", "32 32 32 -> 32", ((0xF0, 0xCC, 0xAA, 0xFFFFFF1B),)),
    ("prmt.b32", "32 32 32 -> 32", ((0x33221100, 0x77665544, 0x7531, 0x77553311), (0x80, 0, 0x8888, M1))),
    ("prmt.b32 {x}, {a}, {b}, 0x5410", "32 32 -> 32", ((0xAAAA1111, 0xBBBB2222, 0x22221111),)),
    ("prmt.b32 {x}, {a}, {b}, 0x7632", "32 32 -> 32", ((0xAAAA1111, 0xBBBB2222, 0xBBBBAAAA),)),
    # comparisons and choices
    ("setp.eq.s32", "32 32 -> p", ((1, 1, 1), (1, 2, 0))),
    ("setp.ne.b32", "32 32 -> p", ((1, 1, 0), (1, 2, 1))),
    ("setp.lt.s32", "32 32 -> p", ((M1, 0, 1), (0, 0, 0), (0, M1, 0))),
    ("setp.lt.u32", "32 32 -> p", ((M1, 0, 0), (0, M1, 1))),
    ("setp.lo.u32", "32 32 -> p", ((0, M1, 1), (1, 1, 0))),
    ("setp.le.s32", "32 32 -> p", ((M1, M1, 1), (1, 0, 0))),
    ("setp.ls.u32", "32 32 -> p", ((M1, M1, 1), (1, 0, 0))),
    ("setp.gt.s32", "32 32 -> p", ((0, M1, 1), (M1, 0, 0), (1, 1, 0))),
    ("setp.gt.u32", "32 32 -> p", ((0, M1, 0), (M1, 0, 1))),
    ("setp.hi.u32", "32 32 -> p", ((M1, 0, 1),)),
    ("setp.ge.s32", "32 32 -> p", ((0, 0, 1), (M1, 0, 0))),
    ("setp.hs.u32", "32 32 -> p", ((M1, 0, 1), (0, 1, 0))),
    ("setp.lt.s64", "64 64 -> p", ((L1, 0, 1), (1 << 32, 1, 0))),
    ("setp.lt.u64", "64 64 -> p", ((L1, 0, 0), (1, 1 << 32, 1))),
    ("setp.eq.s64", "64 64 -> p", ((1 << 40, 0, 0), (7, 7, 1))),
    ("setp.lt.s16", "16 16 -> p", ((0xFFFF, 0, 1),)),
    ("setp.lt.u16", "16 16 -> p", ((0xFFFF, 0, 0),)),
    ("setp.lt.and.s32 {x}, {a}, {b}, {c}", "32 32 p -> p", ((0, 1, 1, 1), (0, 1, 0, 0), (1, 0, 1, 0))),
    ("setp.lt.or.s32 {x}, {a}, {b}, !{c}", "32 32 p -> p", ((0, 1, 1, 1), (1, 0, 0, 1), (1, 0, 1, 0))),
    ("setp.lt.xor.s32 {x}, {a}, {b}, {c}", "32 32 p -> p", ((0, 1, 1, 0), (1, 0, 1, 1))),
    ("setp.lt.s32 {x}|{y}, {a}, {b}", "32 32 -> p p", ((0, 1, 1, 0), (1, 0, 0, 1))),
    ("setp.lt.and.s32 {x}|{y}, {a}, {b}, {c}", "32 32 p -> p p", ((0, 1, 0, 0, 0), (1, 0, 1, 0, 1))),
    ("selp.b32", "32 32 p -> 32", ((5, 6, 1, 5), (5, 6, 0, 6))),
    ("selp.b64", "64 64 p -> 64", ((L1, 6, 1, L1), (L1, 6, 0, 6))),
    ("selp.b16", "16 16 p -> 16", ((5, 6, 1, 5), (5, 6, 0, 6))),
    ("slct.b32.s32", "32 32 32 -> 32", ((5, 6, 0, 5), (5, 6, M1, 6))),
    ("slct.b64.f32", "64 64 32 -> 64", ((5, 6, MIN, 5), (5, 6, 0xBF800000, 6))),
    # moves
    ("mov.b32", "32 -> 32", ((M1, M1),)),
    ("mov.u64", "64 -> 64", ((L1 - 1, L1 - 1),)),
    ("mov.b16", "16 -> 16", ((0xABCD, 0xABCD),)),
    ("mov.b32 {x}, {{{a}, {b}}}", "16 16 -> 32", ((0x1111, 0x2222, 0x22221111), (0xFFFF, 0x8000, 0x8000FFFF))),
    ("mov.b64 {x}, {{{a}, {b}}}", "32 32 -> 64", ((0x11111111, 0x22222222, 0x2222222211111111),)),
    ("mov.b32 {{{x}, {y}}}, {a}", "32 -> 16 16", ((0x22221111, 0x1111, 0x2222),)),
    ("mov.b64 {{{x}, {y}}}, {a}", "64 -> 32 32", ((0x2222222211111111, 0x11111111, 0x22222222),)),
    ("mov.b64 {{_, {x}}}, {a}", "64 -> 32", ((0x2222222211111111, 0x22222222),)),
    ("mov.u32 {x}, -2", " -> 32", ((M1 - 1,),)),
    ("mov.u32 {x}, 0x80000001", " -> 32", ((MIN + 1,),)),
    ("mov.f32 {x}, 0f3F800000", " -> 32", ((0x3F800000,),)),
    ("mov.f64 {x}, 0d3FF0000000000001", " -> 64", ((0x3FF0000000000001,),)),
    ("add.s64 {x}, {a}, -1", "64 -> 64", ((0, L1),)),
    ("add.s32 {x}, {a}, -1", "32 -> 32", ((0, M1),)),
    ("add.s16 {x}, {a}, -1", "16 -> 16", ((0, 0xFFFF),)),
    # conversions of integers
    ("cvt.u32.u64", "64 -> 32", ((0x123456789, 0x23456789),)),
    ("cvt.u64.u32", "32 -> 64", ((M1, M1),)),
    ("cvt.s64.s32", "32 -> 64", ((M1, L1),)),
    ("cvt.s64.s32", "64 -> 64", ((0x1FFFFFFFF, L1),)),
    ("cvt.u64.u16", "16 -> 64", ((0xFFFF, 0xFFFF),)),
    ("cvt.s64.s16", "16 -> 64", ((0xFFFF, L1),)),
    ("cvt.u16.u32", "32 -> 16", ((0x12345, 0x2345),)),
    ("cvt.u16.u64", "64 -> 16", ((0x12345, 0x2345),)),
    ("cvt.u32.u16", "16 -> 32", ((0xFFFF, 0xFFFF),)),
    ("cvt.s32.s16", "16 -> 32", ((0xFFFF, M1),)),
    ("cvt.s32.s8", "32 -> 32", ((0x80, 0xFFFFFF80), (0x17F, 0x7F))),
    ("cvt.u32.u8", "32 -> 32", ((0x180, 0x80),)),
    ("cvt.s16.s8", "16 -> 16", ((0x80, 0xFF80),)),
    ("cvt.u16.u8", "16 -> 16", ((0x180, 0x80),)),
    ("cvt.sat.u8.s32", "32 -> 32", ((M1, 0), (300, 255), (7, 7))),
    ("cvt.sat.s16.s32", "32 -> 32", ((0x12345, 0x7FFF), (MIN, 0xFFFF8000))),
    ("cvt.sat.u32.s32", "32 -> 32", ((M1, 0), (9, 9))),
    ("cvt.sat.s32.u32", "32 -> 32", ((M1, MAX),)),
)


@pytest.mark.parametrize(("instruction", "signature", "rows"), TABLE, ids=[f"{row[0]} ({row[1]})" for row in TABLE])
def test_table(instruction: str, signature: str, rows: tuple[tuple[int, ...], ...]) -> None:
    check_table(instruction, signature, rows)


@pytest.mark.parametrize(
    "instruction",
    [
        *("foo.b32 %r4, %r5", "add.s31 %r4, %r5, %r6", "add.s32.wrong %r4, %r5, %r6", "add.s32 %r4, %r5"),
        *("add.s32 %r4, %r5, %r6, %r7", "add.s32 %d4, %r5, %r6", "add.s32 %r4, %d5, %r6", "mov.u32 %r4, nothing"),
        *(
            "mov.u32 %r4, %clock",
            "ld.global.b32 %r4, %d5",
            "bra nowhere",
            "call f, (%r4)",
            "cp.async.bulk.commit_group",
        ),
        *(
            "setp.lt.s32 %r4, %r5, %r6",
            "selp.b32 %r4, %r5, %r6, %r7",
            "mov.u32 %r99, 0",
            "bar.sync 1, 64",
            "bar.arrive 0",
        ),
        *("max.xorsign.abs.f32 %r4, %r5, %r6", "mad.wide.s64 %d4, %d5, %d6, %d7", "cvt.rn.tf32.f32 %r4, %r5"),
        *(
            "shfl.bfly.b32 %r4, %r5, 1, 31",
            "fence.acq_rel",
            "mbarrier.init.b64 [%r4], 1",
        ),
    ],
)
def test_what_is_not_known_is_an_error(instruction: str) -> None:
    """With the instruction and the kernel in it; where the instruction is reached or not."""
    with pytest.raises(RuntimeError, match=r"in k$") as error:
        run(program(f"ret; {instruction};"))
    assert instruction in str(error.value) or instruction.split()[-1] in str(error.value)


def test_guards() -> None:
    """An instruction happens in the lanes whose predicate is true, and leaves the others as they are."""
    rows = [(3, 7, 0), (3, 7, 1)]
    assert execute("@{c} add.s32 {a}, {a}, {b}; mov.b32 {x}, {a}", "32 32 p -> 32", rows) == [(3,), (10,)]
    assert execute("@!{c} add.s32 {a}, {a}, {b}; mov.b32 {x}, {a}", "32 32 p -> 32", rows) == [(10,), (3,)]
    body = "@{b} setp.eq.s32 {a}, 0, 0; mov.pred {x}, {a}"
    assert execute(body, "p p -> p", [(0, 0), (0, 1), (1, 0)]) == [(0,), (1,), (1,)]
