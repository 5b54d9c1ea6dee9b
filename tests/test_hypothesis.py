"""Random shapes, strides, dtypes and epilogues against the float64 truth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastnorm
from tests.common.cases import ACTIVATIONS, PRECISIONS, Case, Layer
from tests.common.numerics import build, make_inputs, measure, run, scale_of, truth
from tests.conftest import Backend

pytestmark = pytest.mark.emulated

# In epsilons of the dtype, times the size of the terms of the sum.
TOLERANCE = 5.0
TOLERANCE_FLOAT64 = 20.0  # the truth is rounded as well
# Of a GPU's exp and reciprocal, which smooth activations of half types take: 2^-16, in epsilons of float32, which the
# gradients of parameters may have.
TOLERANCE_APPROXIMATE = 128.0


def tolerance(case: Case, backend: Backend) -> float:
    if case.dtype == torch.float64:
        return TOLERANCE_FLOAT64
    half, smooth = case.dtype.itemsize == 2, case.activation not in (None, "relu", "leaky_relu")
    mixed = case.param_dtype == torch.float32
    return TOLERANCE_APPROXIMATE if backend.name == "cuda" and half and smooth and mixed else TOLERANCE


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    norm = draw(st.sampled_from(("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm")))
    size = st.integers(1, 9)
    if norm == "LayerNorm":
        rows = draw(st.lists(size, max_size=3))
        columns = draw(st.lists(st.integers(1, 40), min_size=1, max_size=2))
        return Layer("random", norm, (*rows, *columns), (tuple(columns),))
    dims = draw(st.integers(1, 3))
    batch, space = draw(size), tuple(draw(size) for _ in range(dims))
    if norm == "GroupNorm":
        groups, per_group = draw(size), draw(st.integers(2, 20))
        channels = groups * per_group
        return Layer("random", norm, (batch, channels, *space), (groups, channels))
    channels = draw(st.integers(1, 40))
    # Without a bias, relu of a constant set is at its kink, where rounding decides.
    affine = (("affine", True),)
    # torch.nn refuses a set of one value.
    space = (space[0] + 1, *space[1:])
    return Layer("random", f"{norm}{dims}d", (batch, channels, *space), (channels,), affine)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layer = draw(layers())
    return Case(
        layer,
        draw(st.sampled_from(layer.layouts)),
        draw(st.sampled_from(PRECISIONS)),
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.booleans()),
        draw(st.sampled_from(("train", "frozen"))) if "Batch" in layer.norm else "train",
    )


def view_step(t: Tensor, dim: int) -> Tensor:
    """Every second element of a tensor twice as long in dim."""
    wide = torch.stack([t, torch.full_like(t, torch.nan)], dim + 1).flatten(dim, dim + 1)
    return wide[(slice(None),) * dim + (slice(None, None, 2),)]


def view_swap(t: Tensor, dim: int) -> Tensor:
    return t.transpose(dim, -1).contiguous().transpose(dim, -1)


def view_narrow(t: Tensor, dim: int) -> Tensor:
    pad = torch.full_like(t.narrow(dim, 0, 1), torch.nan)
    return torch.cat([pad, t, pad], dim).narrow(dim, 1, t.shape[dim])


def view_expand(t: Tensor, dim: int) -> Tensor:
    """Stride 0 in dim. Changes the values."""
    return t.narrow(dim, 0, 1).expand(t.shape)


def view_overlap(t: Tensor, dim: int) -> Tensor:
    """Neighbours along two dims share memory, as in Tensor.unfold. Changes the values."""
    strides = list(t.contiguous().stride())
    strides[dim - 1] = strides[dim]
    needed = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
    flat = t.reshape(-1).repeat(1 + needed // t.numel())
    return flat.as_strided(t.shape, strides)


VIEWS = {f.__name__: f for f in (view_step, view_swap, view_narrow, view_expand, view_overlap)}
view_lists = st.lists(st.tuples(st.sampled_from(list(VIEWS)), st.integers(0, 4)), max_size=2)


def view(t: Tensor, steps: list[tuple[str, int]]) -> Tensor:
    for name, dim in steps:
        t = VIEWS[name](t, dim % t.dim())
    return t


# The emulator takes its time.
EXAMPLES = {"cpu": 400, "cuda": 400, "emulated": 150, "ptx": 150}


def test_against_truth(backend: Backend) -> None:
    @settings(max_examples=EXAMPLES[backend.name], deadline=None, derandomize=True, database=None)
    @given(case=cases(), x=view_lists, residual=view_lists, grad=view_lists, seed=st.integers(0, 2**16))
    def check(
        case: Case,
        x: list[tuple[str, int]],
        residual: list[tuple[str, int]],
        grad: list[tuple[str, int]],
        seed: int,
    ) -> None:
        inputs = make_inputs(case, backend.device, seed=seed)
        inputs.x, inputs.grad = view(inputs.x, x), view(inputs.grad, grad)
        if inputs.residual is not None:
            inputs.residual = view(inputs.residual, residual)
        exact = truth(case, build(case, torch.nn, backend.device), inputs)
        ours = run(case, build(case, fastnorm, backend.device), inputs)
        assert ours.keys() == exact.values.keys()
        for name, value in exact.values.items():
            error = measure(name, ours[name], ours[name], value, scale_of(name, exact, plain=False))
            assert error.ours <= tolerance(case, backend), error

    check()
