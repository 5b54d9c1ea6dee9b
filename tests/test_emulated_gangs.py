"""Fused kernels whose sets are shared by several blocks, clusters or the whole grid, and those that keep rows in
registers: the same values as torch.nn, the same bits under every schedule, every tensor moved once, one launch; and
what happens where a device refuses gangs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch

from fastnorm import _C
from tests.common.cases import Case, Layer
from tests.common.gangs import FEW, GANG_EPILOGUES, GANG_LAYERS, GANG_PRECISIONS, GangCase, facts_of
from tests.common.numerics import build, make_inputs, measure, scale_of, truth
from tests.common.plan_model import DTYPES, Shape
from tests.common.raw_calls import RawCall, same_bits
from tests.emulator import backend as emulator

pytestmark = pytest.mark.emulator

CPU = torch.device("cpu")
SCHEDULES = (("lifo", 0), ("random", 1), ("random", 2), ("priority", 1), ("priority", 2))

GANGS = (
    {"gang": "cluster", "pieces": 2},
    {"gang": "cluster", "pieces": 5},
    {"gang": "cluster", "pieces": 16},
    {"gang": "grid", "stages": 1},
    {"gang": "grid", "stages": 2},
    {"gang": "grid", "stages": 2, "pieces": 3},
    {"gang": "block", "stages": 2},
)
# Channels last: exchanges of both kinds, and pieces of which a part is read twice.
CHANNELS = (
    {"exchange": "scatter", "stages": 1},
    {"exchange": "scatter", "stages": 2},
    {"exchange": "gather", "staged_length": 64, "pieces": 2},
    {"exchange": "scatter", "staged_length": 130, "pieces": 2},
    {"exchange": "scatter", "staged_length": 64, "pieces": 3},
)
CHANNELS_LAYERS = (
    Layer("", "BatchNorm2d", (5, 24, 8, 8), (24,)),
    Layer("", "BatchNorm1d", (401, 16), (16,)),
    Layer("", "GroupNorm", (2, 32, 17, 13), (4, 32)),
)
# Planar, the samples as rows of columns: packs that lie in two runs, or in several; two tiles.
SAMPLES_LAYERS = (
    Layer("", "BatchNorm2d", (9, 16, 7, 7), (16,)),
    Layer("", "BatchNorm2d", (70, 16, 7, 7), (16,)),
    Layer("", "BatchNorm1d", (6, 40, 3), (40,)),
)
SAMPLES = tuple({"traversal": "columns", **gang} for gang in ({"gang": "block", "stages": 1}, *GANGS))
# Teams of every kind: part of a warp, a warp, several of several warps, a block; rows that leave lanes idle.
REGISTER_LAYERS = tuple(
    Layer("", "LayerNorm", (rows, size), (size,))
    for rows, size in ((300, 16), (70, 96), (33, 512), (29, 768), (11, 1040), (6, 2048), (7, 4096), (3, 8192), (1, 64))
)
PLACES = (
    {"place": "registers", "stages": 1},
    {"place": "registers", "stages": 2},
    {"place": "registers"},
    {"place": "shared", "gang": "block"},
)


FACTS = facts_of(FEW)
UNROLL = 4  # kRowsUnroll and kMomentsRows in csrc/cuda, where packs have several elements
LONG_GANGS = (
    *({"gang": "block", "stages": stages} for stages in (1, 2)),
    *({"gang": gang, "pieces": 2, "stages": stages} for gang in ("cluster", "grid") for stages in (1, 2)),
)
NUMBERS = itertools.count(1)


def cases() -> Iterator[GangCase]:
    """Every layer, layout and gang; precisions and epilogues in turn."""
    precisions, epilogues = itertools.cycle(GANG_PRECISIONS), itertools.cycle(GANG_EPILOGUES)
    turns = (
        *itertools.product(GANG_LAYERS, GANGS),
        *itertools.product(REGISTER_LAYERS, PLACES),
        *itertools.product(CHANNELS_LAYERS, CHANNELS),
        *itertools.product(SAMPLES_LAYERS, SAMPLES),
    )
    for layer, gang in turns:
        for layout in layer.layouts:
            activation, residual = next(epilogues)
            case = Case(layer, layout, next(precisions), activation, residual)
            yield GangCase(case, {"strategy": "fused", **gang}, 0)


def long_cases() -> Iterator[GangCase]:
    """Pieces of three and a part of the rounds that a block copies at a time, in several waves."""
    epilogues = itertools.cycle(((None, False), ("relu", True), ("silu", False), ("leaky_relu", False)))
    for gang in LONG_GANGS:
        pieces = int(gang.get("pieces", 1))
        sets = 4 - pieces
        layers = (
            (Layer("long", "BatchNorm2d", (8 * pieces, sets, 32, 50), (sets,)), "planar", "float32"),
            (Layer("long", "GroupNorm", (sets, 8 * pieces, 32, 100), (1, 8 * pieces)), "planar", "bfloat16"),
            (Layer("long", "LayerNorm", (sets, 12800 * pieces), (12800 * pieces,)), "planar", "float32"),
            (Layer("long", "BatchNorm2d", (pieces, 16 * sets, 20, 40), (16 * sets,)), "channels_last", "float32"),
            (Layer("long", "GroupNorm", (1, 32 * sets, 20 * pieces, 40), (4 * sets, 32 * sets)), "channels_last",
             "float16"),
        )  # fmt: skip
        for layer, layout, dtype in layers:
            activation, residual = next(epilogues)
            case = Case(layer, layout, (dtype, "float32"), activation, residual)
            yield GangCase(case, {"strategy": "fused", "blocks_per_sm": 2, "tile_bytes": 64, **gang}, 0)


SERVED = [found for found in cases() if found.plans(FACTS)]


@pytest.mark.parametrize("gang_case", SERVED, ids=lambda gang_case: gang_case.id)
def test_values_schedules_and_traffic(gang_case: GangCase) -> None:
    check_on(gang_case, FEW)


@pytest.mark.parametrize("gang_case", list(long_cases()), ids=lambda gang_case: gang_case.id)
def test_long_pieces(gang_case: GangCase) -> None:
    """All four copy groups have a round, forward and backward, on two SMs with room for long pieces."""
    wide = emulator.load().device("wide")
    plans = gang_case.plans(facts_of(wide))
    assert plans is not None
    for grid in (plans[0].grid, plans[1].reduce):
        rows = grid.traversal == "rows"
        together = UNROLL * (grid.threads_x if rows else grid.threads_y)
        rounds = -(-grid.piece_runs * grid.piece_length // together)
        assert grid.pack > 1 and rounds > 3 * -(-rounds // 4), "the last copy group is empty"
        assert grid.stages == 1 or grid.items > grid.blocks
    check_on(gang_case, wide)


def check_on(gang_case: GangCase, device: emulator.Device) -> None:
    case, forced, _ = gang_case
    settings, inputs = emulator.load(), make_inputs(case, CPU)
    call = RawCall(case, inputs, torch.ops.fastnorm_emulated)
    found = gang_case.plans(facts_of(device))
    assert found is not None
    forward, backward = found
    with settings.configured(device=device, forced=forced):
        with settings.counting() as forward_counts:
            saved = call.forward()
        with settings.counting() as backward_counts:
            call.backward(saved["stats"], saved["mask"])
        results = call.both()
    for order, seed in SCHEDULES:
        with settings.configured(order, seed, device, forced=forced):
            assert not same_bits(call.both(), results), f"{order}, seed {seed}: {forward}, {backward}"

    exact = truth(case, build(case, torch.nn, CPU), inputs)
    for key in ("y", "dx", "dweight", "dbias", "dresidual"):
        if key not in exact.values or results[key].numel() == 0:
            continue
        value, ours = exact.values[key], results[key].view(exact.values[key].shape)
        error = measure(key, ours, ours, value, scale_of(key, exact, plain=False))
        assert error.ours <= 5, f"{error}: {forward}, {backward}"

    size = DTYPES[case.precision[0]]
    tensor, bits = call.x.numel() * DTYPES[case.precision[0]], saved["mask"].numel() > 0
    assert (
        forward_counts.traffic.read_stream == (1 + case.residual) * tensor + read_again(forward.grid, call.shape) * size
    )
    recomputes = case.residual and case.activation is not None and not bits
    # How often the mask is read. The gradient through a relu replaces dy in shared memory.
    again = read_again(backward.reduce, call.shape)
    twice = 1 if backward.reduce.thread_packs > 0 else 2
    times = {"relu": 2 if again else 1, "leaky_relu": twice}.get(case.activation or "", 0) * bits
    reads = (2 + recomputes) * (tensor + again * size) + times * call.x.numel() // backward.reduce.pack
    if backward.param_sums == "own_launch":
        reads += (2 + recomputes) * tensor + bits * call.x.numel() // backward.params.pack
    assert backward_counts.traffic.read_stream == reads, backward
    writes = 1 + (case.activation is not None)
    assert backward_counts.traffic.written_stream == writes * tensor, backward
    for counts, grid in ((forward_counts, forward.grid), (backward_counts, backward.reduce)):
        assert counts.launches[0].cluster == (grid.pieces if grid.gang == "cluster" else 1)
        assert (counts.launches[0].blocks, counts.launches[0].shared_bytes) == (grid.blocks, grid.shared_bytes)
    assert len(forward_counts.launches) == 1 and forward_counts.launches[0].cooperative == (forward.grid.gang == "grid")
    assert len(backward_counts.launches) == backward.launches
    if backward.param_sums != "own_launch":
        assert backward.launches == 1, backward


def read_again(grid: _C.Grid, shape: Shape) -> int:
    """Elements of a tensor beyond what the blocks keep in shared memory."""
    if grid.traversal == "rows":
        return 0
    shape = shape.walked_as("columns")
    pieces = (min(grid.piece_length, shape.positions - i * grid.piece_length) for i in range(grid.pieces))
    return shape.outer * shape.C * sum(max(0, positions - grid.staged_length) for positions in pieces)


def test_every_gang_is_met() -> None:
    seen = set()
    for gang_case in SERVED:
        found = gang_case.plans(FACTS)
        assert found is not None
        case = gang_case.case
        for grid in (found[0].grid, found[1].reduce):
            waves = -(-grid.items // grid.blocks)
            seen |= {
                (grid.traversal, grid.gang, grid.stages),
                (grid.gang, "waves" if waves > 1 else "one wave"),
                (grid.gang, "runs" if grid.piece_runs > 1 else "parts"),
                (grid.gang, grid.pack),
                (case.layout, grid.traversal, grid.gang),
                (found[1].param_sums, grid.gang),
                (grid.exchange, "rereads" if 0 < grid.staged_length < grid.piece_length else "staged"),
                (grid.exchange, grid.pack),
            }
            if grid.thread_packs > 0:
                team = "part" if grid.threads_x < 32 else "warp" if grid.threads_x == 32 else "warps"
                seen |= {
                    ("registers", case.precision[0], grid.stages),
                    ("registers", case.activation, case.residual),
                    ("registers", team, "several" if grid.threads_y > 1 else "one"),
                    ("registers", "waves" if waves > 1 else "one wave"),
                    ("registers", "full" if grid.threads_x * grid.thread_packs == grid.piece_length else "idle lanes"),
                }
    walks = {(t, g, b) for t in ("rows", "columns") for g, b in (("cluster", 1), ("grid", 1), ("grid", 2))}
    walks |= {("planar", "columns", gang) for gang in ("block", "cluster", "grid")}
    gangs = ("cluster", "grid")
    wanted = walks | {(g, w) for g in gangs for w in ("one wave", "runs", "parts", 8, 4, 1)} | {("grid", "waves")}
    wanted |= {(p, g) for p in ("from_cells", "in_gang") for g in gangs}
    wanted |= {("gather", "rereads"), ("scatter", "rereads"), ("scatter", "staged"), ("scatter", 4), ("scatter", 8)}
    wanted |= {("registers", dtype, stages) for dtype, _ in GANG_PRECISIONS for stages in (1, 2)}
    wanted |= {("registers", *epilogue) for epilogue in GANG_EPILOGUES}
    wanted |= {("registers", "part", "several"), ("registers", "warp", "several"), ("registers", "warps", "several")}
    wanted |= {("registers", "warps", "one")} | {("registers", w) for w in ("waves", "one wave", "full", "idle lanes")}
    assert wanted <= seen, wanted - seen


def call_on_gangs() -> RawCall:
    """A call whose sets fit no block of FEW, so that the plans have gangs, forward and backward."""
    case = Case(Layer("", "GroupNorm", (2, 4, 64, 96), (2, 4)))
    call = RawCall(case, make_inputs(case, CPU), torch.ops.fastnorm_emulated)
    geometry = call.shape.geometry
    assert _C.plan_forward(geometry, "float32", FACTS).grid.gang != "block"
    assert _C.plan_backward(geometry, "float32", FACTS).grid_sync
    return call


def another_few() -> emulator.Device:
    """A device like FEW for which no plan has been made before."""
    return dataclasses.replace(FEW, l2_bytes=FEW.l2_bytes + next(NUMBERS))


def test_a_device_that_refuses_gangs_is_served_without(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As one that is shared or partitioned does: nothing of the refused launch has run, and the values are those of a
    device that never had them. Refusals are counted; a call that was refused once is not tried again."""
    monkeypatch.setenv("FASTNORM_STRICT", "0")
    monkeypatch.delenv("FASTNORM_LOG", raising=False)
    settings = emulator.load()
    call = call_on_gangs()
    # One in forward. In backward, clusters that sync as a grid are first tried as clusters alone.
    refusals = 2 + (_C.plan_backward(call.shape.geometry, "float32", FACTS).reduce.gang == "cluster")
    without = dataclasses.replace(FEW, cooperative=False, largest_cluster=1)
    with settings.configured(device=without):
        expected = call.both()
    before = settings.refused_gangs()
    with settings.configured(device=another_few(), refuses="gangs"), settings.counting() as counts:
        results = call.both()
        assert settings.refused_gangs() == before + refusals
        call.both()
        assert settings.refused_gangs() == before + refusals
    assert not same_bits(results, expected)
    assert not any(launch.cooperative or launch.cluster > 1 for launch in counts.launches)
    assert capfd.readouterr().err == ""


