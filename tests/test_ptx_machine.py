"""The interpreter of tests/ptx: threads, warps, blocks, clusters and grids; what must work, and what must be found."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.common import ptx_defects, ptx_order_defects
from tests.common.ptx_defects import ARRIVE, CLUSTER, CLUSTER_WAIT, PLACES, Defect
from tests.common.ptx_programs import program, run
from tests.ptx import backend

pytestmark = pytest.mark.interpreter

SEEDS = range(5)
ORDERS = ("fifo", "lifo", "random", "priority")
ALL = ptx_defects.ALL | ptx_order_defects.ALL
SHARED = ".extern .shared .align 16 .b8 memory[];"


def numbers(count: int = 1024) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


def execute(body: str, *tensors: torch.Tensor, variables: str = SHARED, **shape: object) -> None:
    names = [f"tensor{i}" for i in range(len(tensors))]
    run(program(body, names, variables), *tensors, **shape)


# ---- defects ----


def execute_with(d: Defect, part: str, order: str, seed: int) -> None:
    execute(PLACES + d.body.replace("HERE", part), numbers(), numbers(), order=order, seed=seed, **d.launch)


@pytest.mark.parametrize("name", ALL)
def test_defects_are_found(name: str) -> None:
    """Whatever the schedule: no one is found by luck."""
    defect = ALL[name]
    for order, seed in itertools.product(ORDERS, SEEDS):
        with pytest.raises(RuntimeError, match=defect.found):
            execute_with(defect, defect.mistake, order, seed)


@pytest.mark.parametrize("name", [name for name, defect in ALL.items() if defect.twin is not None])
def test_twins_pass(name: str) -> None:
    defect = ALL[name]
    for order, seed in itertools.product(ORDERS, SEEDS):
        execute_with(defect, defect.twin or "", order, seed)


def test_the_machine_goes_on_after_a_defect() -> None:
    defect = next(iter(ALL.values()))
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"a race: 4 bytes .* in block 0 thread \d+: .*, in k$"):
            execute_with(defect, "", "random", 1)
        execute_with(defect, defect.twin or "", "random", 1)


def test_races_can_be_left_alone() -> None:
    defect = next(iter(ALL.values()))
    execute(PLACES + defect.body.replace("HERE", ""), numbers(), races=False, **defect.launch)


# ---- threads and their indices ----


def test_indices() -> None:
    names = (
        "%tid.x",
        "%ntid.x",
        "%ctaid.x",
        "%nctaid.x",
        "%laneid",
        "%warpid",
        "%cluster_ctarank",
        "%cluster_nctarank",
    )
    names += ("%tid.y", "%ntid.y", "%ctaid.z", "%nctaid.z", "%clusterid.x", "%nclusterid.x", "%lanemask_lt")
    out = numbers(4 * 48 * len(names))
    body = f"mul.lo.u32 %r4, %r0, {4 * len(names)}; cvt.u64.u32 %d1, %r4; add.s64 %d1, %d0, %d1;"
    body += "".join(f"mov.u32 %r5, {name}; st.global.u32 [%d1+{4 * i}], %r5;" for i, name in enumerate(names))
    execute(body, out, blocks=4, threads=48, cluster=2)
    for thread, found in enumerate(out.view(-1, len(names)).tolist()):
        block, t = divmod(thread, 48)
        mask = (1 << t % 32) - 1
        expected = [t, 48, block, 4, t % 32, t // 32, block % 2, 2, 0, 1, 0, 1, block // 2, 2, mask]
        assert found == expected


def test_parameters_of_all_kinds() -> None:
    """They lie aligned as the text says; arrays are addressed by name and by register."""
    out = numbers(8)
    text = """
