"""Programs in PTX with one mistake each, and their twins without it."""

from __future__ import annotations

import dataclasses
from typing import Any

# %r10: the address of the thread's place in shared memory; %r11: of the next thread's, the last one's being the first.
# %d10: the address of the thread's place in the first tensor.
PLACES = """
    mov.u32 %r12, memory;
    mad.lo.u32 %r10, %r3, 4, %r12;
    add.u32 %r11, %r3, 1;
    rem.u32 %r11, %r11, %r2;
    mad.lo.u32 %r11, %r11, 4, %r12;
    mad.wide.u32 %d10, %r0, 4, %d0;
"""
PUT, PUT_NEXT = "st.shared.u32 [%r10], %r3;", "st.shared.u32 [%r11], %r3;"
GET, GET_NEXT = "ld.shared.u32 %r13, [%r10];", "ld.shared.u32 %r13, [%r11];"
COPY = "cp.async.ca.shared.global [%r10], [%d10], 4; cp.async.commit_group;"
WAIT = "cp.async.wait_all;"
BLOCK, WARP = "bar.sync 0;", "bar.warp.sync -1;"
SHUFFLE = "shfl.sync.bfly.b32 %r13, %r3, 1, 31, -1;"
ARRIVE, CLUSTER_WAIT = "barrier.cluster.arrive.aligned;", "barrier.cluster.wait.aligned;"
ARRIVE_RELAXED = "barrier.cluster.arrive.relaxed.aligned;"
CLUSTER = ARRIVE + CLUSTER_WAIT

# Every block of a cluster writes its own shared memory, and reads the next one's after the barrier.
NEIGHBOUR = """
    st.shared.u32 [%r10], %r0;
    BARRIER
    mov.u32 %r20, %cluster_ctarank; add.u32 %r20, %r20, 1; mov.u32 %r21, %cluster_nctarank; rem.u32 %r20, %r20, %r21;
    cvt.u64.u32 %d11, %r10; cvta.shared.u64 %d12, %d11; mapa.u64 %d13, %d12, %r20;
    ld.u32 %r22, [%d13];
    mad.wide.u32 %d14, %r0, 4, %d1; st.global.u32 [%d14], %r22;
"""
ZERO_FILLED = COPY.replace("[%d10], 4;", "[%d10], 4, %r20;").replace("cp.async.ca", "mov.u32 %r20, 2; cp.async.ca")
OVER_SOURCE = "st.global.u32 [%d10], %r3;"
# The next thread of the block.
OVER_NEIGHBOUR = """add.u32 %r15, %r3, 1; rem.u32 %r15, %r15, %r2;
    mad.wide.u32 %d11, %r15, 4, %d0; st.global.u32 [%d11], %r3;"""
ONE_WARP, ONE_THREAD, PLAIN = {"threads": 32}, {"threads": 1}, {"blocks": 3}
IN_CLUSTER = {"blocks": 4, "cluster": 2}


@dataclasses.dataclass(frozen=True)
class Defect:
    name: str
    body: str
    """With HERE in the place of the mistake."""
    found: str
    """What the interpreter says, a regular expression."""
    twin: str | None = ""
    """What stands HERE where there is no mistake; None where the mistake is in the shape of the launch."""
    mistake: str = ""
    shape: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def launch(self) -> dict[str, Any]:
        return {"threads": 64, "shared_bytes": 1024, **self.shape}


RACE, COPYING, SOURCE = "a race", "an unfinished copy: its memory", "an unfinished copy: its source is written"
LEFT = "returned while another block|which has returned"

