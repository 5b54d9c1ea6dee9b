"""The bytes that the CUDA kernels move through global memory, as the emulator counts them: exactly those of the plan. A
fused plan moves every tensor once. Parameters, statistics and partials are small and not in these numbers."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch

from fastnorm import _C
from tests.common.cases import BENCH, LAYERS, MAPS, Case, Layer
from tests.common.gangs import facts_of
from tests.common.numerics import make_inputs
from tests.common.plan_model import DTYPES, Shape, div_up
from tests.common.raw_calls import RawCall
from tests.conftest import EMULATED, Backend
from tests.emulator import backend as emulator

pytestmark = pytest.mark.emulator

CPU = torch.device("cpu")
PRECISIONS = (("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16"), ("float64", "float64"))
EPILOGUES = ((None, False), ("silu", False), ("relu", True), ("silu", True), (None, True))


@pytest.fixture(params=EMULATED, ids=lambda backend: backend.id)
def emulated(request: pytest.FixtureRequest) -> Backend:
    return request.param


def cases_of(layer: Layer, frozen: bool) -> list[Case]:
    return [
        Case(layer, layout, precision, activation, residual, "frozen" if frozen else "train")
        for layout in layer.layouts
        for precision in PRECISIONS
        for activation, residual in EPILOGUES
    ]


def mask_written(shape: Shape) -> int:
    """One bit per element; every run has bytes of its own."""
    return shape.N * shape.C * shape.S // shape.mask_run * div_up(shape.mask_run, 8)


def read_again(grid: _C.Grid) -> Fraction:
    """The part of x that is not kept in shared memory from the first read to the last."""
    beyond = grid.piece_length - grid.staged_length if grid.traversal == "columns" else 0
    return Fraction(beyond, grid.piece_length)


def check_forward(settings: emulator.Emulator, call: RawCall, facts: _C.DeviceInfo) -> dict[str, torch.Tensor]:
    case, shape = call.case, call.shape
    plan = _C.plan_forward(
        shape.geometry,
        case.precision[0],
        facts,
        frozen=call.frozen,
        residual=case.residual,
        activation=case.activation or "none",
    )
    with settings.counting() as counts:
        outputs = call.forward()
    tensor = call.x.numel() * DTYPES[case.precision[0]]
    reads_of_x = {"fused": 1 + read_again(plan.grid), "split": 2, "apply": 1}[plan.strategy]
    masked = case.residual and case.activation == "relu"
    what = f"{case.id}: {plan}"
    assert counts.traffic.read_stream == (reads_of_x + case.residual) * tensor, what
    assert counts.traffic.written_stream == tensor + (mask_written(shape) if masked else 0), what
    assert len(counts.launches) == plan.launches == {"fused": 1, "split": 3, "apply": 1}[plan.strategy], what
    main = counts.launches[0]
    grid = plan.grid
    assert (main.blocks, main.threads) == (grid.blocks, grid.threads_x * grid.threads_y), what
    if plan.strategy != "apply":
        assert main.shared_bytes == grid.shared_bytes, what
    return outputs


def check_backward(
    settings: emulator.Emulator,
    call: RawCall,
    facts: _C.DeviceInfo,
    saved: dict[str, torch.Tensor],
    needs: tuple[bool, bool, bool],
) -> None:
    case, shape = call.case, call.shape
    masked = saved["mask"].numel() > 0
    recomputes = case.residual and case.activation is not None and not masked
    writes = needs[0] + (needs[2] and case.activation is not None)
    params = needs[1] and call.weight is not None
    if not writes and not params:
        return
    plan = _C.plan_backward(
        shape.geometry,
        case.precision[0],
        facts,
        residual=recomputes,
        mask=masked,
        frozen=call.frozen,
        input=writes > 0,
        dresidual=writes > 1,
        params=params,
        activation=case.activation or "none",
    )
    with settings.counting() as counts:
        call.backward(saved["stats"], saved["mask"], needs)
    size = DTYPES[case.precision[0]]
    tensor = call.x.numel() * size
    read = 0
    for grid in (plan.reduce, plan.apply, plan.params):
        if grid.items > 0:  # dy and x, and what z is made of: the residual, or a byte of the mask for every pack
            read += (2 + recomputes) * tensor + (call.x.numel() // grid.pack if masked else 0)
    if plan.strategy == "fused" and writes:
        read += read_again(plan.reduce) * (2 + recomputes) * tensor
        if masked and shape.of_positions:
            read += call.x.numel() // plan.reduce.pack
    what = f"{case.id}, needs {needs}: {plan}"
    assert counts.traffic.read_stream == read, what
    assert counts.traffic.written_stream == writes * tensor, what
    if plan.strategy != "apply":
        grids = [plan.reduce, plan.params] if plan.strategy == "split" else [plan.reduce]
        assert counts.launches[0].blocks == sum(grid.blocks for grid in grids if grid.items > 0), what
        assert all(counts.launches[0].threads == grid.threads for grid in grids if grid.items > 0), what
    # One when x is read once, and never more than reduce, fold and apply.
    assert len(counts.launches) == plan.launches <= 3, what
    if plan.strategy == "fused" and plan.param_sums != "own_launch" and facts.cooperative:
        assert plan.launches == 1, what


@pytest.mark.parametrize("layer", [*LAYERS, *MAPS], ids=lambda layer: layer.id)
def test_bytes_are_the_plans(layer: Layer, emulated: Backend) -> None:
    settings = emulator.load()
    facts = facts_of(settings.device(emulated.plays))
    tracks = layer.norm.startswith("Batch") and dict(layer.kwargs).get("track_running_stats", True)
    with settings.configured(device=emulated.plays):
        for frozen in {False, bool(tracks)}:
            for i, case in enumerate(cases_of(layer, frozen)):
                call = RawCall(case, make_inputs(case, CPU), torch.ops.fastnorm_emulated)
                saved = check_forward(settings, call, facts)
                check_backward(settings, call, facts, saved, (True, True, True))
                needs = [(True, False, False), (False, True, False), (False, False, True)][i % 3]
                check_backward(settings, call, facts, saved, needs)


def test_both_devices_are_of_use() -> None:
    """Between them the cases combine every strategy and traversal with every epilogue."""
    settings = emulator.load()
    seen = set()
    for backend in EMULATED:
        facts = facts_of(settings.device(backend.plays))
        for layer in LAYERS:
            for case in cases_of(layer, frozen=False):
                call = RawCall(case, make_inputs(case, CPU))
                geometry, dtype = call.shape.geometry, case.precision[0]
                activation = case.activation or "none"
                forward = _C.plan_forward(geometry, dtype, facts, residual=case.residual, activation=activation)
                mask = case.residual and activation == "relu"
                backward = _C.plan_backward(
                    geometry, dtype, facts, mask=mask, dresidual=case.residual, activation=activation
                )
                for plan, grid in ((forward, forward.grid), (backward, backward.reduce)):
                    seen.add((type(plan).__name__, plan.strategy, grid.traversal, case.activation, case.residual))
    plans, strategies = ("ForwardPlan", "BackwardPlan"), ("fused", "split")
    wanted = {(p, s, t, *e) for p in plans for s in strategies for t in ("rows", "columns") for e in EPILOGUES}
    assert seen == wanted


@pytest.mark.parametrize("layer", [x for x in BENCH if x.norm != "BatchNorm2d"], ids=lambda layer: layer.id)
def test_a_fused_forward_reads_x_once(layer: Layer) -> None:
    """Real sets on a real device, if fewer of them: those of one sample, or of a few rows."""
    rows = 40 if layer.norm == "LayerNorm" else 1
    layer = Layer(layer.label, layer.norm, (rows, *layer.shape[1:]), layer.args, layer.kwargs)
    settings = emulator.load()
    fused = []
    for precision in PRECISIONS[:2]:
        case = Case(layer, "planar", precision, "silu")
        call = RawCall(case, make_inputs(case, CPU), torch.ops.fastnorm_emulated)
        nbytes = call.x.numel() * call.x.element_size()
        with settings.configured(device="h200"), settings.counting() as counts:
            saved = call.forward()
        facts = facts_of(settings.device(EMULATED[0].plays))
        plan = _C.plan_forward(call.shape.geometry, precision[0], facts, activation="silu")
        fused.append(plan.strategy == "fused")
        assert (counts.traffic.read_stream == nbytes) == fused[-1]
        assert counts.traffic.written_stream == nbytes
        plan = _C.plan_backward(call.shape.geometry, precision[0], facts, params=False, activation="silu")
        with settings.configured(device="h200"), settings.counting() as counts:
            call.backward(saved["stats"], saved["mask"], (True, False, False))
        assert (counts.traffic.read_stream == 2 * nbytes) == (plan.strategy == "fused")
    assert any(fused) or layer.norm == "InstanceNorm3d"


@pytest.mark.parametrize("layout", ["planar", "channels_last"])
@pytest.mark.parametrize("factor", [2, 5])
def test_apply_walks_back_over_what_reduce_left(layout: str, factor: int) -> None:
    """Where a set fits no gang, apply finds half of L2's size of the data that reduce read last. The other half of L2
    holds the data that apply writes. If apply read forwards, it would find nothing."""
    settings = emulator.load()
    # Pieces far smaller than L2: within one, threads run one after the other here.
    facts = dataclasses.replace(settings.device("tiny"), num_sms=64, l2_bytes=1 << 20)
    channels = 8
    layer = Layer("", "BatchNorm2d", (2, channels, 8, factor * facts.l2_bytes // (2 * channels * 8 * 4)), (channels,))
    call = RawCall(Case(layer, layout), make_inputs(Case(layer, layout), CPU), torch.ops.fastnorm_emulated)
    tensor = call.x.numel() * 4
    assert tensor == factor * facts.l2_bytes
    with settings.configured(device=facts, forced={"strategy": "split"}), settings.modelling_l2():
        with settings.counting() as counts:
            saved = call.forward()
        reduce, _, apply = counts.launches
        assert 0.99 * tensor <= reduce.missed <= 1.01 * tensor
        assert apply.missed <= tensor - 0.4 * facts.l2_bytes, f"{apply.missed} of {tensor}"
        with settings.counting() as counts:
            call.backward(saved["stats"], saved["mask"])
        reduce, _, apply = counts.launches
        assert apply.missed <= 2 * tensor - 0.5 * facts.l2_bytes, f"{apply.missed} of {2 * tensor}"


@pytest.mark.parametrize("exchange", ["gather", "scatter"])
def test_what_pieces_have_beyond_shared_memory_is_found_in_l2(exchange: str) -> None:
    """A piece's rest is read twice, and comes from memory once."""
    settings = emulator.load()
    facts = dataclasses.replace(settings.device("tiny"), shared_per_sm=40 << 10, shared_per_block=39 << 10)
    facts = dataclasses.replace(facts, num_sms=8, l2_bytes=1 << 20)
    case = Case(Layer("", "BatchNorm2d", (2, 64, 8, 50), (64,)), "channels_last")
    call = RawCall(case, make_inputs(case, CPU), torch.ops.fastnorm_emulated)
    tensor = call.x.numel() * 4
    forced = {"gang": "grid", "pieces": 8, "blocks_per_sm": 1, "staged_length": 32, "exchange": exchange}
    with settings.configured(device=facts, forced=forced), settings.modelling_l2():
        with settings.counting() as forward:
            saved = call.forward()
        with settings.counting() as backward:
            call.backward(saved["stats"], saved["mask"], (True, True, False))
    for counts, tensors in ((forward, 1), (backward, 2)):
        (launch,) = counts.launches
        assert launch.traffic.read_stream > 1.5 * tensors * tensor
        assert launch.missed < 1.1 * tensors * tensor