.visible .entry k(.param .u8 a, .param .u64 p, .param .align 8 .b8 s[12], .param .u32 n) {
    .reg .b16 %h<4>; .reg .b32 %r<8>; .reg .b64 %d<4>;
    ld.param.u64 %d1, [p];
    ld.param.u8 %h1, [a]; cvt.u32.u16 %r1, %h1; st.global.u32 [%d1], %r1;
    ld.param.v2.u32 {%r2, %r3}, [s]; st.global.v2.u32 [%d1+8], {%r2, %r3};
    mov.b64 %d2, s; ld.param.u32 %r4, [%d2+8]; st.global.u32 [%d1+16], %r4;
    ld.param.u32 %r5, [n]; st.global.u32 [%d1+20], %r5;
    ret; }"""
    interpreter = backend.interpreter()
    interpreter.load_text(text)
    fields = [b"\x07" + bytes(7), out.data_ptr().to_bytes(8, "little")]
    fields += [number.to_bytes(4, "little") for number in (11, 12, 13, 14)]
    interpreter.run("k", b"".join(fields), threads=1, memory=[out])
    assert out.tolist() == [7, 0, 11, 12, 13, 14, 0, 0]
    with pytest.raises(RuntimeError, match="parameters of 32 bytes"):
        interpreter.run("k", b"")
    with pytest.raises(RuntimeError, match="no kernel another"):
        interpreter.run("another")


@pytest.mark.parametrize("order", ORDERS)
def test_divergent_branches_meet_again(order: str) -> None:
    """Loops of different length in the lanes of a warp, then a shuffle of all of them."""
    out = numbers(64)
    body = """
    and.b32 %r4, %r3, 7; mov.u32 %r5, 0; setp.eq.u32 %p1, %r4, 0; @%p1 bra $END;
$LOOP:
    add.u32 %r5, %r5, %r4; sub.u32 %r4, %r4, 1; setp.ne.u32 %p1, %r4, 0; @%p1 bra $LOOP;
$END:
    shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1;
    mad.wide.u32 %d1, %r0, 4, %d0; st.global.u32 [%d1], %r6;
    """
    execute(body, out, threads=64, order=order)
    assert out.tolist() == [((t ^ 1) % 8) * ((t ^ 1) % 8 + 1) // 2 for t in range(64)]


def test_indexed_branch() -> None:
    out = numbers(64)
    body = """
    and.b32 %r4, %r3, 3;
    LIST: .branchtargets $A, $B, $C, $A;
    brx.idx %r4, LIST;
