"""The table of executed instructions: how it is counted, compared and made into the planner's constants. And the
weights of PTX instructions, against loops of the kernels in machine code."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections import Counter

import pytest
import torch

from benchmarks import count_instructions
from benchmarks.instruction_constants import header
from benchmarks.instructions import FAMILIES, Counts, Job, compare, count_job, jobs, key_of
from benchmarks.ptx_loops import match_loops, ptx_kernels, sass_loops
from benchmarks.ptx_weights import divisions, weight, weighted
from tests.common.cuda_tools import cuobjdump
from tests.common.plan_model import DEVICES
from tests.ptx import build

SAVED = json.loads(count_instructions.SAVED.read_text())["rows"]

needs_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="needs nvcc")


# ---- weights ----


def test_weights() -> None:
    """One, but for what becomes more instructions, or none."""
    for opcode in ("fma.rn.f32", "ld.global.v4.u32", "ex2.approx.ftz.f32", "setp.lt.s32", "cvt.f32.bf16", "bra"):
        assert weight(opcode) == 1
    assert weight("neg.f32") == weight("mov.b32") == 0
    assert weight("div.rn.f32") > 3 * weight("div.full.f32") > 3
    assert weight("rem.s64") > weight("div.u32") > weight("mul.lo.s64") > weight("add.s64") > 1 > weight("mov.f32") > 0
    assert weighted({"fma.rn.f32": 3, "add.s64": 2}) == 7
    assert divisions({"div.rn.f32": 1, "rcp.approx.ftz.f32": 2, "sqrt.rn.f32": 4, "rem.u32": 8, "mul.f32": 16}) == 15


PTX = """
.visible .entry twice(
	.param .u64 twice_param_0
)
{
	.reg .pred 	%p<2>;
	ld.param.u64 	%rd1, [twice_param_0];
$L__BB0_1:
	.loc	1 7 3
	ld.global.v4.f32 	{%f1, %f2, %f3, %f4}, [%rd1];
	// begin inline asm
	{  max.NaN.f32 %f5, %f1, %f2;}
	// end inline asm
	@%p1 bra 	$L__BB0_3;
	div.rn.f32 	%f6, %f5, %f3;
$L__BB0_3:
	st.shared.v2.f32 	[%r1], {%f5, %f6};
	setp.lt.s32 	%p1, %r1, %r2;
	@%p1 bra 	$L__BB0_1;
	ret;
}
"""
SASS = """
	code for sm_90
		Function : twice
        /*0000*/                   LDC R1, c[0x0][0x28] ;                   /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;         /* 0x00000a00ff017b82 */
        /*0020*/                   FMNMX.NAN R8, R4, R5, !PT ;
        /*0030*/              @!P0 BRA 0x80 ;
        /*0040*/                   MUFU.RCP R9, R6 ;
        /*0050*/              @!P1 BRA 0x80 ;
        /*0060*/                   MOV R20, 0x80 ;
        /*0070*/                   CALL.REL.NOINC 0x200 ;
        /*0080*/                   STS.64 [R1], R8 ;
        /*0090*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00a0*/                   MUFU.RCP R9, R6 ;
        /*00b0*/                   STS.64 [R1+0x8], R8 ;
        /*00c0*/               @P0 BRA 0x10 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA 0xe0;
"""


def test_loops_are_found_and_matched() -> None:
    """ptxas has unrolled the loop once; the slow path of the division is left out."""
    (loop,) = ptx_kernels(PTX)["twice"]
    signature = (("ld global 16", 1), ("rcp", 1), ("st shared 8", 1))
    assert (loop.signature, loop.repeats, len(loop.opcodes)) == (signature, 1, 7)
    (machine,) = sass_loops(SASS.split("Function : twice")[1])
    assert (machine.signature, machine.repeats) == (signature, 2)
    assert "CALL.REL.NOINC" not in machine.opcodes and len(machine.opcodes) == 10
    (match,) = match_loops(PTX, SASS)
    assert match.kernel == "twice" and match.expected == 16 and match.sass.size == 5
    assert match_loops(PTX, SASS.replace("STS.64", "STS")) == []
    assert match_loops(PTX, SASS.replace("twice", "other")) == []


LARGE_LOOP = 40  # machine instructions


@needs_nvcc
@pytest.mark.parametrize("name", [name for name, dtype in build.kernel_files() if dtype == "BFloat16"])
def test_weights_against_loops_in_machine_code(name: str) -> None:
    """Of the kernels of bfloat16 as they are. A loop's weighted PTX is close to its SASS, or somewhat more: ptxas folds
    negations and some comparisons with the selections that follow, of a mask's bits above all."""
    (ptx,) = build.build_kernels("sm_90", ((name, "BFloat16"),))
    (obj,) = (path for path in build.build_shipped() if path.stem == f"{name}.BFloat16")
    sass = cuobjdump("-sass", str(obj))
    # Loops over elements, which read or write memory; others go over a few partials.
    matches = [
        match
        for match in match_loops(ptx.read_text(), sass)
        if match.sass.size >= LARGE_LOOP and any(name.startswith(("ld", "st")) for name, _ in match.ptx.signature)
    ]
    text = "\n".join(f"{m.expected:.0f} of {m.sass.size:.0f}: {m.kernel} {m.ptx.signature}" for m in matches)
    assert len(matches) >= 6 and len({m.kernel for m in matches}) >= 3, text
    assert all(0.8 < m.ratio < 1.45 for m in matches), text
    assert 0.93 < statistics.median(m.ratio for m in matches) < 1.25, text


