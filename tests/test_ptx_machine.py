"""The interpreter of tests/ptx: threads, warps, blocks, clusters and grids; what must work, and what must be found.

Every defect is found under every seed, because nothing here depends on the schedule: a program without it is the twin."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from tests.common.ptx_programs import program, run

pytestmark = pytest.mark.interpreter

SEEDS = range(5)
SHARED = ".extern .shared .align 16 .b8 memory[];"
CLUSTER = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


class Defect(NamedTuple):
    name: str
    body: str
    """With {here} where the twin has `twin`."""
    twin: str
    found: str
    shape: dict[str, Any] = {}  # noqa: RUF012
    defect: str = ""
    """What stands in place of the twin's."""


def blocks(count: int, threads: int = 64, **more: Any) -> dict[str, Any]:
    return {"blocks": count, "threads": threads, "shared_bytes": 1024, **more}


# %r10: the address of the thread's place in shared memory; %r11: of the next thread's, the last one's being the first.
PLACES = """
    mov.u32 %r10, memory;
    mad.lo.u32 %r12, %r3, 4, %r10;
    add.u32 %r11, %r3, 1;
    rem.u32 %r11, %r11, %r2;
    mad.lo.u32 %r11, %r11, 4, %r10;
    mov.u32 %r10, %r12;
"""
# %d10: the address of the thread's place in the first tensor.
GLOBAL = "mad.wide.u32 %d10, %r0, 4, %d0;"
# A barrier of the grid as cooperative groups has it; %d9: its word.
GRID_WORD = """
    mov.u32 %r20, %envreg2; mov.u32 %r21, %envreg1;
    cvt.u64.u32 %d8, %r20; cvt.u64.u32 %d9, %r21; bfi.b64 %d9, %d9, %d8, 32, 32; add.s64 %d9, %d9, 4;
    mov.u32 %r22, %nctaid.x;
    setp.eq.u32 %p8, %r1, 0;
    mov.u32 %r23, -2147483647; sub.s32 %r23, %r23, %r22; selp.b32 %r24, %r23, 1, %p8;
    setp.ne.u32 %p9, %r3, 0;
"""
GRID = """
    {first}
    @%p9 bra $LEAVE{n};
    {arrive}
$SPIN{n}:
    {poll}
    xor.b32 %r27, %r26, %r25; setp.gt.s32 %p10, %r27, -1; @%p10 bra $SPIN{n};
$LEAVE{n}:
    {last}
"""
GRID_PARTS = {
    "n": "0",
    "first": "barrier.sync 0;",
    "arrive": "atom.add.release.gpu.u32 %r25, [%d9], %r24;",
    "poll": "ld.acquire.gpu.u32 %r26, [%d9];",
    "last": "barrier.sync 0;",
}


def grid(**parts: str) -> str:
    return GRID.format(**{**GRID_PARTS, **parts})


# Every block writes its part of a tensor, and reads the next block's after the barrier.
EXCHANGE = (
    GRID_WORD
    + GLOBAL
    + """
    st.global.u32 [%d10], %r0;
    {here}
    add.u32 %r30, %r0, %r2; mul.lo.u32 %r31, %r2, %r22; rem.u32 %r30, %r30, %r31;
    mad.wide.u32 %d11, %r30, 4, %d0;
    ld.global.u32 %r32, [%d11];
    mad.wide.u32 %d12, %r0, 4, %d1;
    st.global.u32 [%d12], %r32;
"""
)
# Every block writes its own shared memory, and reads the next rank's after the barrier.
NEIGHBOUR = (
    PLACES
    + """
    st.shared.u32 [%r10], %r0;
    {here}
    mov.u32 %r20, %cluster_ctarank; add.u32 %r20, %r20, 1; mov.u32 %r21, %cluster_nctarank; rem.u32 %r20, %r20, %r21;
    cvt.u64.u32 %d11, %r10; cvta.shared.u64 %d12, %d11; mapa.u64 %d13, %d12, %r20;
    ld.u32 %r22, [%d13];
    mad.wide.u32 %d10, %r0, 4, %d1; st.global.u32 [%d10], %r22;
"""
)