$A: mov.u32 %r5, 10; bra $END;
$B: mov.u32 %r5, 20; bra $END;
$C: mov.u32 %r5, 30;
$END: mad.wide.u32 %d1, %r0, 4, %d0; st.global.u32 [%d1], %r5;
    """
    execute(body, out, threads=64)
    assert out.tolist() == [10, 20, 30, 10] * 16


def test_scopes_local_memory_and_variables() -> None:
    """A name in braces hides the one outside; every thread has local memory of its own; tables have initial values."""
    out = numbers(64)
    variables = SHARED + ".global .align 4 .b8 table[8] = {1, 0, 0, 0, 2, 1}; .const .u32 factor = 5;"
    body = """
    .local .align 4 .b8 own[8];
    .shared .align 4 .b32 fixed[2];
    mov.u32 %r4, 1;
    { .reg .b32 %r<8>; mov.u32 %r4, 100; }
    mov.u64 %d2, own; cvta.local.u64 %d3, %d2; st.local.u32 [%d2], %r3; ld.u32 %r5, [%d3];
    mov.u64 %d4, table; ld.global.u32 %r6, [%d4+4]; ld.const.u32 %r7, [factor];
    add.u32 %r4, %r4, %r5; add.u32 %r4, %r4, %r6; add.u32 %r4, %r4, %r7;
    mov.u32 %r8, fixed; mov.u32 %r9, memory; sub.u32 %r9, %r9, %r8; add.u32 %r4, %r4, %r9;
    mad.wide.u32 %d1, %r0, 4, %d0; st.global.u32 [%d1], %r4;
    """
    execute(body, out, variables=variables, threads=64, shared_bytes=16)
    assert out.tolist() == [1 + t + 258 + 5 + 16 for t in range(64)]


# ---- the lanes of a warp ----

LANES = list(range(32))
SHUFFLES = (
    ("bfly", "5, 31", [lane ^ 5 for lane in LANES], [1] * 32),
    ("bfly", "16, 0x100f", [lane ^ 16 if lane ^ 16 < 16 else lane for lane in LANES], None),
    ("idx", "3, 31", [3] * 32, [1] * 32),
    ("idx", "35, 31", [3] * 32, [1] * 32),
    ("idx", "1, 0x181f", [lane // 8 * 8 + 1 for lane in LANES], [1] * 32),
    ("up", "1, 0", [max(lane - 1, 0) for lane in LANES], [0] + [1] * 31),
    ("up", "2, 0x1800", [lane - 2 if lane % 8 >= 2 else lane for lane in LANES], None),
    ("down", "1, 31", [min(lane + 1, 31) for lane in LANES], [1] * 31 + [0]),
    ("down", "4, 0x181f", [lane + 4 if lane % 8 < 4 else lane for lane in LANES], None),
)


@pytest.mark.parametrize(("mode", "operands", "lanes", "inside"), SHUFFLES, ids=[f"{s[0]} {s[1]}" for s in SHUFFLES])
def test_shuffles(mode: str, operands: str, lanes: list[int], inside: list[int] | None) -> None:
    out, predicates = numbers(32), numbers(32)
    body = f"add.u32 %r4, %r3, 100; shfl.sync.{mode}.b32 %r5|%p1, %r4, {operands}, -1;"
    body += "mad.wide.u32 %d2, %r0, 4, %d0; st.global.u32 [%d2], %r5; selp.u32 %r6, 1, 0, %p1;"
    execute(body + "mad.wide.u32 %d2, %r0, 4, %d1; st.global.u32 [%d2], %r6;", out, predicates)
    assert out.tolist() == [100 + lane for lane in lanes]
    assert predicates.tolist() == (inside or [int(lane != found) for lane, found in zip(LANES, lanes, strict=True)])


TOGETHER = (
    ("redux.sync.add.u32 %r5, %r4, -1;", [5 * sum(LANES)] * 32),
    ("redux.sync.min.s32 %r5, %r6, -1;", [-31] * 32),
    ("redux.sync.min.u32 %r5, %r6, -1;", [0] * 32),
    ("redux.sync.max.s32 %r5, %r6, -1;", [0] * 32),
    ("redux.sync.max.u32 %r5, %r6, -1;", [-1] * 32),
    ("redux.sync.and.b32 %r5, %r4, -1;", [0] * 32),
    ("redux.sync.or.b32 %r5, %r3, -1;", [31] * 32),
    ("redux.sync.xor.b32 %r5, %r3, -1;", [0] * 32),
    ("vote.sync.ballot.b32 %r5, %p1, -1;", [0x3F] * 32),
    ("vote.sync.any.pred %p2, %p1, -1; selp.u32 %r5, 1, 0, %p2;", [1] * 32),
    ("vote.sync.all.pred %p2, %p1, -1; selp.u32 %r5, 1, 0, %p2;", [0] * 32),
    ("vote.sync.uni.pred %p2, !%p1, -1; selp.u32 %r5, 1, 0, %p2;", [0] * 32),
    ("elect.sync %r5|%p2, -1; selp.u32 %r5, 1, 0, %p2;", [1] + [0] * 31),
)


@pytest.mark.parametrize(("instruction", "expected"), TOGETHER, ids=[t[0].split()[0] for t in TOGETHER])
def test_instructions_of_a_warp(instruction: str, expected: list[int]) -> None:
    """%r4: five times the lane; %r6: minus the lane; %p1: the lanes below 6."""
    out = numbers(32)
    body = "mul.lo.u32 %r4, %r3, 5; neg.s32 %r6, %r3; setp.lt.u32 %p1, %r3, 6;" + instruction
    execute(body + "mad.wide.u32 %d1, %r0, 4, %d0; st.global.u32 [%d1], %r5;", out)
    assert out.tolist() == expected


# ---- memory ----


def test_accesses_of_every_width() -> None:
    """Narrow loads extend by sign or zeros; vectors keep their order; hints for caches change nothing."""
    out = torch.zeros(16, dtype=torch.int32)
    source = torch.tensor([-1, -2, 3, 4, 5, 6, 7, 8], dtype=torch.int32)
    body = """
    ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%r4, %r5, %r6, %r7}, [%d0];
    st.global.cs.v4.b32 [%d1], {%r7, %r6, %r5, %r4};
    ld.global.ca.s8 %r8, [%d0]; st.global.wb.u32 [%d1+16], %r8;
    ld.global.cg.u8 %r8, [%d0]; st.global.wt.u32 [%d1+20], %r8;
    ld.global.cv.s16 %r8, [%d0+4]; st.global.cg.u32 [%d1+24], %r8;
    ld.global.u16 %h4, [%d0+4]; st.global.u16 [%d1+28], %h4; st.global.u8 [%d1+32], %h4;
    ld.global.L1::evict_last.v2.u64 {%d4, %d5}, [%d0+16]; st.global.L1::evict_first.v2.b64 [%d1+48], {%d5, %d4};
    prefetch.global.L2 [%d0]; prefetch.global.L2::evict_last [%d0];
    """
    execute(body, source, out, threads=1)
    assert out.tolist() == [4, 3, -2, -1, -1, 255, -2, 0xFFFE, 0xFE, 0, 0, 0, 7, 8, 5, 6]


def test_atomics() -> None:
    operations = {
        "add.u32": 64 * 3,
        "max.s32": 63,
        "min.s32": 0,
        "or.b32": 63,
        "exch.b32": None,
        "inc.u32": None,
        "add.f32": None,
    }
    out = numbers(2 * 64)
    for i, name in enumerate(operations):
        value = {"add.u32": "3", "inc.u32": "9", "add.f32": "0f3F800000"}.get(name, "%r3")
        execute(f"atom.global.{name} %r5, [%d0+{4 * i}], {value};", out, threads=64)
    found = dict(zip(operations, out.tolist(), strict=False))
    assert all(found[name] == expected for name, expected in operations.items() if expected is not None)
    assert 0 <= found["exch.b32"] < 64 and found["inc.u32"] == 64 % 10
    assert out.view(torch.float32)[list(operations).index("add.f32")] == 64
    # The old value is returned: each exactly once.
    execute("red.global.add.u32 [%d0+256], 1; atom.global.add.u32 %r5, [%d0+260], 1; mad.wide.u32 %d1, %r5, 4, %d0;"
            "st.global.u32 [%d1], 7;", out, threads=64)  # fmt: skip
    assert out.tolist()[:66] == [7] * 64 + [64, 64]
    # A lock that a warp's lanes take in turn: compare and swap.
    lock = numbers(2)
    body = """
