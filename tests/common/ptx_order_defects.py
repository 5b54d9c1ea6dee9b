"""Programs in PTX with one mistake each in the order of accesses to global memory, and their twins without it."""

from __future__ import annotations

from tests.common.ptx_defects import BLOCK, IN_CLUSTER, ONE_THREAD, PLAIN, RACE, WARP, Defect, named

IN_GRID = {"blocks": 3, "cooperative": True}
SCOPE, NO_CONSTANT = "a race: .*, and the scope of one", "no constant: 4 bytes"

# What a barrier of the grid needs, whose word is at %d9. %d11: the place in the first tensor of the thread in the next
# block.
FOR_GRID = """
    mov.u32 %r20, %envreg2; mov.u32 %r21, %envreg1; mov.b64 %d9, {%r20, %r21}; add.s64 %d9, %d9, 4;
    mov.u32 %r22, %nctaid.x;
    setp.eq.u32 %p8, %r1, 0;
    mov.u32 %r23, -2147483647; sub.s32 %r23, %r23, %r22; selp.b32 %r24, %r23, 1, %p8;
    setp.ne.u32 %p9, %r3, 0;
    add.u32 %r30, %r0, %r2; mul.lo.u32 %r31, %r2, %r22; rem.u32 %r30, %r30, %r31;
    mad.wide.u32 %d11, %r30, 4, %d0;
"""
# Every block of a grid writes its part of a tensor, and reads the next one's after the barrier.
EXCHANGE = f"""
    {FOR_GRID}
    st.global.u32 [%d10], %r0;
    HERE
    ld.global.u32 %r32, [%d11];
    mad.wide.u32 %d12, %r0, 4, %d1;
    st.global.u32 [%d12], %r32;
"""


def grid(
    first: str = BLOCK,
    arrive: str = "atom.add.release.gpu.u32 %r25, [%d9], %r24;",
    poll: str = "ld.acquire.gpu.u32 %r26, [%d9];",
    last: str = BLOCK,
) -> str:
    """A barrier of the grid, as cooperative groups has it: thread 0 of every block adds to a word and waits for the
    highest bit to turn."""
    return f"""
    {first}
    @%p9 bra $LEAVE;
    {arrive}
$SPIN:
    {poll}
    xor.b32 %r27, %r26, %r25; setp.gt.s32 %p10, %r27, -1; @%p10 bra $SPIN;
$LEAVE:
    {last}
"""


ARRIVE_BY_FENCE = "fence.acq_rel.gpu; atom.add.relaxed.gpu.u32 %r25, [%d9], %r24;"
ADD = "atom.add.u32 %r25, [%d9], %r24;"
POLL_VOLATILE = "ld.volatile.u32 %r26, [%d9];"
POLL_RELAXED = "ld.relaxed.gpu.u32 %r26, [%d9];"

GRIDS = (
    Defect("barrier", EXCHANGE, RACE, grid(), "", IN_GRID),
    Defect("barrier of the block before", EXCHANGE, RACE, grid(), grid(first=""), IN_GRID),
    Defect("barrier of the block after", EXCHANGE, RACE, grid(), grid(last=""), IN_GRID),
    Defect(
        "release",
        EXCHANGE,
        RACE,
        grid(),
        grid(arrive="atom.add.relaxed.gpu.u32 %r25, [%d9], %r24;"),
        IN_GRID,
    ),
    Defect("acquire", EXCHANGE, RACE, grid(), grid(poll=POLL_RELAXED), IN_GRID),
    Defect(
        "fence",
        EXCHANGE,
        RACE,
        grid(BLOCK, ARRIVE_BY_FENCE, POLL_RELAXED, "fence.acq_rel.gpu;" + BLOCK),
        grid(BLOCK, ARRIVE_BY_FENCE, POLL_RELAXED),
        IN_GRID,
    ),
    Defect("two blocks write", "HERE st.global.u32 [%d10], %r0;", RACE, "", "mov.u64 %d10, %d0;", PLAIN),
    Defect(
        "a block reads what another wrote",
        "st.global.u32 [%d10], %r0; ld.global.u32 %r13, [HERE];",
        RACE,
        "%d10",
        "%d0",
        PLAIN,
    ),
    Defect("an atomic and a write", "red.global.add.u32 [%d0], 1; HERE", RACE, "", "st.global.u32 [%d0], %r0;", PLAIN),
    Defect(
        "waits for ever",
        "$A: ld.acquire.gpu.u32 %r13, [%d0]; setp.eq.u32 %p1, %r13, HERE; @%p1 bra $A;",
        "deadlock",
        "77",
        "0",
        PLAIN,
    ),
)

