"""The same bits for any number of threads, run after run: outputs, gradients, running statistics."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import fastnorm
from tests.common.cases import DTYPES, Case, Layer
from tests.common.numerics import build, differences, make_inputs, run
from tests.conftest import Backend

AFFINE = (("affine", True), ("track_running_stats", True))
# Few sets can only be split inside a set, for which it must be larger than two chunks of the plan (65536 elements).
LAYERS = (
    Layer("many sets", "BatchNorm2d", (8, 64, 28, 28), (64,)),
    Layer("many sets", "BatchNorm2d", (4, 515, 7, 9), (515,)),
    Layer("one set", "BatchNorm2d", (3, 1, 300, 301), (1,)),
    Layer("three sets", "BatchNorm2d", (2, 3, 270, 271), (3,)),
    Layer("rows", "BatchNorm1d", (20001, 7), (7,)),
    Layer("five sets", "BatchNorm3d", (2, 5, 40, 41, 42), (5,)),
    Layer("many sets", "GroupNorm", (4, 96, 20, 20), (32, 96)),
    Layer("one set", "GroupNorm", (1, 6, 200, 201), (1, 6)),
    Layer("two sets", "GroupNorm", (1, 34, 91, 97), (2, 34)),
    Layer("many sets", "InstanceNorm2d", (4, 50, 30, 31), (50,), AFFINE),
    Layer("one set", "InstanceNorm3d", (1, 1, 60, 60, 61), (1,), AFFINE),
    Layer("many rows", "LayerNorm", (5001, 33), (33,)),
    Layer("two rows", "LayerNorm", (2, 200001), (200001,)),
    Layer("one row", "LayerNorm", (1, 70001), (70001,)),
    Layer("one set of short cells", "GroupNorm", (1, 200, 25, 26), (1, 200)),
    Layer("few rows", "BatchNorm1d", (50, 3001), (3001,)),
    Layer("short runs", "BatchNorm2d", (64, 24, 7, 7), (24,)),
)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.id)
def test_same_bits(layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
    name = next(name for name, value in DTYPES.items() if value == dtype)
    precision = (name, "float64" if name == "float64" else "float32")
    for layout in layer.layouts:
        case = Case(layer, layout, precision, "relu", residual=True)
        inputs = make_inputs(case, device)
        expected = None
        for threads in (1, 2, 3, 7, 2, 1):
            torch.set_num_threads(threads)
            results = run(case, build(case, fastnorm, device), inputs)
            expected = expected or results
            for key, value in expected.items():
                assert torch.equal(results[key], value), f"{key}, {layout}, {threads} threads"


def random_layer(seed: int) -> Layer:
    """Of 30 thousand to a million elements, from one set to many."""
    r = random.Random(seed)
    numel = int(2 ** r.uniform(15, 20))
    norm = r.choice(("BatchNorm2d", "GroupNorm", "InstanceNorm2d"))
    groups, per_group = (int(2 ** r.uniform(0, 6)) for _ in range(2))
    channels = groups * per_group
    batch = max(1, min(int(2 ** r.uniform(0, 6)), numel // channels))
    side = 1 + int((numel / batch / channels) ** 0.5)
    args = (groups, channels) if norm == "GroupNorm" else (channels,)
    return Layer(f"seed {seed}", norm, (batch, channels, side, side + 1), args)


@pytest.mark.parametrize("seed", range(40))
def test_same_bits_of_random_geometries(seed: int, device: torch.device) -> None:
    layer = random_layer(seed)
    precision = random.Random(seed).choice((("float32", "float32"), ("bfloat16", "float32")))
    for layout in layer.layouts:
        case = Case(layer, layout, precision, "leaky_relu", residual=True)
        inputs = make_inputs(case, device)
        torch.set_num_threads(1)
        expected = run(case, build(case, fastnorm, device), inputs)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            for key, value in run(case, build(case, fastnorm, device), inputs).items():
                assert torch.equal(value, expected[key]), f"{key}, {layer.id}, {layout}, {threads} threads"


@pytest.mark.parametrize("layer", LAYERS[::3], ids=lambda layer: layer.id)
def test_values_do_not_depend_on_alignment(layer: Layer, device: torch.device, backend: Backend) -> None:
    """A tensor that starts one element further on in memory gives the same bits; on a GPU, where the width of an access
    decides who sums what, the same values."""
    case = Case(layer, residual=True, activation="silu")
    inputs = make_inputs(case, device)
    shifted = {}
    for field, t in vars(inputs).items():
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)
        shifted[field] = memory[1:].view(t.shape).copy_(t)
    assert not differences(case, inputs, device, shifted)
    if backend.name == "cpu":
        expected = run(case, build(case, fastnorm, device), inputs)
        results = run(case, build(case, fastnorm, device), dataclasses.replace(inputs, **shifted))
        for key, value in expected.items():
            assert torch.equal(results[key], value), key


def test_from_several_python_threads(device: torch.device) -> None:
    """Calls from different Python threads do not disturb each other."""
    from concurrent.futures import ThreadPoolExecutor

    cases = [Case(layer, residual=True, activation="relu") for layer in LAYERS[:4]]
    inputs = [make_inputs(case, device) for case in cases]

    def once(i: int) -> dict[str, torch.Tensor]:
        return run(cases[i], build(cases[i], fastnorm, device), inputs[i])

    expected = [once(i) for i in range(len(cases))]
    with ThreadPoolExecutor(4) as pool:
        order = list(range(len(cases))) * 4
        for i, results in zip(order, pool.map(once, order), strict=True):
            for key, value in expected[i].items():
                assert torch.equal(results[key], value), key