$TRY: atom.acquire.gpu.global.cas.b32 %r5, [%d0], 0, 1; setp.ne.u32 %p1, %r5, 0; @%p1 bra $TRY;
    ld.global.u32 %r6, [%d0+4]; add.u32 %r6, %r6, 1; st.global.u32 [%d0+4], %r6;
    atom.release.gpu.global.exch.b32 %r5, [%d0], 0;
    """
    execute(body, lock, blocks=3, threads=64)
    assert lock.tolist() == [0, 3 * 64]


def test_copies() -> None:
    """Of 4, 8 and 16 bytes, whole or filled up with zeros; groups end in their order."""
    source, out = torch.arange(1, 129, dtype=torch.int32), numbers(128)
    body = """
    mov.u32 %r12, memory; mad.lo.u32 %r10, %r3, 32, %r12; mad.wide.u32 %d10, %r3, 32, %d0; mov.u32 %r20, 8;
    cp.async.cg.shared.global [%r10], [%d10], 16; cp.async.commit_group;
    cp.async.ca.shared.global [%r10+16], [%d10+16], 8; cp.async.commit_group;
    cp.async.ca.shared.global.L2::128B [%r10+24], [%d10+24], 8, %r20; cp.async.commit_group;
    cp.async.wait_group 2; ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r10];
    cp.async.wait_group 1; ld.shared.v2.u32 {%r8, %r9}, [%r10+16];
    cp.async.wait_group 0; ld.shared.v2.u32 {%r14, %r15}, [%r10+24];
    mov.u32 %r20, 4; cp.async.ca.shared.global [%r10+24], [%d10], 8, %r20;
    cp.async.wait_all; ld.shared.u32 %r15, [%r10+28];
    mad.wide.u32 %d11, %r3, 32, %d1;
    st.global.v4.u32 [%d11], {%r4, %r5, %r6, %r7}; st.global.v4.u32 [%d11+16], {%r8, %r9, %r14, %r15};
    """
    for seed in SEEDS:
        execute(body, source, out, threads=16, shared_bytes=512, seed=seed)
        expected = source.clone()
        expected[7::8] = 0
        assert out.equal(expected)


def test_shared_memory_is_nan_at_first() -> None:
    out = torch.zeros(32)
    execute(PLACES + GET_AND_STORE, out, threads=32, shared_bytes=128)
    assert out.isnan().all()


GET_AND_STORE = "ld.shared.u32 %r13, [%r10]; st.global.u32 [%d10], %r13;"


# ---- clusters ----


@pytest.mark.parametrize("address", ["mapa.u64", "mapa.shared::cluster.u32"])
def test_shared_memory_of_a_cluster(address: str) -> None:
    """Every block reads all others' places; generic addresses and those of 32 bits name the same."""
    out = numbers(6 * 32)
    generic = "cvt.u64.u32 %d11, %r10; cvta.shared.u64 %d12, %d11; mapa.u64 %d13, %d12, %r20; ld.u32 %r22, [%d13];"
    short = "mapa.shared::cluster.u32 %r24, %r10, %r20; ld.shared::cluster.u32 %r22, [%r24];"
    body = f"""
    add.u32 %r21, %r0, 1000; st.shared.u32 [%r10], %r21; {CLUSTER}
    mov.u32 %r20, %cluster_ctarank; add.u32 %r20, %r20, 1; mov.u32 %r21, %cluster_nctarank; rem.u32 %r20, %r20, %r21;
    {generic if address == "mapa.u64" else short}
    {ARRIVE} st.global.u32 [%d10], %r22; {CLUSTER_WAIT}
    """
    for seed in SEEDS:
        execute(PLACES + body, out, blocks=6, threads=32, shared_bytes=128, cluster=3, seed=seed)
        blocks = [list(range(1000 + 32 * b, 1032 + 32 * b)) for b in range(6)]
        assert out.view(6, 32).tolist() == [blocks[b] for b in (1, 2, 0, 4, 5, 3)]


