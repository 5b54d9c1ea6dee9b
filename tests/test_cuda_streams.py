"""On a GPU: calls run on the current stream and device; calls on several streams do not disturb each other; the same
input gives the same bits on any; what the kernels read was written."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastnorm
from fastnorm import _C
from tests.common.cases import LAYERS, TYPICAL, Case, Layer
from tests.common.numerics import build, make_inputs, run
from tests.common.raw_calls import RawCall, same_bits

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda")
SLEEP = 40_000_000  # cycles: 20 ms or more
SIZES = (
    *TYPICAL,
    Layer("split", "BatchNorm2d", (16, 64, 56, 56), (64,)),
    Layer("split", "GroupNorm", (2, 64, 128, 128), (8, 64)),
    Layer("fused", "InstanceNorm2d", (8, 64, 40, 40), (64,), (("affine", True),)),
    Layer("gathered", "LayerNorm", (4096, 768), (768,)),
)


def raw(case: Case, seed: int = 0) -> RawCall:
    return RawCall(case, make_inputs(case, CUDA, seed=seed), torch.ops.fastnorm, CUDA)


@pytest.mark.parametrize("layer", SIZES, ids=lambda layer: layer.id)
def test_runs_on_the_current_stream(layer: Layer) -> None:
    """A call reads the data that earlier work on its stream has yet to write."""
    for layout in layer.layouts:
        call, later = (raw(Case(layer, layout, activation="relu", residual=True), seed) for seed in (0, 10))
        expected = later.both()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP)
            for field in ("x", "residual", "dy"):
                getattr(call, field).copy_(getattr(later, field))
            results = call.both()
        torch.cuda.current_stream().wait_stream(stream)
        assert not same_bits(results, expected), layout


@pytest.mark.parametrize("layer", SIZES, ids=lambda layer: layer.id)
def test_two_streams_at_once(layer: Layer) -> None:
    """Each has a workspace of its own, and no stream gets memory that another has freed too early."""
    for layout in layer.layouts:
        calls = [raw(Case(layer, layout, ("bfloat16", "float32"), "silu", True), seed) for seed in (0, 10)]
        expected = [call.both() for call in calls]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in calls]
        found: list[list[dict[str, torch.Tensor]]] = [[], []]
        for i in range(20):
            for own, call, stream in zip(found, calls, streams, strict=True):
                with torch.cuda.stream(stream):
                    if i % 7 == 0:
                        torch.cuda._sleep(SLEEP // 100)
                    own.append(call.both())
        torch.cuda.synchronize()
        for own, right in zip(found, expected, strict=True):
            assert not [same_bits(results, right) for results in own if same_bits(results, right)], layout


def test_grids_that_want_the_whole_device_beside_a_hog() -> None:
    """Cooperative grids of different shapes on two streams: see stress.py. A hang ends its process and fails."""
    script = Path(__file__).parent / "gpu" / "stress.py"
    command = [sys.executable, str(script), "--iterations", "500", "--seconds", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("layer", SIZES, ids=lambda layer: layer.id)
def test_same_bits_every_time(layer: Layer) -> None:
    """Alone, beside other work, and after memory has moved."""
    for layout in layer.layouts:
        case = Case(layer, layout, ("float32", "float32"), "relu", True)
        expected = raw(case).both()
        busy, noise = torch.cuda.Stream(), torch.randn(4096, 4096, device=CUDA)
        for i in range(10):
            with torch.cuda.stream(busy):
                noise @ noise
            held = torch.empty(1 + 4096 * i, device=CUDA)
            assert not same_bits(raw(case).both(), expected), layout
            del held


@pytest.fixture
def one_block_a_row() -> Iterator[None]:
    """A row is in the shared memory of one block."""
    _C.set_plan_options(forced={"strategy": "fused", "gang": "block"})
    yield
    _C.set_plan_options()


def test_two_host_threads(one_block_a_row: None) -> None:
    """One kernel, launched with much shared memory by one thread and with little by the other, 1000 times each: neither
    takes away what the other has asked for."""
    most = _C.cuda_device_info(torch.cuda.current_device()).shared_per_block
    errors: list[BaseException] = []
    start = threading.Barrier(2)

    def call_often(row_bytes: int) -> None:
        try:
            call = raw(Case(Layer("rows", "LayerNorm", (4, row_bytes // 32 * 8), (row_bytes // 32 * 8,))))
            start.wait()
            results = [call.forward() for _ in range(1000)]
            torch.cuda.synchronize()
            assert not any(same_bits(found, results[0]) for found in results)
        except BaseException as error:
            start.abort()
            errors.append(error)

    # More than the 48 KB that a kernel has without asking: one just so, one nearly all that there is.
    threads = [threading.Thread(target=call_often, args=(size,)) for size in (most - (6 << 10), 50 << 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """All that torch.empty returns is full of NaN, the workspace too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.id)
def test_nothing_unwritten_is_read_or_left(layer: Layer, poisoned: None) -> None:
    assert torch.empty(3, device=CUDA).isnan().all()
    for layout in layer.layouts:
        for precision in (("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")):
            results = raw(Case(layer, layout, precision, "relu", True)).both()
            assert all(name == "mask" or value.isfinite().all() for name, value in results.items()), layout


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layer", TYPICAL, ids=lambda layer: layer.id)
def test_a_device_that_is_not_current(layer: Layer) -> None:
    other = torch.device("cuda", torch.cuda.device_count() - 1)
    case = Case(layer, activation="relu", residual=True)
    with torch.cuda.device(0):
        results = run(case, build(case, fastnorm, other), make_inputs(case, other))
        assert torch.cuda.current_device() == 0
    assert all(value.device == other for value in results.values())
    with torch.cuda.device(other):
        expected = run(case, build(case, fastnorm, other), make_inputs(case, other))
    assert not same_bits(results, expected)


def test_the_current_device_stays_current() -> None:
    before = torch.cuda.current_device()
    raw(Case(TYPICAL[0])).both()
    assert torch.cuda.current_device() == before


def test_tensors_of_two_devices_are_refused() -> None:
    x, weight = torch.randn(2, 6, 4, 4, device=CUDA), torch.rand(6)
    with pytest.raises(RuntimeError, match=r"weight.*cpu"):
        torch.ops.fastnorm.norm_forward(x, weight, None, None, None, None, 0, 0, 1e-5, 0, 0.0, False)
    stats = torch.rand(4, 6)
    with pytest.raises(RuntimeError, match=r"(stats|running_mean).*(cpu|cuda)"):
        torch.ops.fastnorm.update_running_stats_(torch.rand(6, device=CUDA), None, None, stats, 4, 0.1)
