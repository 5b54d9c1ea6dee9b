"""The conditions that every CUDA plan has to meet: every element is read once, blocks that wait for each other are on
the device together, and each uses its own memory. They are derived from the kernels (csrc/cuda) and the norms'
definitions, not from the planner, which test_plan_cuda.py and test_plan_choices.py hold to them.
"""

from __future__ import annotations

import dataclasses
import math

from fastnorm import _C
from tests.common.plan_model import BATCH, DEVICES, KIB, Call, Shape, div_up
from tests.common.plan_walk import MASK_BITS, WARP, Cut, check_columns, check_every_element_once, check_rows

MAX_BLOCKS = 2**31 - 1
MAX_THREADS = 512
MAX_FOLD_BLOCKS = 4096
# Rows in registers: the most threads of a block, the elements of a row that a thread keeps (forward, backward), the
# shared memory in which the warps of a block exchange their sums.
REGISTER_THREADS = 512
THREAD_ELEMENTS = (32, 16)
REGISTER_LADDER = 2 * (REGISTER_THREADS // WARP) * 8
MAX_OFFSET = 2**31  # packs of memory from the first of a piece to the last
SECTOR = 32  # bytes: no tile is narrower
SMALL_PIECE = 1024  # packs: a split stops there
SMALL_COLUMN = 8  # positions of a thread, likewise
PARTIAL = 2  # numbers of what a gang exchanges
LARGE_US = 4  # reading a tensor that takes so long is worth more than a grid's barriers
MOST_SHARES = 4  # one SM may draw so many times its share of the memory's bandwidth: 64 bytes per clock

# Per SM: the threads that kernels' registers allow; the blocks that every architecture has room for. Per block: the
# bytes of shared memory that it costs besides its own.
RESIDENT_THREADS = MAX_THREADS
RESIDENT_BLOCKS = 16
RESERVED = KIB

# Geometries with no more runs and pieces than these are walked one by one.
MODELLED = 6000
WALKED = 250


def align(n: int, unit: int = 16) -> int:
    return div_up(n, unit) * unit


def rounds(grid: _C.Grid) -> int:
    """The number of blocks with which no block takes a second item."""
    return div_up(grid.items, grid.threads_y if grid.traversal == "rows" else 1)


def check_launch(grid: _C.Grid, call: Call, facts: _C.DeviceInfo) -> None:
    assert grid.threads == grid.threads_x * grid.threads_y
    most = REGISTER_THREADS if grid.thread_packs > 0 else MAX_THREADS
    assert grid.threads % WARP == 0 and WARP <= grid.threads <= most
    assert 1 <= grid.blocks <= min(MAX_BLOCKS, rounds(grid))
    assert 0 <= grid.shared_bytes <= min(facts.shared_per_block, facts.shared_per_sm - RESERVED)
    assert grid.shared_bytes % 16 == 0 and grid.team_bytes % 16 == 0
    # What kernels are compiled for: 16 bytes, single elements, and for runs of positions half packs of the half types.
    halves = grid.traversal == "rows" or call.shape.of_positions
    assert grid.pack == 1 or grid.pack * call.size in ((8, 16) if halves else (16,))
    assert grid.pack * call.size <= call.alignment and (grid.pack == 1 or call.size < 8)


def check_grid(grid: _C.Grid, call: Call, shape: Shape, facts: _C.DeviceInfo, fused: bool = False) -> None:
    """shape: the call's, or its cells."""
    rows = grid.traversal == "rows"
    assert grid.traversal == shape.traversal and shape.mask_run % grid.pack == 0
    check_launch(grid, call, facts)
    stretches = check_rows(grid, shape) if rows else check_columns(grid, shape.outer, shape.positions, shape.C)
    if not fused:
        assert grid.gang == "block" and grid.stages == 1 and grid.team_bytes == 0 and grid.thread_packs == 0
        # Runs of a batch norm lie a sample apart, and offsets in a piece fit 32 bits.
        far = rows and shape.kind == BATCH and 2 * grid.piece_runs * shape.C * shape.S // grid.pack > MAX_OFFSET
        check_busy(grid, shape.set_size // grid.pack if rows else shape.positions, facts, far)
        check_scratch(grid, call)
    if stretches <= MODELLED and grid.pieces * (1 if rows else shape.outer) <= WALKED:
        numbers = (grid.pack, grid.pieces, grid.piece_runs, grid.piece_length, grid.tile, grid.items)
        check_every_element_once(Cut(shape, rows, *numbers, fused))


def check_busy(grid: _C.Grid, packs: int, facts: _C.DeviceInfo, far: bool = False) -> None:
    """Work that can still be split leaves no SM without a block, and no piece is too small for a block, unless its runs
    lie too far apart for a larger one. packs: of a set, or positions."""
    least = SMALL_PIECE if grid.traversal == "rows" else SMALL_COLUMN * grid.threads_y
    piece = grid.piece_runs * grid.piece_length
    assert grid.pieces == 1 or piece >= least // 2 or far
    assert grid.blocks >= facts.num_sms or piece < 2 * least + MASK_BITS or packs < 2 * least


def ladder(grid: _C.Grid, accum: int) -> int:
    """Bytes of a reduction over a block: an accumulator of three numbers per warp, and the result."""
    return align((grid.threads // WARP + 1) * 3 * accum)


def merge(grid: _C.Grid, accum: int) -> int:
    """Bytes of a reduction down the columns: two numbers per lane. Lanes of a warp that have the same channels merge
    theirs without shared memory."""
    apart = min(1, grid.threads_x / WARP)
    return int(grid.threads * apart) * grid.pack * 2 * accum


def check_scratch(grid: _C.Grid, call: Call) -> None:
    assert grid.shared_bytes >= (ladder if grid.traversal == "rows" else merge)(grid, call.accum)


# ---- fused launches ----


@dataclasses.dataclass(frozen=True)
class Fused:
    """The properties of a fused launch besides its grid."""

    streams: int  # tensors in shared memory
    backward: bool
    extra: int  # bytes of shared memory in which a team adds up
    cooperative: bool
    gathers: bool  # a row of the workspace for each gang


def co_resident_blocks(grid: _C.Grid, kind: Fused, facts: _C.DeviceInfo, free: int) -> int:
    """The blocks that are on the device at a time, with `free` SMs left alone."""
    each = min(
        RESIDENT_THREADS // grid.threads,  # as many with rows in registers
        facts.threads_per_sm // grid.threads,
        RESIDENT_BLOCKS,
        facts.shared_per_sm // align(grid.shared_bytes + RESERVED, 128 if facts.capability >= 80 else 256),
    )
    if grid.gang != "cluster":
        return each * max(1, facts.num_sms - free)
    # A cluster lies within one of the places of the largest, which have an SM for each block.
    places = max(0, facts.cluster_sms - free) // facts.largest_cluster
    return places * (facts.largest_cluster * each // grid.pieces) * grid.pieces


def check_fused(grid: _C.Grid, call: Call, facts: _C.DeviceInfo, kind: Fused, free: int) -> None:
    rows = grid.traversal == "rows"
    if grid.thread_packs > 0:
        check_registers(grid, call, facts, kind, free)
        return
    # A wave is an item for every team, a gang's blocks are neighbours: each has the same piece of a set in every wave.
    assert (grid.pieces == 1) == (grid.gang == "block")
    assert grid.blocks % grid.pieces == 0 and grid.items % grid.pieces == 0
    # In rows the first thread of a gang's block publishes its partial, and whole warps fetch the others.
    assert grid.gang == "block" or not rows or (grid.threads_y == 1 and grid.threads_x >= WARP)
    assert rows or grid.tile % call.shape.walked_as(grid.traversal).set_channels == 0  # tiles are of whole sets
    assert grid.gang != "cluster" or grid.pieces <= facts.largest_cluster
    assert grid.stages in (1, 2)
    assert grid.exchange == "gather" or (grid.gang == "grid" and not rows)
    if rows:
        assert grid.staged_length == 0
    elif grid.staged_length != grid.piece_length:
        # The rest is read twice. Every thread goes on where it would have.
        assert 0 < grid.staged_length < grid.piece_length and grid.staged_length % grid.threads_y == 0
        assert call.shape.of_positions or (grid.gang == "grid" and grid.pack * call.size == 16)
    if call.shape.of_positions:  # tiles are of whole sets, and a warp adds up the sums of a row
        assert grid.gang == "block" and grid.threads_x <= WARP
    assert (facts.cooperative_clusters if grid.gang == "cluster" else facts.cooperative) or not kind.cooperative
    # Blocks that wait for each other, and blocks that take their items one after the other.
    if kind.cooperative or kind.gathers or grid.stages == 2:
        assert grid.blocks <= co_resident_blocks(grid, kind, facts, free if kind.cooperative else 0)
    # Shared memory, in the kernels' order.
    piece = grid.piece_runs * staged_run(grid, call.size) if rows else grid.staged_length * grid.tile
    staged = grid.stages * kind.streams * align(piece * call.size)
    partials = 2 * PARTIAL * (1 if rows else grid.tile) * call.accum if grid.gang == "cluster" else 0
    if rows:
        check_bytes(grid.team_bytes, staged + kind.extra)
        check_bytes(grid.shared_bytes, grid.threads_y * grid.team_bytes + ladder(grid, call.accum) + partials)
    else:
        assert grid.team_bytes == 0
        per_set = 4 * grid.tile * call.accum  # as if every channel were a set
        check_bytes(grid.shared_bytes, staged + merge(grid, call.accum) + per_set + partials)


def check_registers(grid: _C.Grid, call: Call, facts: _C.DeviceInfo, kind: Fused, free: int) -> None:
    """Rows of packs of 16 bytes in the registers of teams that have room for them; all blocks are on the device."""
    shape, per_thread = call.shape, grid.thread_packs
    assert shape.per_element and shape.G == 1 and grid.pack * call.size == 16
    elements = THREAD_ELEMENTS[kind.backward]
    assert per_thread * grid.pack == elements
    assert grid.gang == "block" and grid.pieces == 1 and grid.stages in (1, 2)
    packs = shape.set_size // grid.pack
    # Every thread has the first half of its packs, and no team has more threads than its row has packs for.
    assert per_thread // 2 * grid.threads_x <= packs <= per_thread * grid.threads_x
    assert grid.items < 2**31  # a team counts its rows in 32 bits
    assert facts.cooperative or not kind.cooperative
    assert grid.blocks <= co_resident_blocks(grid, kind, facts, free if kind.cooperative else 0)
    ring = grid.stages * kind.streams * per_thread * 16  # of a thread
    assert grid.team_bytes == ring * grid.threads_x
    params = elements * 4 * (1 if kind.backward else 2)  # weights, and biases in forward, as float32
    assert grid.shared_bytes == REGISTER_LADDER + grid.threads * (ring + params)
    # The sums of a pack of every thread take the place of the ring at the end.
    assert not kind.backward or ring >= grid.pack * 8


def staged_run(grid: _C.Grid, size: int) -> int:
    """The elements that a run occupies in shared memory: single ones lie as far past 16 bytes as in global memory."""
    length, lanes = grid.piece_length * grid.pack, 16 // size
    return length if grid.pack > 1 else div_up(length + lanes - 1, lanes) * lanes


def check_bytes(given: int, needed: int) -> None:
    assert needed <= given <= needed + 128, f"{given} bytes, {needed} are needed"


def check_units(plan: _C.BackwardPlan, shape: Shape) -> int:
    """The segments of a cell make it up, and a team has the threads for one at least. Returns the bytes of their
    sums."""
    units, grid = plan.units, plan.reduce
    several = shape.kind != BATCH and grid.piece_runs > 1  # cells in a piece; a batch norm's is all one
    if plan.strategy != "fused" or grid.traversal == "columns" or shape.per_element or not several:
        assert units.threads == 0
        return 0
    cells, packs = grid.piece_runs, grid.piece_length
    assert units.threads >= 1 and units.threads & (units.threads - 1) == 0
    assert units.threads <= min(WARP, grid.threads_x)
    assert units.length >= 1 and (units.segments - 1) * units.length < packs <= units.segments * units.length
    return cells * units.segments * 8  # two floats


# ---- plans ----


def partials(grid: _C.Grid, shape: Shape) -> int:
    """[outer, pieces, sets of an outer]; columns have one for each channel."""
    return (shape.outer * grid.pieces * shape.C) if grid.traversal == "columns" else shape.sets * grid.pieces


def gang_bytes(grid: _C.Grid) -> int:
    """The partials that the gangs of a grid exchange: [2, blocks, channels]; sums: [2, gangs, channels]; and a counter
    of each gang, where there are several that sync more than once."""
    if grid.gang != "grid":
        return 0
    channels = grid.tile if grid.traversal == "columns" else 1
    sums = grid.blocks // grid.pieces if grid.exchange == "scatter" else 0
    counters = grid.blocks // grid.pieces if grid.items > grid.blocks > grid.pieces else 0
    return 2 * (grid.blocks + sums) * channels * PARTIAL * 4 + 4 * counters


def check_estimate(estimate: _C.Estimate, least_bytes: int, blocks: int, facts: _C.DeviceInfo) -> None:
    """No launch is free, and none moves memory faster than the device can, nor than so many blocks can."""
    parts = (estimate.memory, estimate.issue, estimate.barriers, estimate.launches)
    assert all(math.isfinite(part) and part >= 0 for part in parts) and estimate.issue > 0 and estimate.launches > 0
    assert math.isclose(estimate.total, math.hypot(*parts[:2]) + sum(parts[2:]))
    share = min(1.0, MOST_SHARES * blocks / facts.num_sms)
    assert estimate.memory * facts.bytes_per_us * share >= least_bytes * (1 - 1e-9)


def check_fused_view(grid: _C.Grid, call: Call, strategy: str) -> None:
    """Samples are rows of columns only where that gives wider packs; columns kernels know no mask of single runs."""
    shape = call.shape
    if grid.traversal != shape.traversal:
        assert shape.kind == BATCH and strategy == "fused" and not call.mask
        assert grid.pack * call.size == 16 and shape.S % grid.pack != 0


def check_forward(call: Call, facts: _C.DeviceInfo, plan: _C.ForwardPlan, free: int = 0) -> None:
    grid, four = plan.grid, 4 * call.accum  # a count, then mean and m2 side by side
    strategies = ("fused",) if call.shape.of_positions else ("apply",) if call.frozen else ("fused", "split")
    assert plan.strategy in strategies
    check_fused_view(grid, call, plan.strategy)
    check_grid(grid, call, call.shape.walked_as(grid.traversal), facts, plan.strategy == "fused")
    check_estimate(plan.estimate, (1 + call.input) * call.bytes, grid.blocks, facts)
    if plan.strategy == "fused":
        assert call.size < 8 or call.shape.of_positions
        check_fused(grid, call, facts, Fused(1, False, 0, grid.gang == "grid", False), free)
        assert (plan.workspace_bytes, plan.launches) == (gang_bytes(grid), 1)
    elif plan.strategy == "split":
        assert plan.workspace_bytes == partials(grid, call.shape) * four
        assert plan.launches == (3 if call.input else 2)
    else:
        assert (plan.workspace_bytes, plan.launches) == (0, 1)


def fold_blocks(channels: int, partials: int, threads: int) -> int:
    """The blocks of the fold of dweight and dbias, which come before those of apply."""
    lanes = 1
    while lanes < WARP and lanes * 8 < partials:
        lanes *= 2
    return min(MAX_FOLD_BLOCKS, div_up(channels * lanes, threads))


def check_params(plan: _C.BackwardPlan, call: Call, facts: _C.DeviceInfo) -> None:
    """The gradients of weights that change with every element, down the rows; perhaps beside the blocks of reduce."""
    grid, beside = plan.params, plan.strategy == "split" and plan.reduce.items > 0
    check_launch(grid, call, facts)
    check_columns(grid, 1, call.shape.N, call.shape.C)
    check_busy(grid, call.shape.N, facts)
    check_scratch(grid, call)
    assert grid.pack == (plan.reduce.pack if plan.reduce.pack * call.size == 16 else 1)
    if beside:
        assert grid.threads == plan.reduce.threads
        assert grid.blocks + plan.reduce.blocks <= MAX_BLOCKS


def folds_params(call: Call, plan: _C.BackwardPlan) -> bool:
    """Whether the parameters' gradients are folded from partials. The sums of a fused batch norm are final."""
    final = plan.strategy == "fused" and call.shape.kind == BATCH
    return plan.param_sums in ("in_gang", "own_launch") or (plan.param_sums == "from_cells" and not final)


def check_launches(call: Call, facts: _C.DeviceInfo, plan: _C.BackwardPlan) -> None:
    """As csrc/cuda/backward_launch.cuh makes them."""
    folds, own_launch = folds_params(call, plan), plan.param_sums == "own_launch"
    reduces, applies = plan.reduce.items > 0, plan.apply.items > 0
    assert 1 <= plan.launches <= 3
    assert plan.reduce.pack == plan.apply.pack  # one instantiation serves both
    if plan.strategy == "fused":
        assert call.shape.of_positions or (call.input and call.size < 8)
        assert reduces and not applies
        assert plan.launches == 1 + own_launch + (folds and not plan.grid_sync)
        syncs = facts.cooperative_clusters if plan.reduce.gang == "cluster" else facts.cooperative
        assert plan.launches == 1 or own_launch or not syncs
        assert not plan.grid_sync or (folds and not own_launch)
    else:
        terms = call.input and not call.frozen
        assert plan.launches == (reduces or own_launch) + terms + (applies or folds)
        assert reduces == (terms or plan.param_sums == "from_cells")
        assert applies == call.input and not plan.grid_sync
    assert (plan.params.items > 0) == own_launch
    assert plan.strategy != "apply" or (call.frozen and not call.params)


def check_workspace(call: Call, plan: _C.BackwardPlan) -> None:
    shape, grid, sums = call.shape, plan.reduce, plan.param_sums
    fused, pair = plan.strategy == "fused", 2 * call.accum
    rows = {"sums": 0, "params": 0}  # of C pairs
    if fused and sums == "from_cells" and shape.kind != BATCH:  # [outer, parts of a run, C]
        parted = grid.traversal == "rows" and grid.piece_runs == 1
        rows["sums"] = shape.outer * (grid.pieces // shape.runs[0] if parted else 1)
    if sums in ("in_gang", "own_launch"):
        rows["params"] = grid.blocks // grid.pieces if sums == "in_gang" else plan.params.pieces
    counts = {name: count * shape.C for name, count in rows.items()}
    if grid.items > 0 and not fused:
        counts["sums"] = partials(grid, shape.cells)
    counts["terms"] = shape.sets if call.input and not call.frozen and not fused else 0
    for name, count in counts.items():
        assert getattr(plan, f"{name}_bytes") == count * pair, name
    assert plan.gang_bytes == (gang_bytes(grid) if fused else 0)
    assert plan.workspace_bytes == sum(counts.values()) * pair + plan.gang_bytes
    if plan.apply.items > 0 and folds_params(call, plan):
        folded = counts["params" if sums == "own_launch" else "sums"] // shape.C
        assert plan.apply.blocks + fold_blocks(shape.C, folded, plan.apply.threads) <= MAX_BLOCKS


def check_backward(call: Call, facts: _C.DeviceInfo, plan: _C.BackwardPlan, free: int = 0) -> None:
    shape, sums, grid, fused = call.shape, plan.param_sums, plan.reduce, plan.strategy == "fused"
    sources = ("in_gang", "own_launch") if shape.per_element else ("from_cells",)
    if shape.of_positions:
        sources = ("in_gang",)
        assert fused
    assert sums in (sources if call.params else ("none",))
    assert sums != "in_gang" or (fused and shape.G == 1)  # a channel has one place in every row
    check_launches(call, facts, plan)
    cells = shape if fused or grid.items == 0 else shape.cells
    assert plan.cells == cells.geometry
    if grid.items > 0:
        check_fused_view(grid, call, plan.strategy)
        check_grid(grid, call, cells.walked_as(grid.traversal), facts, fused)
    if plan.apply.items > 0:
        check_grid(plan.apply, call, shape, facts)
    if sums == "own_launch":
        check_params(plan, call, facts)
    extra, streams = check_units(plan, shape), 3 if call.residual else 2
    if sums == "in_gang":
        extra = grid.piece_length * grid.pack * 8  # two floats an element
    if fused:
        waits = plan.grid_sync or grid.gang == "grid"
        check_fused(grid, call, facts, Fused(streams, True, extra, waits, sums == "in_gang"), free)
    check_workspace(call, plan)
    blocks = max(g.blocks for g in (grid, plan.apply, plan.params))
    check_estimate(plan.estimate, (streams + call.input) * call.bytes, blocks, facts)


def check_chosen(grid: _C.Grid, strategy: str, call: Call, facts: _C.DeviceInfo) -> None:
    """A large tensor keeps half of the SMs busy at least, where blocks can share its sets, or there are enough."""
    gangs = facts.cooperative or facts.largest_cluster > 1
    if call.shape.of_positions:
        gangs = call.shape.N * (call.shape.S * call.size // SECTOR) >= facts.num_sms
    if strategy == "fused" and gangs and call.bytes > LARGE_US * facts.bytes_per_us:
        assert 2 * grid.blocks >= facts.num_sms


def check_everywhere(call: Call) -> None:
    """Checks the chosen plans on all devices."""
    for facts in DEVICES.values():
        forward, backward = call.forward(facts), call.backward(facts)
        check_forward(call, facts, forward)
        check_backward(call, facts, backward)
        check_chosen(forward.grid, forward.strategy, call, facts)
        check_chosen(backward.reduce, backward.strategy, call, facts)
