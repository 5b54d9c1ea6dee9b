"""What check_sass.py reads out of the compiler's reports, on a short text of each kind."""

from __future__ import annotations

import pytest

from tests.check_sass import Kernel, read_code, read_resources

NAME = "_ZN8fastnorm4cuda10apply_rowsINS_8BFloat16ELi8ELb0EEEvNS0_14ForwardTensorsIT_EENS0_9RowsShapeE"
PART = """
Fatbin elf code:
================
arch = {arch}
code version = [1,8]
host = linux
compile_size = 64bit
"""
RESOURCES = f"""
Resource usage:
 Common:
  GLOBAL:0
 Function {NAME}:
  REG:REGISTERS STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:624 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = f"""
		Function : {NAME}
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                   /* 0x00000a00ff017b82 */
        /*0010*/               @P0 LDG.E.128 R4, desc[UR4][R2.64] ;         /* 0x0000000402047981 */
        /*0020*/              @!P0 STL [R1], R4 ;                           /* 0x0000000401007387 */
        /*0030*/                   STG.E.128 desc[UR4][R2.64], R4 ;         /* 0x0000000402007986 */
"""


def good(**changes: object) -> Kernel:
    fields = {"file": "f", "arch": "sm_90", "name": NAME, "registers": 96}
    return Kernel(**{**fields, "instructions": {"LDG.E.128": 2, "STG.E.128": 1}, **changes})  # type: ignore[arg-type]


def test_resources_and_code_are_read_by_architecture() -> None:
    first, second = PART.format(arch="sm_90"), PART.format(arch="sm_100")
    text = first + RESOURCES.replace("REGISTERS", "96") + second + RESOURCES.replace("REGISTERS", "90")
    kernels = read_resources("a", text)
    read_code(first + SASS + second + SASS, kernels)
    assert [(kernel.arch, kernel.registers, kernel.pack_bytes) for kernel in kernels] == [
        ("sm_90", 96, 16),
        ("sm_100", 90, 16),
    ]
    for kernel in kernels:
        assert kernel.instructions == {"LDC": 1, "LDG.E.128": 1, "STL": 1, "STG.E.128": 1}
        assert list(kernel.faults()) == ["has 1 accesses to local memory"]


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