def test_a_refusal_is_an_error_where_fallbacks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTNORM_STRICT=1; not of the kind that means "torch should serve the call"."""
    settings = emulator.load()
    call = call_on_gangs()
    with settings.configured(device=another_few(), refuses="gangs"):
        monkeypatch.setenv("FASTNORM_STRICT", "1")
        before = settings.refused_gangs()
        for attempt in (1, 2):
            with pytest.raises(RuntimeError, match=r"refused .* forward .*; planned fused: .*FASTNORM_STRICT") as error:
                call.forward()
            assert not isinstance(error.value, NotImplementedError)
            assert settings.refused_gangs() == before + attempt
        monkeypatch.setenv("FASTNORM_STRICT", "0")
        assert call.forward()["y"].isfinite().all() and settings.refused_gangs() == before + 3


def test_the_first_refusal_of_a_kind_is_printed_where_fallbacks_are(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """FASTNORM_LOG=fallback: a line for forward and one for backward, with the plan in words."""
    settings = emulator.load()
    call = call_on_gangs()
    monkeypatch.setenv("FASTNORM_STRICT", "0")
    monkeypatch.setenv("FASTNORM_LOG", "fallback")
    for _ in range(2):
        with settings.configured(device=another_few(), refuses="gangs"):
            call.both()
    lines = [line for line in capfd.readouterr().err.splitlines() if "refused" in line]
    assert len(lines) == 2, lines
    for line, direction in zip(lines, ("forward", "backward"), strict=True):
        assert f"a {direction} launch" in line and "planned fused: " in line and " blocks, a piece each of " in line


def test_a_refusal_ends_a_capture_with_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that was to replace the refused one fails too, and its error alone would say nothing."""
    monkeypatch.setenv("FASTNORM_STRICT", "0")
    settings = emulator.load()
    call, device = call_on_gangs(), another_few()
    with settings.configured(device=device, refuses="gangs in a capture"):
        with pytest.raises(RuntimeError, match=r"previous error during capture, after .* refused .* forward") as error:
            call.forward()
        assert "too many blocks" in str(error.value) and "once before it begins" in str(error.value)
    with settings.configured(device=device, refuses="gangs"):
        call.both()  # before the capture, as the error says
    with settings.configured(device=device, refuses="gangs in a capture"):
        assert call.forward()["y"].isfinite().all()


