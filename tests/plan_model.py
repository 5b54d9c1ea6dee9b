"""What CUDA kernels do with a plan, modelled from the norms' definitions: which item reads which elements, and what has
to hold so that every element is read once, within the device's limits. test_plan_cuda.py holds the planner to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from math import prod

import numpy as np

from cases import Layer
from fastnorm import _C

BATCH, GROUP, LAYER = 0, 1, 2
DTYPES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
KIB, MIB = 1 << 10, 1 << 20


def device(capability: int, processors: int, threads: int, shared: int, block: int, l2: int) -> _C.DeviceInfo:
    return _C.DeviceInfo(
        capability=capability,
        multiprocessors=processors,
        threads_per_multiprocessor=threads,
        shared_per_multiprocessor=shared * KIB,
        shared_per_block=block * KIB,
        l2_bytes=l2 * MIB,
    )


DEVICES = {
    "T4": device(75, 40, 1024, 64, 64, 4),
    "A100": device(80, 108, 2048, 164, 163, 40),
    "RTX 4090": device(89, 128, 1536, 100, 99, 72),
    "H100": device(90, 132, 2048, 228, 227, 50),
    "H200": device(90, 132, 2048, 228, 227, 60),
    "B200": device(100, 148, 2048, 228, 227, 126),
    "tiny": device(75, 2, 1024, 34, 16, 1),
}

MAX_BLOCKS = 2**31 - 1
MAX_THREADS = 256
MAX_PIECE = 2**20  # packs or positions: a piece's offsets fit 32 bits, its count is exact in float32
SMALL_PIECE = 1024  # packs: a split stops there
SMALL_COLUMN = 8  # positions of a thread, likewise
MASK_BITS = 8
MODELLED = 6000  # stretches of memory, and in
WALKED = 250  # pieces: geometries with no more are walked one by one


@dataclasses.dataclass(frozen=True)
class Shape:
    """The planner's Geometry, described anew from the norms' definitions."""

    kind: int
    N: int
    C: int
    S: int
    G: int
    last: bool

    @property
    def geometry(self) -> _C.Geometry:
        return _C.Geometry(self.kind, self.N, self.C, self.S, self.G, self.last)

    @property
    def sets(self) -> int:
        return self.C if self.kind == BATCH else self.N * self.G

    @property
    def set_size(self) -> int:
        return self.N * self.C * self.S // self.sets

    @property
    def per_element(self) -> bool:
        return self.kind != BATCH and self.S == 1

    @property
    def traversal(self) -> str:
        side_by_side = self.last and self.S > 1
        return "columns" if side_by_side or (self.kind == BATCH and (self.last or self.S == 1)) else "rows"

    @property
    def mask_run(self) -> int:
        """Elements that lie side by side and share a row of the mask."""
        if self.traversal == "columns":
            return self.C
        return self.C // self.G if self.per_element else self.S

    @property
    def outer(self) -> int:
        return 1 if self.kind == BATCH else self.N

    @property
    def positions(self) -> int:
        return self.N * self.S // self.outer

    @property
    def runs(self) -> tuple[int, int, int]:
        """How many stretches of one weight (or row) a set has, elements of one, elements from one to the next."""
        if self.kind == BATCH:
            return self.N, self.S, self.C * self.S
        per_group = self.C // self.G
        return (1, per_group, 0) if self.per_element else (per_group, self.S, self.S)

    def set_of(self, address: np.ndarray) -> np.ndarray:
        """The set of the element at each address."""
        sample, rest = address // (self.C * self.S), address % (self.C * self.S)
        channel = rest % self.C if self.last else rest // self.S
        return channel if self.kind == BATCH else sample * self.G + channel // (self.C // self.G)

    @property
    def cells(self) -> Shape:
        """Every cell a set, where a cell is a run or more."""
        splits = self.traversal == "rows" and self.kind == GROUP and not self.per_element
        return dataclasses.replace(self, G=self.C) if splits else self


def shape_of(layer: Layer, layout: str) -> Shape:
    n, c, *space = layer.shape if len(layer.shape) > 1 else (1, *layer.shape)
    if layer.norm == "LayerNorm":
        normalized = layer.args[0]
        c = prod(normalized) if isinstance(normalized, tuple) else normalized
        return Shape(LAYER, prod(layer.shape) // c, c, 1, 1, False)
    if layer.norm.startswith("Instance") and len(layer.shape) == int(layer.norm[-2]) + 1:  # no batch
        n, c, space = 1, layer.shape[0], list(layer.shape[1:])
    groups = c if layer.norm.startswith("Batch") else layer.groups
    kind = BATCH if layer.norm.startswith("Batch") else GROUP
    return Shape(kind, n, c, prod(space), groups, layout == "channels_last")


def div_up(a: int, b: int) -> int:
    return -(-a // b)


def item_runs(grid: _C.Grid, shape: Shape) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What the items of a rows grid read: item, first address and length of each stretch."""
    count, length, stride = shape.runs
    run_packs = length // grid.pack
    per_run = div_up(run_packs, grid.piece_length) if grid.piece_runs == 1 else 1
    base = np.arange(shape.sets) * (shape.S if shape.kind == BATCH else shape.set_size)
    for piece in range(grid.pieces):
        first_run, first_pack = piece // per_run * grid.piece_runs, piece % per_run * grid.piece_length
        runs = first_run + np.arange(min(grid.piece_runs, count - first_run))
        packs = min(grid.piece_length, run_packs - first_pack)
        starts = base[:, None] + runs * stride + first_pack * grid.pack
        items = np.broadcast_to(np.arange(shape.sets)[:, None] * grid.pieces + piece, starts.shape)
        yield items.ravel(), starts.ravel(), np.full(starts.size, packs * grid.pack)