WITHIN_A_BLOCK = (
    Defect("block barrier", PUT + "HERE" + GET_NEXT, RACE, BLOCK),
    Defect("write after read", GET + "HERE" + PUT_NEXT, RACE, BLOCK),
    Defect("two writes", PUT + "HERE" + PUT_NEXT, RACE, BLOCK),
    Defect("a warp's barrier for a block", PUT + "HERE" + GET_NEXT, RACE, BLOCK, WARP),
    Defect("warp barrier", PUT + "HERE" + GET_NEXT, RACE, WARP, "", ONE_WARP),
    Defect("a shuffle is no barrier", PUT + "HERE" + GET_NEXT, RACE, WARP, SHUFFLE, ONE_WARP),
    Defect(
        "bytes of a word",
        """add.u32 %r15, %r12, %r3; mov.b16 %h4, 1; st.shared.u8 [%r15], %h4;
        HERE
        xor.b32 %r14, %r3, 1; add.u32 %r15, %r12, %r14; ld.shared.u8 %h5, [%r15];""",
        "a race: 1 bytes read",
        BLOCK,
    ),
    Defect(
        "many readers",
        "ld.shared.u32 %r13, [%r12]; HERE setp.eq.u32 %p1, %r3, 5; @%p1 st.shared.u32 [%r12], %r3;",
        "a race: 4 bytes written that .* read",
        BLOCK,
    ),
    Defect(
        "global memory",
        """st.global.u32 [%d10], %r3;
        HERE
        xor.b32 %r15, %r0, 33; mad.wide.u32 %d11, %r15, 4, %d0; ld.global.u32 %r13, [%d11];""",
        RACE,
        BLOCK,
        "",
        {"blocks": 2},
    ),
    Defect(
        "divergent barrier",
        "setp.lt.u32 %p1, %r3, 32; HERE bar.sync 0; bra $B; $A: bar.sync 0; $B:",
        "divergent barrier: .* waits at another",
        "",
        "@%p1 bra $A;",
    ),
    Defect(
        "a barrier of some",
        "setp.eq.u32 %p1, %r3, 5; HERE bar.sync 0;",
        "deadlock: of 64 threads 1 have returned and 63 wait for ever",
        "",
        "@%p1 ret;",
    ),
)

ADDRESSES = (
    Defect("past shared memory", "st.shared.u32 [%r10HERE], %r3;", "out of bounds: byte 1[0-9]+ of 1024", "", "+964"),
    Defect("before shared memory", "ld.shared.u32 %r13, [%r12HERE];", "out of bounds: byte -4 of", "", "+-4"),
    Defect("misaligned in shared memory", "ld.shared.u32 %r13, [%r10HERE];", "misaligned: 4 bytes read", "", "+2"),
    Defect(
        "misaligned vector",
        "ld.shared.v4.u32 {%r13, %r14, %r15, %r16}, [%r12HERE];",
        "misaligned: 16 bytes read at an address that is 8 past",
        "+16",
        "+8",
    ),
    Defect("misaligned in global memory", "ld.global.u16 %h4, [%d10HERE];", "misaligned: 2 bytes read", "", "+1"),
    Defect("null pointer", "mov.u64 %d11, HERE; ld.global.u32 %r13, [%d11];", "a null pointer read", "%d0", "0"),
    Defect(
        "past a tensor",
        "st.global.u32 [%d0HERE], %r3;",
        "written outside .*, 0 bytes past",
        "+4092",
        "+4096",
        ONE_THREAD,
    ),
    Defect("before a tensor", "ld.global.u16 %h4, [%d0HERE];", "2 bytes read outside .*, 2 bytes before", "", "+-2"),
    Defect("half past a tensor", "ld.global.u64 %d12, [%d0HERE];", "8 bytes read outside", "+4088", "+4096"),
    Defect("an atomic past a tensor", "red.global.add.u32 [%d0HERE], 1;", "4 bytes written outside", "", "+4096"),
    Defect(
        "far from all tensors",
        "mov.u64 %d11, HERE; ld.global.u32 %r13, [%d11];",
        "bytes past",
        "%d0",
        "81985529216486896",
    ),
    Defect(
        "shared taken for global",
        "cvt.u64.u32 %d11, %r12; cvta.shared.u64 %d12, %d11; ldHERE.u32 %r13, [%d12];",
        "taken for one of global memory",
        "",
        ".global",
    ),
)

OF_A_WARP = (
    Defect("partial mask", "shfl.sync.bfly.b32 %r13, %r3, 1, 31, HERE;", "not all lanes", "-1", "65535"),
    Defect("partial warp", SHUFFLE, "not all lanes", None, "", {"threads": 48}),
    Defect(
        "half of it shuffles",
        f"setp.lt.u32 %p1, %r3, 16; HERE {SHUFFLE} $A:",
        "deadlock|has returned|returned while",
        "",
        "@%p1 bra $A;",
        ONE_WARP,
    ),
    Defect(
        "two shuffles at once",
        f"setp.lt.u32 %p1, %r3, 16; HERE {SHUFFLE} bra $B; $A: {SHUFFLE} $B:",
        "divergent: .* waits at shfl",
        "",
        "@%p1 bra $A;",
        ONE_WARP,
    ),
    Defect("a trap", "setp.eq.u32 %p1, %r3, HERE; @%p1 trap;", "a trap, in block 0 thread 7: @%p1 trap", "99", "7"),
)

