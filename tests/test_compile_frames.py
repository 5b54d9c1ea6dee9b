"""torch.compile makes as many graphs of fastnorm's modules as of torch.nn's, whatever shapes come after each other:
ours take a size or a mode for a constant where torch.nn does, and nowhere else."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastnorm
from tests.common.cases import Layer
from tests.test_compile import fresh_compiler  # noqa: F401

_TRACK = (("affine", True), ("track_running_stats", True))
#: Another batch and size, a batch of one (which torch.compile takes for a constant), and several again.
MAPS = ((2, 8, 6, 6), (3, 8, 5, 7), (1, 8, 5, 6), (4, 8, 9, 4))
ROWS = ((2, 8), (5, 8), (2, 3, 8), (4, 5, 8))


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A layer, whose own shape does not matter here, and the shapes of its inputs."""

    layer: Layer
    shapes: tuple[tuple[int, ...], ...] = MAPS


SEQUENCES = (
    Sequence(Layer("typical", "BatchNorm2d", MAPS[0], (8,))),
    Sequence(Layer("typical", "GroupNorm", MAPS[0], (2, 8))),
    Sequence(Layer("tracked", "InstanceNorm2d", MAPS[0], (8,), _TRACK)),
    Sequence(Layer("typical", "LayerNorm", ROWS[0], (8,)), ROWS),
)


def frames(namespace: ModuleType, sequence: Sequence, dynamic: bool | None) -> list[int]:
    """How many frames are compiled after every step of training, then of evaluation, with gradients and without."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    norm = sequence.layer.build(namespace)
    compiled: Any = torch.compile(norm, backend=counter, fullgraph=True, dynamic=dynamic)
    counts = []
    for training in (True, False):
        norm.train(training)
        for shape in sequence.shapes:
            y = compiled(torch.randn(shape, requires_grad=training))
            if training:
                y.square().sum().backward()
            counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("dynamic", [None, True], ids=["default", "dynamic"])
@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda sequence: sequence.layer.norm)
def test_as_many_as_of_torch_nn(sequence: Sequence, dynamic: bool | None) -> None:
    ours, natives = (frames(namespace, sequence, dynamic) for namespace in (fastnorm, nn))
    assert ours == natives
    assert ours[-1] < len(ours), "the test means nothing where every shape has a graph of its own"