# Block 0 writes a word and tells block 1 by another.
TELL = """
    setp.ne.u32 %p1, %r3, 0; @%p1 bra $END;
    setp.eq.u32 %p2, %r1, 1; @%p2 bra $SPIN;
    st.global.u32 [%d0], 9; st.release.HERE.global.u32 [%d1], 1; bra $END;
$SPIN:
    ld.acquire.HERE.global.u32 %r13, [%d1]; setp.eq.u32 %p3, %r13, 0; @%p3 bra $SPIN;
    ld.global.u32 %r14, [%d0];
$END:
"""
# The first warp of a block tells the second.
TELL_WARP = """
    setp.ge.u32 %p1, %r3, 32; @%p1 bra $SPIN;
    st.shared.u32 [%r10], %r3; bar.warp.sync -1;
    setp.eq.u32 %p2, %r3, 0; @%p2 st.HERE.cta.global.u32 [%d1], 1; bra $END;
$SPIN:
    ld.acquire.cta.global.u32 %r13, [%d1]; setp.eq.u32 %p3, %r13, 0; @%p3 bra $SPIN;
    ld.shared.u32 %r15, [%r10+-128];
$END:
"""
# Threads of block 0 read a word and say so each, or one for its warp; block 1 writes it when it has heard them all.
READERS = """
    setp.eq.u32 %p1, %r1, 1; @%p1 bra $WRITER;
    ld.global.u32 %r13, [%d0];
    setp.ne.u32 %p2, %r3, 32;
    @%p2 red.release.gpu.global.add.u32 [%d1], 1;
    @!%p2 red.HERE.gpu.global.add.u32 [%d1], 1;
    bra $END;
$WRITER:
    setp.ne.u32 %p3, %r3, 0; @%p3 bra $END;
$SPIN:
    ld.acquire.gpu.global.u32 %r13, [%d1]; setp.ne.u32 %p4, %r13, 64; @%p4 bra $SPIN;
    st.global.u32 [%d0], 7;
$END:
"""
WARPS = READERS.replace(
    "setp.ne.u32 %p2,", WARP + "and.b32 %r14, %r3, 31; setp.ne.u32 %p5, %r14, 0; @%p5 bra $END; setp.ne.u32 %p2,", 1
).replace("%r13, 64", "%r13, 2")
# Block 0 reads what block 1 writes.
READ_AND_WRITE = "setp.eq.u32 %p1, %r1, 0; @%p1 READ %r13, [%d0]; @!%p1 WRITE [%d0], %r3;"
STRONG_READ = READ_AND_WRITE.replace("READ", "ld.relaxed.gpu.global.u32").replace("WRITE", "HERE")
STRONG_WRITE = READ_AND_WRITE.replace("READ", "HERE").replace("WRITE", "st.relaxed.gpu.global.u32")
BOTH_STRONG = READ_AND_WRITE.replace("READ", "ld.relaxed.HERE.global.u32").replace("WRITE", "st.relaxed.gpu.global.u32")
STRONG = EXCHANGE.replace("st.global.u32 [%d10], %r0", "ld.relaxed.gpu.global.u32 %r14, [%d10]")
STRONG = STRONG.replace("ld.global.u32 %r32, [%d11]", "st.global.u32 [%d11], %r0")
IN_PAIR, ONE_CLUSTER = {"blocks": 2, "cooperative": True}, {"blocks": 2, "cluster": 2}
LONE_PAIR = {"blocks": 2, **ONE_THREAD}