COPIES = (
    Defect("not waited for", COPY + "HERE" + GET + WAIT, COPYING, "cp.async.wait_group 0;"),
    Defect("of a later group", COPY + "cp.async.wait_group HERE;" + GET + WAIT, COPYING, "0", "1"),
    Defect("without a barrier", COPY + WAIT + "HERE" + GET_NEXT, RACE, BLOCK),
    Defect("barrier before the wait", COPY + "HERE" + GET_NEXT + WAIT, COPYING, WAIT + BLOCK, BLOCK),
    Defect("over readers", GET_NEXT + "HERE" + COPY + WAIT, RACE, BLOCK),
    Defect("under way at the end", COPY + "HERE", "returned with unfinished copies", WAIT),
    Defect(
        "past shared memory",
        "cp.async.ca.shared.global [%r10HERE], [%d10], 4; cp.async.wait_all;",
        "out of bounds",
        "",
        "+1000",
    ),
    Defect(
        "misaligned",
        "cp.async.ca.shared.global [%r10], [%d10HERE], 4; cp.async.wait_all;",
        "misaligned: 4 bytes read",
        "",
        "+2",
    ),
    Defect("over its source", COPY + "HERE" + OVER_SOURCE + WAIT, SOURCE, WAIT),
    Defect("over a neighbour's source", COPY + "HERE" + OVER_NEIGHBOUR + WAIT, SOURCE, WAIT + BLOCK, BLOCK),
    Defect("over a source, no barrier", COPY + WAIT + "HERE" + OVER_NEIGHBOUR, RACE, BLOCK),
    Defect("over a source of a part", ZERO_FILLED + "HERE" + OVER_SOURCE + WAIT, SOURCE, WAIT),
    Defect("over a neighbour's of a part", ZERO_FILLED + "HERE" + OVER_NEIGHBOUR + WAIT, SOURCE, WAIT + BLOCK, BLOCK),
    Defect("a part that is just written", OVER_NEIGHBOUR + "HERE" + ZERO_FILLED + WAIT, RACE, BLOCK),
    Defect("past a tensor", COPY.replace("[%d10]", "[%d0HERE]") + WAIT, "4 bytes read outside", "+4092", "+4096"),
    Defect(
        "a part past a tensor",
        "mov.u32 %r20, HERE; cp.async.ca.shared.global [%r10], [%d0+4096], 4, %r20;" + WAIT,
        "1 bytes read outside",
        "0",
        "1",
    ),
    Defect("bytes that there are not", "cp.async.ca.shared.global [%r10], [%d10], HERE;" + WAIT, "a copy of", "4", "3"),
)

MET = NEIGHBOUR.replace("BARRIER", CLUSTER)
CLUSTERS = (
    Defect(
        "first barrier", NEIGHBOUR.replace("BARRIER", "HERE") + CLUSTER, "before the first", CLUSTER, "", IN_CLUSTER
    ),
    Defect("second barrier", MET + "HERE" + PUT + CLUSTER, RACE, CLUSTER, "", IN_CLUSTER),
    Defect("early exit", MET + "HERE", LEFT, CLUSTER, "", IN_CLUSTER),
    Defect(
        "relaxed arrive",
        NEIGHBOUR.replace("BARRIER", "HERE" + CLUSTER_WAIT) + CLUSTER,
        RACE,
        ARRIVE,
        ARRIVE_RELAXED,
        IN_CLUSTER,
    ),
    Defect("relaxed arrive before the end", MET + ARRIVE_RELAXED + "HERE", LEFT, CLUSTER_WAIT, "", IN_CLUSTER),
    Defect(
        "one thread stays away", "setp.eq.u32 %p1, %r0, 70; HERE" + CLUSTER, "deadlock", "", "@%p1 ret;", IN_CLUSTER
    ),
    Defect("arrives twice", "HERE" + CLUSTER, "arrives at the cluster's barrier twice", "", ARRIVE, IN_CLUSTER),
    Defect("waits without arriving", "HERE" + CLUSTER, "has not arrived", "", CLUSTER_WAIT, IN_CLUSTER),
    Defect(
        "rank outside",
        "cvt.u64.u32 %d11, %r12; cvta.shared.u64 %d12, %d11; mapa.u64 %d13, %d12, HERE;",
        "mapa to rank 2 of 2",
        "1",
        "2",
        IN_CLUSTER,
    ),
)


def named(**kinds: tuple[Defect, ...]) -> dict[str, Defect]:
    return {f"{kind}: {defect.name}": defect for kind, defects in kinds.items() for defect in defects}


ALL = named(block=WITHIN_A_BLOCK, address=ADDRESSES, warp=OF_A_WARP, copy=COPIES, cluster=CLUSTERS)