def test_counters() -> None:
    """Instructions by warps and by threads; memory by accesses, bytes, sectors and rounds of the banks."""
    interpreter = backend.interpreter()
    out = numbers(64)
    body = """
    mov.u32 %r12, memory; mad.lo.u32 %r10, %r3, 128, %r12;
    st.shared.u32 [%r10], %r3; ld.shared.u32 %r4, [%r10];
    setp.lt.u32 %p1, %r3, 40; mad.wide.u32 %d1, %r0, 4, %d0; @%p1 st.global.u32 [%d1], %r4;
    """
    with interpreter.executing() as counts:
        execute(body, out, threads=64, shared_bytes=8192)
    store = counts.instructions["st.global.u32"]
    assert (store.issued, store.threads, store.enabled) == (2, 64, 40)
    assert counts.instructions["mad.wide.u32"].threads == 64
    assert [count for opcode, count in interpreter.issued("k") if opcode == "st.shared.u32"] == [2]
    assert len(interpreter.issued("k")) > 10 and interpreter.issued("another") == []
    written = counts.global_written
    assert (written.warps, written.threads, written.bytes, written.transactions) in {(2, 40, 160, 5), (2, 40, 160, 7)}
    assert (counts.shared_read.warps, counts.shared_read.transactions) == (2, 64)  # every lane needs the same bank
    assert (counts.shared_written.bytes, counts.global_read.bytes) == (256, 0)