def item_tiles(grid: _C.Grid, shape: Shape) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The same of a columns grid, whose items are [outer, pieces, tiles]."""
    tiles = div_up(shape.C, grid.tile)
    channel = np.arange(tiles) * grid.tile
    widths = np.minimum(grid.tile, shape.C - channel)
    for outer in range(shape.outer):
        for piece in range(grid.pieces):
            first = piece * grid.piece_length
            position = np.arange(first, min(first + grid.piece_length, shape.positions))
            starts = (outer * shape.positions + position[:, None]) * shape.C + channel
            items = (outer * grid.pieces + piece) * tiles + np.arange(tiles)
            yield tuple(np.broadcast_to(a, starts.shape).ravel() for a in (items, starts, widths))


def check_every_element_once(grid: _C.Grid, shape: Shape, whole_sets: bool) -> None:
    """Walks the items: their stretches make up the tensor without gap or overlap, and stay within their set."""
    walk = item_runs if grid.traversal == "rows" else item_tiles
    items, starts, lengths = (np.concatenate(parts) for parts in zip(*walk(grid, shape), strict=True))
    assert (lengths > 0).all()
    assert set(np.unique(items)) == set(range(grid.items))
    order = np.argsort(starts)
    ends = (starts + lengths)[order]
    assert starts[order][0] == 0 and ends[-1] == shape.N * shape.C * shape.S
    assert (ends[:-1] == starts[order][1:]).all()
    first, last = shape.set_of(starts), shape.set_of(starts + lengths - 1)
    if grid.traversal == "rows":
        assert (first == items // grid.pieces).all() and (last == first).all()
    elif whole_sets:  # no set has elements in two items
        holders = np.unique(np.stack([np.concatenate([first, last]), np.tile(items, 2)]), axis=1)[0]
        assert np.unique(holders).size == holders.size


def check_rows(grid: _C.Grid, shape: Shape) -> None:
    count, length, _ = shape.runs
    assert length % grid.pack == 0
    packs = length // grid.pack
    if grid.piece_runs == 1:
        per_run = div_up(packs, grid.piece_length)
        assert grid.pieces == count * per_run and (per_run - 1) * grid.piece_length < packs
        # A byte of the mask belongs to one piece.
        assert per_run == 1 or grid.piece_length * grid.pack % MASK_BITS == 0
    else:
        assert grid.piece_length == packs and grid.pieces == div_up(count, grid.piece_runs)
    assert 1 <= grid.piece_runs <= count and 1 <= grid.piece_length <= packs + MASK_BITS
    assert grid.piece_runs * grid.piece_length <= MAX_PIECE
    assert grid.items == shape.sets * grid.pieces and grid.tile == 0
    # A team is a part of a warp, a warp, or a block; a byte of the mask, whose lanes are neighbours, belongs to one.
    assert grid.threads_x * grid.pack >= MASK_BITS and grid.threads_x & (grid.threads_x - 1) == 0
    assert grid.threads_x <= 32 or grid.threads_y == 1
    assert grid.threads_x <= max(MASK_BITS, 2 * grid.piece_runs * grid.piece_length)


def check_columns(grid: _C.Grid, outer: int, positions: int, C: int) -> None:
    assert C % grid.pack == 0
    tiles = div_up(C, grid.tile)
    assert grid.piece_runs == 1
    assert (grid.pieces - 1) * grid.piece_length < positions <= grid.pieces * grid.piece_length
    assert 1 <= grid.piece_length <= min(positions, MAX_PIECE)
    assert grid.items == outer * grid.pieces * tiles
    assert grid.tile == C or (grid.tile % MASK_BITS == 0 and grid.tile < C)
    assert grid.tile % grid.pack == 0 and grid.tile <= grid.threads_x * grid.pack
    assert grid.threads_x * grid.pack >= MASK_BITS and 32 % min(32, grid.threads_x) == 0


def check_launch(grid: _C.Grid, size: int, alignment: int, facts: _C.DeviceInfo) -> None:
    threads = grid.threads_x * grid.threads_y
    assert threads % 32 == 0 and 32 <= threads <= MAX_THREADS
    assert 1 <= grid.blocks <= min(MAX_BLOCKS, grid.items)
    teams = grid.threads_y if grid.traversal == "rows" else 1
    assert grid.blocks <= div_up(grid.items, teams)
    assert 0 <= grid.shared_bytes <= facts.shared_per_block and grid.shared_bytes % 16 == 0
    # What kernels are compiled for: 16 bytes, single elements, and for rows half packs of the half types.
    assert grid.pack == 1 or grid.pack * size in ((8, 16) if grid.traversal == "rows" else (16,))
    assert grid.pack * size <= alignment and (grid.pack == 1 or size < 8)


def check_busy(grid: _C.Grid, packs: int, facts: _C.DeviceInfo) -> None:
    """Work that can still be split leaves no multiprocessor without a block, and no piece is too small for one.
    packs: of a set, or positions."""
    least = SMALL_PIECE if grid.traversal == "rows" else SMALL_COLUMN * grid.threads_y
    piece = grid.piece_runs * grid.piece_length
    assert grid.pieces == 1 or piece >= least // 2
    assert grid.blocks >= facts.multiprocessors or piece < 2 * least + MASK_BITS or packs < 2 * least


def check_grid(grid: _C.Grid, shape: Shape, size: int, alignment: int, facts: _C.DeviceInfo, staged: int) -> None:
    """staged: how many tensors a fused launch holds in shared memory; 0: it is none."""
    fused = staged > 0
    assert grid.traversal == shape.traversal
    assert shape.mask_run % grid.pack == 0
    check_launch(grid, size, alignment, facts)
    rows = grid.traversal == "rows"
    if rows:
        check_rows(grid, shape)
        stretches, work = shape.sets * shape.runs[0] + grid.items, shape.set_size // grid.pack
    else:
        check_columns(grid, shape.outer, shape.positions, shape.C)
        stretches, work = shape.outer * shape.positions * div_up(shape.C, grid.tile), shape.positions
    if fused:
        assert grid.pieces == 1
        # Whole sets: rows have a set to a team, columns tiles of whole groups.
        per_set = 1 if shape.kind == BATCH else shape.C // shape.G
        assert rows or grid.tile % per_set == 0
        held = grid.threads_y * shape.set_size if rows else grid.tile * shape.positions
        assert grid.shared_bytes >= staged * held * size
    else:
        check_busy(grid, work, facts)
    if stretches <= MODELLED and grid.pieces * (1 if rows else shape.outer) <= WALKED:
        check_every_element_once(grid, shape, whole_sets=fused)


def partials(grid: _C.Grid, shape: Shape) -> int:
    """[outer, pieces, sets of an outer]; columns have one for each channel."""
    return (shape.outer * grid.pieces * shape.C) if grid.traversal == "columns" else shape.sets * grid.pieces


def check_units(plan: _C.BackwardPlan, shape: Shape, staged: int) -> None:
    """The segments of a cell make it up, and a team has the threads for one at least. staged: bytes of a set."""
    units, grid = plan.units, plan.reduce
    if grid.traversal == "columns" or shape.per_element:
        assert units.threads == 0
        return
    cells = 1 if shape.kind == BATCH else shape.C // shape.G
    packs = grid.piece_runs * grid.piece_length // cells
    assert units.threads >= 1 and units.threads & (units.threads - 1) == 0
    assert units.threads <= min(32, grid.threads_x)
    assert units.length >= 1 and (units.segments - 1) * units.length < packs <= units.segments * units.length
    assert grid.team_bytes >= staged + cells * units.segments * 8  # two floats a segment
    assert grid.shared_bytes >= grid.threads_y * grid.team_bytes and grid.team_bytes % 16 == 0


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything that a plan depends on, but for the device."""

    shape: Shape
    dtype: str
    alignment: int
    residual: bool
    frozen: bool
    input: bool
    params: bool

    def forward(self, facts: _C.DeviceInfo) -> _C.ForwardPlan:
        return _C.plan_forward(
            self.shape.geometry, self.dtype, facts, alignment=self.alignment, output=self.input, frozen=self.frozen
        )

    def backward(self, facts: _C.DeviceInfo) -> _C.BackwardPlan:
        return _C.plan_backward(
            self.shape.geometry,
            self.dtype,
            facts,
            alignment=self.alignment,
            residual=self.residual,
            frozen=self.frozen,
            input=self.input,
            params=self.params,
        )


