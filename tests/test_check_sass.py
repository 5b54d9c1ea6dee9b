"""What check_sass.py reads out of the compiler's reports, on a short text of each kind."""

from __future__ import annotations

import pytest

from tests.check_sass import Kernel, read_report, read_sass

NAME = "_ZN8fastnorm4cuda10apply_rowsINS_8BFloat16ELi8ELb0EEEvNS0_14ForwardTensorsIT_EENS0_9RowsShapeE"
REPORT = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{NAME}' for 'sm_90'
ptxas info    : Function properties for {NAME}
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 96 registers, used 0 barriers, 528 bytes cmem[0]
"""
SASS = f"""
	code for sm_90
		Function : {NAME}
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                   /* 0x00000a00ff017b82 */
        /*0010*/               @P0 LDG.E.128 R4, desc[UR4][R2.64] ;         /* 0x0000000402047981 */
        /*0020*/              @!P0 STL [R1], R4 ;                           /* 0x0000000401007387 */
        /*0030*/                   STG.E.128 desc[UR4][R2.64], R4 ;         /* 0x0000000402007986 */
"""


def good(**changes: object) -> Kernel:
    fields = {"file": "f", "name": NAME, "registers": 96, "spilled": 0, "stack": 0}
    return Kernel(**{**fields, "instructions": {"LDG.E.128": 2, "STG.E.128": 1}, **changes})  # type: ignore[arg-type]


def test_report_and_code_are_read() -> None:
    kernels = read_report("a.cubin", REPORT)
    read_sass(SASS, kernels)
    (kernel,) = kernels.values()
    assert (kernel.registers, kernel.spilled, kernel.stack, kernel.pack_bytes) == (96, 8, 16, 16)
    assert kernel.instructions == {"LDC": 1, "LDG.E.128": 1, "STL": 1, "STG.E.128": 1}
    assert list(kernel.faults()) == ["spills 8 bytes", "has 1 accesses to local memory"]


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({}, None),
        ({"registers": 129}, "takes 129 registers, expected at most 128"),
        ({"instructions": {"LDG.E": 4, "STG.E.128": 1}}, "loads no 16 bytes at a time"),
        ({"instructions": {"LDG.E.128": 4, "STG.E": 4}}, "stores no 16 bytes at a time"),
        ({"instructions": {"LDG.E.128": 4}, "name": NAME.replace("10apply_rows", "11reduce_rows")}, None),
        ({"instructions": {"LDG.E.U16": 4}, "name": NAME.replace("Li8E", "Li1E")}, None),
    ],
)
def test_faults(changes: dict[str, object], fault: str | None) -> None:
    assert list(good(**changes).faults()) == ([] if fault is None else [fault])