ORDERS = (
    Defect("a relaxed read and a weak write", STRONG_READ, RACE, "st.relaxed.gpu.global.u32", "st.u32", LONE_PAIR),
    Defect("a weak read and a relaxed write", STRONG_WRITE, RACE, "ld.volatile.global.u32", "ld.u32", LONE_PAIR),
    Defect("a relaxed read before a weak write", STRONG, RACE, grid(), "", IN_GRID),
    Defect("a reader's release", READERS, RACE, "release", "relaxed", IN_PAIR),
    Defect("a warp's release", WARPS, RACE, "release", "relaxed", IN_PAIR),
    Defect("a warp tells another", TELL_WARP, RACE, "release", "relaxed"),
)

SCOPES = (
    Defect("atomics", "atom.relaxed.HERE.global.add.u32 %r13, [%d0], 1;", SCOPE, "gpu", "cta", PLAIN),
    Defect("atomics of clusters", "red.HERE.global.add.u32 [%d0], 1;", SCOPE, "gpu", "cluster", IN_CLUSTER),
    Defect("atomics in a cluster", "red.HERE.global.add.u32 [%d0], 1;", SCOPE, "cluster", "cta", ONE_CLUSTER),
    Defect(
        "atomics of a block",
        "mad.wide.u32 %d11, %r1, 4, %d0; red.cta.global.add.u32 [HERE], 1;",
        SCOPE,
        "%d11",
        "%d0",
        PLAIN,
    ),
    Defect("a relaxed read", BOTH_STRONG, SCOPE, "gpu", "cta", LONE_PAIR),
    Defect("a message to another cluster", TELL, SCOPE, "gpu", "cluster", IN_PAIR),
    Defect("a message in a cluster", TELL, SCOPE, "cluster", "cta", ONE_CLUSTER),
    Defect(
        "barrier of the grid",
        EXCHANGE,
        SCOPE,
        grid(),
        grid(arrive="atom.add.release.cluster.u32 %r25, [%d9], %r24;", poll="ld.acquire.cluster.u32 %r26, [%d9];"),
        IN_GRID,
    ),
    *(
        Defect(
            name,
            EXCHANGE,
            RACE,
            grid(BLOCK, "membar.gl;" + ADD, POLL_VOLATILE, "fence.acq_rel.gpu;" + BLOCK),
            grid(BLOCK, first + ADD, POLL_VOLATILE, last + BLOCK),
            IN_GRID,
        )
        for name, first, last in (
            ("fences of clusters", "fence.acq_rel.cluster;", "fence.acq_rel.cluster;"),
            ("fences of blocks", "membar.cta;", "membar.cta;"),
            ("the first fence", "fence.sc.cluster;", "membar.gl;"),
            ("the second fence", "membar.gl;", "fence.acq_rel.cta;"),
        )
    ),
)

CONSTANTS = (
    Defect("written before", "st.global.u32 [%d10], %r0; ld.globalHERE.u32 %r13, [%d10];", NO_CONSTANT, "", ".nc"),
    Defect("written after", "ld.globalHERE.u32 %r13, [%d10]; st.global.u32 [%d10], %r0;", NO_CONSTANT, "", ".nc"),
    Defect("changed before", "red.global.add.u32 [%d10], 1; ld.globalHERE.u32 %r13, [%d10];", NO_CONSTANT, "", ".nc"),
    Defect(
        "written by another block before",
        EXCHANGE.replace("HERE", grid()).replace("ld.global.u32 %r32", "ld.globalHERE.u32 %r32"),
        NO_CONSTANT,
        "",
        ".nc",
        IN_GRID,
    ),
    Defect(
        "written by another block after",
        f"{FOR_GRID} ld.globalHERE.u32 %r32, [%d10]; {grid()} st.global.u32 [%d11], %r0;",
        NO_CONSTANT,
        "",
        ".nc",
        IN_GRID,
    ),
)

ALL = named(grid=GRIDS, order=ORDERS, scope=SCOPES, constant=CONSTANTS)