def check_forward(call: Call, facts: _C.DeviceInfo) -> None:
    plan, size = call.forward(facts), DTYPES[call.dtype]
    fused = plan.strategy == "fused"
    assert plan.strategy == "apply" if call.frozen else plan.strategy in ("fused", "split")
    check_grid(plan.grid, call.shape, size, call.alignment, facts, staged=int(fused))
    three = 3 * (8 if call.dtype == "float64" else 4)  # count, mean, m2
    assert plan.workspace_bytes == (partials(plan.grid, call.shape) * three if plan.strategy == "split" else 0)


def check_backward(call: Call, facts: _C.DeviceInfo) -> None:
    plan, size, shape = call.backward(facts), DTYPES[call.dtype], call.shape
    fused = plan.strategy == "fused"
    staged = (3 if call.residual else 2) if fused else 0
    pair = 2 * (8 if call.dtype == "float64" else 4)
    terms = call.input and not call.frozen and not fused
    if plan.strategy == "apply":
        assert call.frozen and not call.params
    sources = ("along", "apart") if shape.per_element else ("shared",)
    assert plan.param_sums in (sources if call.params else ("none",))
    assert plan.param_sums != "along" or (fused and shape.G == 1)
    launched = {"reduce": fused or terms or plan.param_sums == "shared", "params": plan.param_sums == "apart"}
    launched["apply"] = (call.input and not fused) or plan.strategy == "apply"
    assert {name for name in launched if getattr(plan, name).items > 0} == {
        n for n, wanted in launched.items() if wanted
    }
    if launched["reduce"]:
        cells = shape if fused else shape.cells
        assert plan.cells == cells.geometry
        check_grid(plan.reduce, cells, size, call.alignment, facts, staged)
    if launched["apply"]:
        check_grid(plan.apply, shape, size, call.alignment, facts, staged=0)
    if launched["params"]:
        check_launch(plan.params, size, call.alignment, facts)
        check_columns(plan.params, 1, shape.N, shape.C)
        check_busy(plan.params, shape.N, facts)
    if fused:
        check_units(plan, shape, staged * shape.set_size * size)
        shared = shape.outer * shape.C if plan.param_sums == "shared" and shape.kind != BATCH else 0
    else:
        shared = partials(plan.reduce, shape.cells) if launched["reduce"] else 0
    assert plan.sums_bytes == shared * pair
    gathered = {"along": plan.reduce.blocks, "apart": plan.params.pieces}.get(plan.param_sums, 0)
    assert plan.params_bytes == gathered * shape.C * pair
    assert plan.terms_bytes == (shape.sets * pair if terms else 0)
    assert plan.workspace_bytes == plan.sums_bytes + plan.params_bytes + plan.terms_bytes


def check_everywhere(call: Call) -> None:
    plans = []
    for facts in DEVICES.values():
        check_forward(call, facts)
        check_backward(call, facts)
        plans.append((call.forward(facts), call.backward(facts)))
        assert plans[-1] == (call.forward(facts), call.backward(facts))
    texts = [tuple(map(str, pair)) for pair in plans]
    assert not any("\n" in text for pair in texts for text in pair)
    for i in (0, 1):  # equal plans print alike, others do not
        assert all((plans[0][i] == p[i]) == (texts[0][i] == t[i]) for p, t in zip(plans, texts, strict=True))
