"""Random shapes, strides, dtypes and epilogues against the float64 truth."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastnorm
from cases import ACTIVATIONS, PRECISIONS, Case, Layer
from conftest import available_backends
from numerics import build, make_inputs, measure, run, scale_of, truth

# In epsilons of the dtype, times the size of the terms of the sum.
TOLERANCE = 6.0


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
    # torch.nn refuses a set of one value.
    space = (space[0] + 1, *space[1:])
    return Layer("random", f"{norm}{dims}d", (batch, channels, *space), (channels,))


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
    """Windows that overlap along dim: neighbours share memory. Changes the values."""
    if t.shape[dim] < 2 or t.dim() < 2:
        return t
    other = (dim + 1) % t.dim()
    strides = list(t.contiguous().stride())
    strides[other] = strides[dim]
    flat = t.contiguous().view(-1)
    return flat.as_strided(t.shape, strides)


VIEWS = (lambda t, dim: t, view_step, view_swap, view_narrow, view_expand, view_overlap)


@st.composite
def views(draw: st.DrawFn, t: Tensor) -> Tensor:
    for _ in range(draw(st.integers(0, 2))):
        t = draw(st.sampled_from(VIEWS))(t, draw(st.integers(0, t.dim() - 1)))
    return t


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(data=st.data(), case=cases(), seed=st.integers(0, 2**16))
def test_against_truth(data: st.DataObject, case: Case, seed: int) -> None:
    for backend in available_backends():
        inputs = make_inputs(case, backend.device, seed=seed)
        inputs.x = data.draw(views(inputs.x))
        inputs.grad = data.draw(views(inputs.grad))
        if inputs.residual is not None:
            inputs.residual = data.draw(views(inputs.residual))
        exact = truth(case, build(case, torch.nn, backend.device), inputs)
        ours = run(case, build(case, fastnorm, backend.device), inputs)
        assert ours.keys() == exact.values.keys()
        for name, value in exact.values.items():
            error = measure(name, ours[name], ours[name], value, scale_of(name, exact, plain=False))
            assert error.ours <= TOLERANCE, error
