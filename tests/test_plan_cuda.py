"""The CUDA planner: its promises for any geometry on any device, and its choices for real shapes, which are reviewed
when they change.

`python -m tests.test_plan_cuda` writes plans_cuda.txt anew.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnorm import _C
from tests.common.cases import BENCH, LAYERS, MAPS, Layer
from tests.common.plan_checks import check_everywhere
from tests.common.plan_model import (
    BATCH,
    DEVICES,
    DTYPES,
    GROUP,
    LAYER,
    Call,
    Shape,
    div_up,
    random_call,
    shape_of,
    words,
)

GOLDEN = Path(__file__).with_name("plans_cuda.txt")


@pytest.mark.parametrize("seed", range(8))
def test_promises(seed: int) -> None:
    r = random.Random(seed)
    for _ in range(250):
        call = random_call(r)
        try:
            check_everywhere(call)
        except AssertionError as error:
            raise AssertionError(f"{call}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [Shape(GROUP, 2**27, 2**13, 4, 2**10, True),
     Shape(GROUP, 2**27, 3, 7, 1, True), Shape(GROUP, 2**24, 640, 9, 640, False),
     Shape(LAYER, 2**40, 16, 1, 1, False), Shape(BATCH, 4, 2**36, 8, 2**36, False),
     Shape(BATCH, 4, 2**42, 1, 2**42, False)],
    ids=str,
)  # fmt: skip
def test_more_items_than_a_grid_has_blocks(shape: Shape, dtype: str) -> None:
    for frozen in {False, shape.kind == BATCH}:
        check_everywhere(Call(shape, dtype, 16, False, frozen, True, True))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.randoms(use_true_random=False))
def test_promises_of_awkward_numbers(r: random.Random) -> None:
    """hypothesis draws the numbers behind the sizes, and shrinks what fails."""
    check_everywhere(random_call(r))


def choices_of(call: Call, forward: _C.ForwardPlan, backward: _C.BackwardPlan) -> Iterator[object]:
    yield from ((forward.strategy, forward.grid.traversal), (backward.strategy, call.shape.traversal))
    yield (backward.strategy, backward.param_sums)
    for grid in (forward.grid, backward.reduce):
        yield from ((grid.gang, grid.traversal), (grid.gang, grid.stages), (grid.gang, grid.pack))
        if grid.gang != "block":
            yield (grid.gang, "waves" if grid.items > grid.blocks else "one wave")
            yield (grid.gang, "runs" if grid.piece_runs > 1 else "parts of runs")
    grid = forward.grid
    named = {
        "pieces of runs": grid.piece_runs > 1 and grid.pieces > 1,
        "parts of runs": grid.pieces > call.shape.runs[0],
        "teams": grid.threads_y > 1,
        "registers": grid.thread_packs > 0,
        "registers in backward": backward.reduce.thread_packs > 0,
        "registers of several teams of warps": any(
            each.thread_packs > 0 and each.threads_y > 1 and each.threads_x > 32 for each in (grid, backward.reduce)
        ),
        "segments": backward.units.segments > 1,
        "grid_sync": backward.grid_sync,
        "grid sync of clusters": backward.grid_sync and backward.reduce.gang == "cluster",
        "huge": call.shape.numel > 2**33,
    }
    yield from (name for name, holds in named.items() if holds)


def test_the_sweep_reaches_every_choice() -> None:
    """Else the promises above would say less than they seem to."""
    seen: set[object] = set()
    r = random.Random(0)
    for _ in range(1000):
        call = random_call(r)
        for facts in DEVICES.values():
            seen.update(choices_of(call, call.forward(facts), call.backward(facts)))
    gangs, several = ("block", "cluster", "grid"), ("cluster", "grid")
    wanted: set[object] = set(product(("fused", "split", "apply"), ("rows", "columns")))
    wanted |= set(product(gangs, ("rows", "columns", 1, 2, 4, 8)))
    wanted -= {("grid", 2), ("cluster", 2)}  # never the cheapest; test_plan_choices.py checks what is not chosen
    wanted |= set(product(several, ("one wave", "waves", "runs", "parts of runs")))
    wanted |= set(product(("fused", "split"), ("none", "from_cells", "own_launch"))) | {
        ("fused", "in_gang"),
        ("apply", "none"),
    }
    wanted |= {"pieces of runs", "parts of runs", "teams", "segments", "grid_sync", "grid sync of clusters", "huge"}
    wanted |= {"registers", "registers of several teams of warps", "registers in backward"}
    assert wanted <= seen, wanted - seen


@pytest.mark.parametrize("layer", [*LAYERS, *MAPS], ids=lambda layer: layer.id)
def test_every_case_of_the_parity_table(layer: Layer) -> None:
    """The shapes that the kernels are tested on, with all that can be asked for."""
    for layout in layer.layouts:
        shape = shape_of(layer, layout)
        for dtype, size in DTYPES.items():
            for alignment in {size, 16}:
                for frozen in {False, shape.kind == BATCH}:
                    for needs in ((True, True), (True, False), (False, True)):
                        check_everywhere(Call(shape, dtype, alignment, True, frozen, *needs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_width(dtype: str) -> None:
    """Packs have 16 bytes where runs and addresses allow, in rows also 8; else they are single elements."""
    size = DTYPES[dtype]
    for run in range(1, 33):
        for alignment in (16, 8, 4, 2):
            if alignment < size:
                continue
            for last in (False, True):
                shape = Shape(BATCH, 2, run, 5, run, True) if last else Shape(GROUP, 2, 6, run, 3, False)
                widths = [16 // size] if last else [16 // size, 8 // size]
                fits = [w for w in widths if w in (4, 8) and run % w == 0 and w * size <= alignment]
                # One position of a channel is a row of channels.
                if not last and run == 1:
                    fits = []
                assert _C.pack_width(shape.geometry, dtype, alignment) == max(fits, default=1)


@pytest.mark.parametrize(
    ("layer", "layout"),
    [(Layer("", "GroupNorm", (1, 128, 20, 256, 256), (32, 128)), "planar"),
     (Layer("", "BatchNorm2d", (256, 64, 112, 112), (64,)), "planar"),
     (Layer("", "BatchNorm2d", (256, 64, 112, 112), (64,)), "channels_last"),
     (Layer("", "InstanceNorm3d", (1, 2, 192, 192, 192), (2,)), "planar"),
     (Layer("", "LayerNorm", (2, 1 << 22), (1 << 22,)), "planar")],
    ids=lambda value: value if isinstance(value, str) else value.id,
)  # fmt: skip
def test_few_large_sets_fill_the_device(layer: Layer, layout: str) -> None:
    """One block a set is what torch launches, and reaches 3% of an H200."""
    call = Call(shape_of(layer, layout), "bfloat16", 16, False, False, True, True)
    for facts in DEVICES.values():
        forward, backward = call.forward(facts), call.backward(facts)
        grids = ((forward.strategy, forward.grid), (backward.strategy, backward.reduce))
        for strategy, grid in (*grids, (backward.strategy, backward.apply)):
            if strategy == "split":
                assert grid.blocks >= 4 * facts.num_sms and div_up(grid.items, grid.blocks) == 1
            elif grid.items > 0:
                assert grid.gang != "block" and 4 * grid.blocks >= 3 * facts.num_sms


# ---- the golden table ----

REAL = (
    *BENCH,
    *(dataclasses.replace(layer, shape=(256, *layer.shape[1:])) for layer in BENCH if layer.label == "ResNet-50"),
    Layer("VAE", "GroupNorm", (1, 128, 20, 256, 256), (32, 128), (), ("silu",)),
    Layer("VAE", "GroupNorm", (1, 512, 64, 64), (32, 512), (), ("silu",)),
    Layer("nnU-Net", "InstanceNorm3d", (2, 32, 128, 128, 128), (32,), (("affine", True),)),
    Layer("nnU-Net", "InstanceNorm3d", (2, 320, 8, 8, 8), (320,), (("affine", True),)),
    Layer("transformer", "LayerNorm", (1024, 12288), (12288,)),
    Layer("transformer", "LayerNorm", (16384, 4096), (4096,)),
    *(Layer("ConvNeXt", "LayerNorm2d", (32, c, s, s), (c,)) for c, s in ((96, 56), (192, 28), (384, 14), (768, 7))),
    Layer("SAM", "LayerNorm2d", (1, 256, 64, 64), (256,)),
)


def table() -> str:
    """Forward in training; backward for input and parameters, no residual. Without estimates: a constant that changes
    would change every line."""
    lines = []
    for layer in REAL:
        for layout in layer.layouts:
            shape = shape_of(layer, layout)
            lines.append(f"{layer.label}: {shape.geometry}")
            for dtype in ("bfloat16", "float32"):
                for name in ("H200", "T4"):
                    call = Call(shape, dtype, 16, False, False, True, True)
                    where = f"{dtype} {name}"
                    lines.append(f"  {where:<14} forward   {words(call.forward(DEVICES[name]))}")
                    lines.append(f"  {where:<14} backward  {words(call.backward(DEVICES[name]))}")
    return "\n".join(lines) + "\n"


def test_real_shapes() -> None:
    assert table() == GOLDEN.read_text(), "plans have changed: review, then `python -m tests.test_plan_cuda`"


def test_geometries_and_devices_give_back_what_they_were_made_of() -> None:
    """By names that follow from one list of fields."""
    geometry = Shape(GROUP, 2, 8, 4, 2, True).geometry
    assert [getattr(geometry, name) for name in ("kind", "N", "C", "S", "G", "channels_last")] == [
        "group", 2, 8, 4, 2, True
    ]  # fmt: skip
    assert geometry == Shape(GROUP, 2, 8, 4, 2, True).geometry != Shape(GROUP, 2, 8, 4, 4, True).geometry
    facts = DEVICES["H200"]
    names = [name for name in dir(facts) if not name.startswith("_")]
    assert len(names) == 12 and (facts.num_sms, facts.cluster_sms, facts.cooperative) == (132, 128, True)
    numbers = {name: getattr(facts, name) for name in names}
    assert _C.DeviceInfo(**numbers) == facts
    for name in names:
        other = not numbers[name] if isinstance(numbers[name], bool) else numbers[name] + 1
        assert _C.DeviceInfo(**numbers | {name: other}) != facts, name


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'rows', expected one of batch, group, layer"):
        _C.Geometry("rows", 2, 8, 4)


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"int8.*float32"):
        _C.plan_forward(Shape(BATCH, 2, 8, 4, 8, False).geometry, "int8", DEVICES["H200"])


if __name__ == "__main__":
    GOLDEN.write_text(table())