DEFECTS = (
    # within a block
    Defect("block barrier", PLACES + "st.shared.u32 [%r10], %r3; {here} ld.shared.u32 %r13, [%r11];", "bar.sync 0;", "a race"),
    Defect("write after read", PLACES + "ld.shared.u32 %r13, [%r10]; {here} st.shared.u32 [%r11], %r3;", "bar.sync 0;", "a race"),
    Defect("two writes", PLACES + "st.shared.u32 [%r10], %r3; {here} st.shared.u32 [%r11], %r3;", "bar.sync 0;", "a race"),
    Defect(
        "bytes of a word",
        "mov.u32 %r10, memory; add.u32 %r11, %r10, %r3; mov.b16 %h4, 1; st.shared.u8 [%r11], %h4; {here}"
        "xor.b32 %r12, %r3, 1; add.u32 %r11, %r10, %r12; ld.shared.u8 %h5, [%r11];",
        "bar.sync 0;",
        "a race: 1 bytes read",
    ),
    Defect("warp barrier", PLACES + "st.shared.u32 [%r10], %r3; {here} ld.shared.u32 %r13, [%r11];", "bar.warp.sync -1;",
           "a race", {"threads": 32, "shared_bytes": 256}),
    Defect(
        "a shuffle is no barrier",
        PLACES + "st.shared.u32 [%r10], %r3; {here} ld.shared.u32 %r13, [%r11];",
        "bar.warp.sync -1;",
        "a race",
        {"threads": 32, "shared_bytes": 256},
        "shfl.sync.bfly.b32 %r14, %r3, 1, 31, -1;",
    ),
    Defect(
        "a warp's barrier for a block",
        PLACES + "st.shared.u32 [%r10], %r3; {here} ld.shared.u32 %r13, [%r11];",
        "bar.sync 0;",
        "a race",
        blocks(1),
        "bar.warp.sync -1;",
    ),
    Defect("many readers", PLACES + "mov.u32 %r14, memory; ld.shared.u32 %r13, [%r14]; {here}"
           "setp.eq.u32 %p1, %r3, 5; @%p1 st.shared.u32 [%r14], %r3;", "bar.sync 0;", "a race: 4 bytes written that .* read", blocks(1)),
    Defect("global within a block", GLOBAL + "st.global.u32 [%d10], %r3; {here} xor.b32 %r12, %r0, 33;"
           "mad.wide.u32 %d11, %r12, 4, %d0; ld.global.u32 %r13, [%d11];", "bar.sync 0;", "a race", blocks(2)),
    Defect("divergent barrier", "setp.lt.u32 %p1, %r3, 32; @%p1 bra $A; {here} bra $B; $A: bar.sync 0; $B:", "",
           "divergent barrier|deadlock", blocks(1), "bar.sync 0;"),
    Defect("a barrier of some", "{here} bar.sync 0;", "", "deadlock: of 64 threads 1 have returned and 63 wait for ever",
           blocks(1), "setp.eq.u32 %p1, %r3, 5; @%p1 ret;"),
    # addresses
    Defect("past shared memory", PLACES + "st.shared.u32 [%r10{here}], %r3;", "", "out of bounds: byte 1024 of 1024 bytes", blocks(1), "+964"),
    Defect("before shared memory", PLACES + "ld.shared.u32 %r13, [%r10{here}];", "", "out of bounds: byte -4", blocks(1), "+-4"),
    Defect("misaligned shared", PLACES + "ld.shared.u32 %r13, [%r10{here}];", "", "misaligned: 4 bytes read", blocks(1), "+2"),
    Defect("misaligned vector", "mov.u32 %r10, memory; ld.shared.v4.u32 {{%r13, %r14, %r15, %r16}}, [%r10{here}];", "+16",
           "misaligned: 16 bytes read at an address that is 8 past", blocks(1), "+8"),
    Defect("misaligned global", GLOBAL + "ld.global.u16 %h4, [%d10{here}];", "", "misaligned: 2 bytes", blocks(1), "+1"),
    Defect("null pointer", "mov.u64 %d11, {here}; ld.global.u32 %r13, [%d11];", "%d0", "a null pointer read", blocks(1), "0"),
    Defect("shared taken for global", "mov.u64 %d11, 1040; cvta.shared.u64 %d12, %d11; ld{here}.u32 %r13, [%d12];", "",
           "taken for one of global memory", blocks(1), ".global"),
    # the warp
    Defect("partial shuffle mask", "shfl.sync.bfly.b32 %r13, %r3, 1, 31, {here};", "-1", "not all lanes", blocks(1), "65535"),
    Defect("partial warp", "shfl.sync.bfly.b32 %r13, %r3, 1, 31, -1; {here}", "", "not all lanes", {"threads": 48}, ""),
    Defect("half a warp shuffles", "setp.lt.u32 %p1, %r3, 16; {here} shfl.sync.bfly.b32 %r13, %r3, 1, 31, -1; $A:", "",
           "deadlock|has returned|returned while", {"threads": 32}, "@%p1 bra $A;"),
    Defect("two shuffles at once", "setp.lt.u32 %p1, %r3, 16; {here} shfl.sync.bfly.b32 %r13, %r3, 1, 31, -1; bra $B; $A:"
           "shfl.sync.bfly.b32 %r13, %r3, 1, 31, -1; $B:", "", "divergent", {"threads": 32}, "@%p1 bra $A;"),
    Defect("a trap", "setp.eq.u32 %p1, %r3, {here}; @%p1 trap;", "1000", "a trap, in block 0 thread 7: @%p1 trap", blocks(1), "7"),
    # copies
    Defect("copy not waited for", PLACES + GLOBAL + "cp.async.ca.shared.global [%r10], [%d10], 4; cp.async.commit_group; {here}"
           "ld.shared.u32 %r13, [%r10]; cp.async.wait_all;", "cp.async.wait_group 0;", "an unfinished copy", blocks(1)),
    Defect("copy of a later group", PLACES + GLOBAL + "cp.async.ca.shared.global [%r10], [%d10], 4; cp.async.commit_group;"
           "cp.async.wait_group {here}; ld.shared.u32 %r13, [%r10]; cp.async.wait_all;", "0", "an unfinished copy", blocks(1), "1"),
    Defect("copy without a barrier", PLACES + GLOBAL + "cp.async.ca.shared.global [%r10], [%d10], 4; cp.async.wait_all; {here}"
           "ld.shared.u32 %r13, [%r11];", "bar.sync 0;", "a race", blocks(1)),
    Defect("barrier before the wait", PLACES + GLOBAL + "cp.async.ca.shared.global [%r10], [%d10], 4; {here} ld.shared.u32 %r13, [%r11];"
           "cp.async.wait_all;", "cp.async.wait_all; bar.sync 0;", "an unfinished copy", blocks(1), "bar.sync 0;"),
    Defect("copy over readers", PLACES + GLOBAL + "ld.shared.u32 %r13, [%r11]; {here} cp.async.ca.shared.global [%r10], [%d10], 4;"
           "cp.async.wait_all;", "bar.sync 0;", "a race", blocks(1)),
    Defect("copy under way at the end", PLACES + GLOBAL + "cp.async.ca.shared.global [%r10], [%d10], 4; {here}", "cp.async.wait_all;",
           "returned with unfinished copies", blocks(1)),
    Defect("copy past shared memory", PLACES + GLOBAL + "cp.async.ca.shared.global [%r10{here}], [%d10], 4; cp.async.wait_all;", "",
           "out of bounds", blocks(1), "+1000"),
    Defect("misaligned copy", PLACES + GLOBAL + "cp.async.ca.shared.global [%r10], [%d10{here}], 4; cp.async.wait_all;", "",
           "misaligned", blocks(1), "+2"),
    # clusters
    Defect("cluster barrier", NEIGHBOUR + CLUSTER, CLUSTER, "before the first barrier", blocks(4, cluster=2)),
    Defect("second cluster barrier", NEIGHBOUR.replace("{here}", CLUSTER) + "{here} add.u32 %r22, %r22, 1; st.shared.u32 [%r10], %r22;" + CLUSTER,
           CLUSTER, "a race", blocks(4, cluster=2)),
    Defect("early exit", NEIGHBOUR.replace("{here}", CLUSTER) + "{here}", CLUSTER, "returned while another block|which has returned",
           blocks(4, cluster=2)),
    Defect("relaxed arrive", NEIGHBOUR + CLUSTER, CLUSTER, "a race", blocks(4, cluster=2),
           "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;"),
    Defect("exit by a relaxed arrive", NEIGHBOUR.replace("{here}", CLUSTER) + "barrier.cluster.arrive.relaxed.aligned; {here}",
           "barrier.cluster.wait.aligned;", "returned while another block|which has returned", blocks(4, cluster=2)),
    Defect("one thread stays away", "{here}" + CLUSTER, "", "deadlock", blocks(4, cluster=2), "setp.eq.u32 %p1, %r0, 70; @%p1 ret;"),
    Defect("arrives twice", "{here}" + CLUSTER, "", "arrives at the cluster's barrier twice", blocks(4, cluster=2),
           "barrier.cluster.arrive.aligned;"),
    Defect("waits without arriving", "{here}" + CLUSTER, "", "has not arrived", blocks(4, cluster=2), "barrier.cluster.wait.aligned;"),
    Defect("rank outside", "mov.u64 %d11, 1040; cvta.shared.u64 %d12, %d11; mapa.u64 %d13, %d12, {here};", "1", "mapa to rank 2 of 2",
           blocks(4, cluster=2), "2"),
    # grids
    Defect("grid barrier", EXCHANGE, grid(), "a race", blocks(3, cooperative=True)),
    Defect("grid barrier's first", EXCHANGE, grid(), "a race", blocks(3, cooperative=True), grid(first="")),
    Defect("grid barrier's last", EXCHANGE, grid(), "a race", blocks(3, cooperative=True), grid(last="")),
    Defect("release", EXCHANGE, grid(), "a race", blocks(3, cooperative=True), grid(arrive="atom.add.relaxed.gpu.u32 %r25, [%d9], %r24;")),
    Defect("acquire", EXCHANGE, grid(), "a race", blocks(3, cooperative=True), grid(poll="ld.relaxed.gpu.u32 %r26, [%d9];")),
    Defect("fences for release and acquire", EXCHANGE,
           grid(arrive="fence.acq_rel.gpu; atom.add.relaxed.gpu.u32 %r25, [%d9], %r24;",
                poll="ld.relaxed.gpu.u32 %r26, [%d9];", last="fence.acq_rel.gpu; barrier.sync 0;"),
           "a race", blocks(3, cooperative=True),
           grid(arrive="fence.acq_rel.gpu; atom.add.relaxed.gpu.u32 %r25, [%d9], %r24;", poll="ld.relaxed.gpu.u32 %r26, [%d9];")),
    Defect("blocks of no gang", GLOBAL + "{here} st.global.u32 [%d10], %r0;", "", "a race", blocks(3), "mov.u64 %d10, %d0;"),
    Defect("a read of another block's", GLOBAL + "st.global.u32 [%d10], %r0; ld.global.u32 %r13, [{here}];", "%d10", "a race", blocks(3), "%d0"),
    Defect("an atomic and a write", "red.global.add.u32 [%d0], 1; {here}", "", "a race", blocks(3), "st.global.u32 [%d0], %r0;"),
    Defect("waits for ever", "$A: ld.acquire.gpu.u32 %r13, [%d0]; setp.eq.u32 %p1, %r13, {here}; @%p1 bra $A;", "77", "deadlock",
           blocks(2), "0"),
)  # fmt: skip


def execute(d: Defect, part: str, seed: int) -> None:
    tensors = torch.zeros(1024, dtype=torch.int32), torch.zeros(1024, dtype=torch.int32)
    body = d.body.replace("{here}", part).replace("{{", "{").replace("}}", "}")
    shape = d.shape or blocks(1)
    run(program(body, ("first", "second"), SHARED), *tensors, seed=seed, **shape)


WITHOUT_TWIN = {"partial warp"}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_defects_are_found(defect: Defect) -> None:
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=defect.found):
            execute(defect, defect.defect, seed)


@pytest.mark.parametrize("defect", [d for d in DEFECTS if d.name not in WITHOUT_TWIN], ids=lambda d: d.name)
def test_twins_pass(defect: Defect) -> None:
    for seed in SEEDS:
        execute(defect, defect.twin, seed)


def test_the_machine_goes_on_after_a_defect() -> None:
    defect = DEFECTS[0]
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"a race: 4 bytes .* in block 0 thread \d+: .*, in k"):
            execute(defect, "", 1)
        execute(defect, defect.twin, 1)
