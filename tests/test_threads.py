"""The same bits for any number of threads, run after run: outputs, gradients, running statistics."""

from __future__ import annotations

import pytest
import torch

import fastnorm
from cases import DTYPES, Case, Layer
from numerics import build, make_inputs, run

AFFINE = (("affine", True), ("track_running_stats", True))
# Large enough to be split; the few-set ones can only be split inside a set.
LAYERS = (
    Layer("many sets", "BatchNorm2d", (8, 64, 28, 28), (64,)),
    Layer("many sets", "BatchNorm2d", (4, 515, 7, 9), (515,)),
    Layer("one set", "BatchNorm2d", (3, 1, 211, 193), (1,)),
    Layer("three sets", "BatchNorm2d", (2, 3, 160, 161), (3,)),
    Layer("rows", "BatchNorm1d", (20001, 7), (7,)),
    Layer("volumes", "BatchNorm3d", (2, 5, 17, 30, 31), (5,)),
    Layer("many sets", "GroupNorm", (4, 96, 20, 20), (32, 96)),
    Layer("one set", "GroupNorm", (1, 6, 150, 151), (1, 6)),
    Layer("two sets", "GroupNorm", (1, 34, 61, 67), (2, 34)),
    Layer("many sets", "InstanceNorm2d", (4, 50, 30, 31), (50,), AFFINE),
    Layer("one set", "InstanceNorm3d", (1, 1, 40, 50, 61), (1,), AFFINE),
    Layer("many rows", "LayerNorm", (5001, 33), (33,)),
    Layer("two rows", "LayerNorm", (2, 65537), (65537,)),
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


@pytest.mark.parametrize("layer", LAYERS[::3], ids=lambda layer: layer.id)
def test_values_do_not_depend_on_alignment(layer: Layer, device: torch.device) -> None:
    """A tensor that starts one element further on in memory gives the same bits."""
    case = Case(layer, residual=True, activation="silu")
    inputs = make_inputs(case, device)
    expected = run(case, build(case, fastnorm, device), inputs)
    for field in ("x", "residual", "grad"):
        t = getattr(inputs, field)
        shifted = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:].view(t.shape)
        setattr(inputs, field, shifted.copy_(t))
    results = run(case, build(case, fastnorm, device), inputs)
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