@pytest.mark.parametrize("refused", [False, True], ids=["by its facts", "by a refusal"])
def test_clusters_that_cannot_sync_as_a_grid(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver may not know clusters in cooperative launches. The gradients of the weights are then folded by a launch
    of its own; gangs stay, and the values too."""
    monkeypatch.setenv("FASTNORM_STRICT", "0")
    settings = emulator.load()
    case = Case(Layer("", "GroupNorm", (2, 12, 16, 16), (4, 12)), activation="silu")
    call = RawCall(case, make_inputs(case, CPU), torch.ops.fastnorm_emulated)
    forced: dict[str, str | int] = {"strategy": "fused", "gang": "cluster", "pieces": 2}
    with settings.configured(device=FEW, forced=forced), settings.counting() as counts:
        expected = call.both()
    assert [(launch.cluster, launch.cooperative) for launch in counts.launches] == [(2, False), (2, True)]
    facts = dataclasses.replace(another_few(), cooperative_clusters=refused)
    refuses = "cooperative clusters" if refused else "nothing"
    before = settings.refused_gangs()
    with settings.configured(device=facts, forced=forced, refuses=refuses), settings.counting() as counts:
        results = call.both()
        call.both()
    assert settings.refused_gangs() == before + refused
    assert [(launch.cluster, launch.cooperative) for launch in counts.launches] == 2 * [
        (2, False),
        (2, False),
        (1, False),
    ]
    assert not same_bits(results, expected)


def test_free_sms_are_left_alone() -> None:
    settings = emulator.load()
    case = Case(GANG_LAYERS[1])
    call = RawCall(case, make_inputs(case, CPU), torch.ops.fastnorm_emulated)
    forced = {"gang": "grid", "blocks_per_sm": 1}
    blocks = []
    for free in (0, 2):
        with settings.configured(device=FEW, forced=forced, free_sms=free), settings.counting() as counts:
            call.forward()
        blocks.append(counts.launches[0].blocks)
    assert blocks[1] <= FEW.num_sms - 2 < blocks[0]