# ---- counting ----


def job(pattern: str) -> Job:
    (found,) = (each for each in jobs() if re.fullmatch(pattern, each.name))
    return found


def test_marginal_cost() -> None:
    """What does not grow with the tensor drops out."""
    family = dataclasses.replace(FAMILIES[0], shapes=((2, 4, 3, 3), (5, 4, 3, 3)))

    def count(call: object) -> tuple[dict[str, torch.Tensor], Counts]:
        outputs = call()  # type: ignore[operator]
        n = outputs["y" if "y" in outputs else "dx"].numel()
        return outputs, Counts({"fma.rn.f32": 100 + 2 * n, "div.rn.f32": n, "ret": 7}, 50 + n, 3 * n)

    forward, backward = count_job(Job(family, "bfloat16"), torch.ops.fastnorm, count, DEVICES["H200"])
    assert {**forward, "direction": ""} == {**backward, "direction": "", "line": forward["line"]}
    assert (forward["ptx"], forward["divisions"]) == (3, 1)
    assert (forward["instructions"], forward["shared_accesses"], forward["global_bytes"]) == (12, 1, 3)
    assert (forward["line"], backward["line"]) == (16, 26)
    assert family.line("float32", "backward") == 26 * 1.5


@needs_nvcc
def test_counting_executes_the_kernels() -> None:
    """Small tensors: the bytes of x and y are known, and one fused multiply-add an element is the least."""
    each = job("BatchNorm, frozen channels_last float32")
    small = dataclasses.replace(each, family=dataclasses.replace(each.family, shapes=((1, 256, 4, 4), (2, 256, 4, 4))))
    rows = {row["direction"]: row for row in count_instructions.count_rows(small)}
    assert rows.keys() == {"forward", "backward"}
    for direction, tensors in (("forward", 2), ("backward", 3)):
        row = rows[direction]
        assert 4 * tensors <= row["global_bytes"] < 4 * tensors + 20
        assert 1 < row["ptx"] < 200 and 1 < row["instructions"] < 200


def test_every_job_has_a_name_of_its_own() -> None:
    names = Counter(each.name for each in jobs())
    assert set(names.values()) == {1}
    of_dtype = Counter(each.dtype for each in jobs())
    assert min(of_dtype.values()) >= 9 and set(of_dtype) == {"bfloat16", "float16", "float32"}


# ---- comparing and saving ----

ROW = {"family": "LayerNorm", "layout": "planar", "dtype": "float32", "direction": "forward", "instructions": 20.0,
       "divisions": 0.5, "shared_accesses": 1.0, "global_bytes": 8.0}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "rises", "falls"),
    [
        ({}, [], []),
        ({"instructions": 20.5, "divisions": 0.51}, [], []),
        ({"instructions": 20.7}, ["instructions 20 -> 20.7"], []),
        ({"instructions": 19.5}, [], []),
        ({"instructions": 19.0}, [], ["instructions 20 -> 19"]),
        ({"instructions": 19.0, "divisions": 0.6}, ["divisions 0.5 -> 0.6"], ["instructions 20 -> 19"]),
        ({"global_bytes": 10.0}, ["global_bytes 8 -> 10"], []),
        ({"shared_accesses": 0.0}, [], ["shared_accesses 1 -> 0"]),
        ({"dtype": "bfloat16"}, ["is not in the table"], ["is no longer counted"]),
    ],
    ids=str,
)
def test_a_rise_fails_and_so_does_a_fall(
    changed: dict[str, object], rises: list[str], falls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare([ROW], [ROW | changed])
    for got, wanted in ((found.rises, rises), (found.falls, falls)):
        assert len(got) == len(wanted)
        for sentence, part in zip(got, wanted, strict=True):
            assert part in sentence and sentence.startswith("LayerNorm planar")
    assert count_instructions.verdict(found) == (1 if rises or falls else 0)
    printed = capsys.readouterr().out
    assert all(f"rise: {sentence}" in printed for sentence in found.rises)
    assert all(f"fall: {sentence}" in printed for sentence in found.falls)
    assert ("ARGS=--update" in printed) == bool(rises or falls)


def test_small_numbers_may_rise() -> None:
    assert compare([ROW | {"divisions": 0.001}], [ROW | {"divisions": 0.015}]).rises == []
    assert compare([ROW | {"divisions": 0.0}], [ROW | {"divisions": 0.1}]).rises


def test_the_saved_table_is_whole() -> None:
    keys = [key_of(row) for row in SAVED]
    assert keys == [(*each.key, direction) for each in jobs() for direction in ("forward", "backward")]
    for row in SAVED:
        assert row["instructions"] > 1 and row["global_bytes"] > 2, row


def test_the_planners_constants_are_those_of_the_table() -> None:
    expected = header(SAVED)
    assert count_instructions.CONSTANTS.read_text() == expected, "make count-instructions ARGS=--update"
    with pytest.raises(KeyError):
        header([row for row in SAVED if row["family"] != "BatchNorm 7x7"])


def test_an_update_keeps_the_rows_that_were_not_counted() -> None:
    counted = [dict(row) for row in SAVED if row["family"] == "LayerNorm 8192"]
    for row in counted:
        row["instructions"] = 1.0
    after = count_instructions.merged(SAVED, counted)
    assert len(after) == len(SAVED)
    assert [row["instructions"] == 1.0 for row in after] == [row["family"] == "LayerNorm 8192" for row in SAVED]
