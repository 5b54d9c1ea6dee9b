"""The memory that the items of a CUDA grid read, walked as the kernels do (csrc/cuda/rows.cuh, columns.cuh): every
element once, and every byte of the mask by one item.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fastnorm import _C
from tests.common.plan_model import BATCH, Shape, div_up

WARP = 32
MAX_PIECE = 2**20  # packs or positions: a piece's offsets fit 32 bits, its count is exact in float32
MASK_BITS = 8

Numbers = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Cut:
    """The cut of a tensor into items. fused: the pieces of a set or tile are neighbours and belong to a gang."""

    shape: Shape
    rows: bool
    pack: int
    pieces: int
    piece_runs: int
    piece_length: int
    tile: int
    items: int
    fused: bool

    def of_rows(self) -> Iterator[tuple[Numbers, Numbers, Numbers]]:
        """Item, first address and length of all contiguous memory that the items read."""
        shape, (count, length, stride) = self.shape, self.shape.runs
        run_packs = length // self.pack
        per_run = div_up(run_packs, self.piece_length) if self.piece_runs == 1 else 1
        base = np.arange(shape.sets) * (shape.S if shape.kind == BATCH else shape.set_size)
        for piece in range(self.pieces):
            first_run, first_pack = piece // per_run * self.piece_runs, piece % per_run * self.piece_length
            runs = first_run + np.arange(min(self.piece_runs, count - first_run))
            packs = min(self.piece_length, run_packs - first_pack)
            starts = base[:, None] + runs * stride + first_pack * self.pack
            items = np.broadcast_to(np.arange(shape.sets)[:, None] * self.pieces + piece, starts.shape)
            yield items.ravel(), starts.ravel(), np.full(starts.size, packs * self.pack)

    def of_columns(self) -> Iterator[tuple[Numbers, Numbers, Numbers]]:
        """The same; items are [outer, tiles, pieces] where fused, else [outer, pieces, tiles]."""
        shape, tiles = self.shape, div_up(self.shape.C, self.tile)
        tile = np.arange(tiles)
        channel = tile * self.tile
        widths = np.minimum(self.tile, shape.C - channel)
        for outer in range(shape.outer):
            for piece in range(self.pieces):
                first = piece * self.piece_length
                position = np.arange(first, min(first + self.piece_length, shape.positions))
                starts = (outer * shape.positions + position[:, None]) * shape.C + channel
                in_outer = tile * self.pieces + piece if self.fused else piece * tiles + tile
                items = outer * self.pieces * tiles + in_outer
                item, _, width = np.broadcast_arrays(items, starts, widths)
                yield item.ravel(), starts.ravel(), width.ravel()


@functools.cache
def check_every_element_once(cut: Cut) -> None:
    """Walks the items: their memory makes up the tensor without gap or overlap, and stays within their set. One gang
    has a fused set."""
    shape = cut.shape
    parts = zip(*(cut.of_rows() if cut.rows else cut.of_columns()), strict=True)
    items, starts, lengths = (np.concatenate(part) for part in parts)
    assert (lengths > 0).all() and (starts % cut.pack == 0).all() and (lengths % cut.pack == 0).all()
    assert np.array_equal(np.unique(items), np.arange(cut.items))
    order = np.argsort(starts)
    ends = (starts + lengths)[order]
    assert starts[order][0] == 0 and ends[-1] == shape.numel
    assert (ends[:-1] == starts[order][1:]).all()
    first, last = shape.set_of(starts), shape.set_of(starts + lengths - 1)
    if cut.rows:
        assert (first == items // cut.pieces).all() and (last == first).all()
    elif cut.fused:
        gangs = np.tile(items // cut.pieces, 2)
        sets = np.unique(np.stack([np.concatenate([first, last]), gangs]), axis=1)[0]
        assert np.unique(sets).size == sets.size


def check_rows(grid: _C.Grid, shape: Shape) -> int:
    """Returns the number of contiguous pieces of memory that the items read."""
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
    # With rows in registers it can be several warps of a block.
    assert grid.threads_x * grid.pack >= MASK_BITS
    if grid.thread_packs > 0 and grid.threads_x > WARP:
        assert grid.threads_x % WARP == 0
    else:
        assert grid.threads_x & (grid.threads_x - 1) == 0
        assert grid.threads_x <= WARP or grid.threads_y == 1
    least = MASK_BITS if grid.gang == "block" else WARP
    assert grid.threads_x <= max(least, 2 * grid.piece_runs * grid.piece_length)
    return shape.sets * count + grid.items


def check_columns(grid: _C.Grid, outer: int, positions: int, C: int) -> int:
    assert C % grid.pack == 0
    tiles = div_up(C, grid.tile)
    assert grid.piece_runs == 1
    assert (grid.pieces - 1) * grid.piece_length < positions <= grid.pieces * grid.piece_length
    assert 1 <= grid.piece_length <= min(positions, MAX_PIECE)
    assert grid.items == outer * grid.pieces * tiles
    assert grid.tile == C or (grid.tile % MASK_BITS == 0 and grid.tile < C)
    assert grid.tile % grid.pack == 0 and grid.tile <= grid.threads_x * grid.pack
    assert grid.threads_x * grid.pack >= MASK_BITS and grid.threads_x & (grid.threads_x - 1) == 0
    return outer * positions * tiles