@pytest.mark.parametrize("layout", ["planar", "channels_last"])
def test_moments_read_once_and_write_nothing(layout: str, emulated: Backend) -> None:
    layer = Layer("", "BatchNorm2d", (3, 13, 7, 11), (13,))
    case = Case(layer, layout)
    call = RawCall(case, make_inputs(case, CPU), torch.ops.fastnorm_emulated)
    settings = emulator.load()
    with settings.configured(device=emulated.plays), settings.counting() as counts:
        mean, var = call.ops.moments(call.x)
    assert counts.traffic.read_stream == call.x.numel() * 4 and counts.traffic.written_stream == 0
    exact = call.x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(var.double(), exact.var(1, unbiased=False), rtol=1e-6, atol=0)


FUSED = tuple({"strategy": "fused", "gang": gang} for gang in ("block", "cluster", "grid"))
STRATEGIES = [(precision, {"strategy": "split"}) for precision in PRECISIONS]
STRATEGIES += [(precision, forced) for precision in PRECISIONS[:3] for forced in FUSED]  # float64 is not fused


@pytest.mark.parametrize(("precision", "forced"), STRATEGIES, ids=str)
@pytest.mark.parametrize("layout", ["planar", "channels_last"])
def test_a_training_forward_moves_the_running_statistics_in_its_launches(
    precision: tuple[str, str], layout: str, forced: dict[str, str]
) -> None:
    """The thread that writes a channel's statistics moves them, to the bits of a launch of its own. Where momentum is
    absent that thread would need the count of batches before another raises it: then they have such a launch."""
    settings, case = emulator.load(), Case(Layer("", "BatchNorm2d", (4, 40, 8, 8), (40,)), layout, precision, "relu")
    call = RawCall(case, make_inputs(case, CPU), torch.ops.fastnorm_emulated)
    dtype = getattr(torch, precision[1])
    for order, momentum in (("fifo", 0.25), ("random", 0.25), ("fifo", None)):
        moved = [torch.rand(40, 2).to(dtype)[:, 0], torch.rand(40).to(dtype), torch.tensor(3)]
        alone = [t.clone() for t in moved]
        with settings.configured(order, 1, device="few", forced=forced):
            with settings.counting() as counts:
                y, stats, _ = torch.ops.fastnorm_emulated.batch_norm_forward_(
                    call.x, call.weight, call.bias, None, *moved, 1e-5, call.activation, 0.0, False, momentum
                )
            expected = call.forward()
            torch.ops.fastnorm_emulated.update_running_stats_(*alone, expected["stats"], 256, momentum)
        own = {"split": 3, "fused": 1}[forced["strategy"]]
        assert len(counts.launches) == own + (momentum is None)
        assert torch.equal(y, expected["y"]) and torch.equal(stats, expected["stats"])
        assert all(torch.equal(a, b) for a, b in zip(moved, alone, strict=True))


def test_running_statistics_take_one_launch(emulated: Backend) -> None:
    """And one read of the statistics; nothing comes back to the host, whatever momentum is."""
    settings = emulator.load()
    stats = torch.rand(4, 6)
    mean, var, batches = torch.zeros(3), torch.ones(3), torch.tensor(0)
    for momentum in (0.1, None):
        with settings.configured(device=emulated.plays), settings.counting() as counts:
            torch.ops.fastnorm_emulated.update_running_stats_(mean, var, batches, stats, 20, momentum)
        assert len(counts.launches) == 1
        assert counts.traffic.read_stream == counts.traffic.written_stream == 0
    assert batches.item() == 2
