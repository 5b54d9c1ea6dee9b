"""Running statistics as autograd and inference mode see them: versions that rise, and writes that torch.nn refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnorm

NORMS: dict[str, Callable[[Any], nn.Module]] = {
    "batch": lambda package: package.BatchNorm2d(6),
    "batch, cumulative": lambda package: package.BatchNorm2d(6, momentum=None),
    "batch, uncounted": lambda package: package.BatchNorm2d(6, track_running_stats=False),
    "instance": lambda package: package.InstanceNorm2d(6, track_running_stats=True),
}


def new_input() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 6, 5, 3)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_a_call_counts_versions_as_torch_does(name: str, training: bool, grad: bool) -> None:
    def versions(package: Any) -> list[int]:
        norm = NORMS[name](package).train(training)
        before = [buffer._version for buffer in norm.buffers()]
        with torch.set_grad_enabled(grad):
            norm(new_input())
        return [buffer._version - was for buffer, was in zip(norm.buffers(), before, strict=True)]

    assert versions(fastnorm) == versions(nn)


@pytest.mark.parametrize(
    ("name", "buffer"), [("batch", "num_batches_tracked"), ("instance", "running_mean"), ("instance", "running_var")]
)
def test_autograd_refuses_a_buffer_that_has_moved(name: str, buffer: str) -> None:
    """It used the value that it was moved to."""
    for package in (nn, fastnorm):
        norm = NORMS[name](package)
        factor = torch.ones((), requires_grad=True)
        loss = (factor * norm.get_buffer(buffer)).sum()
        norm(new_input())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["batch", "instance"])
def test_inference_tensors_move_in_inference_mode_alone(name: str, mode: Any) -> None:
    for package in (nn, fastnorm):
        with torch.inference_mode():
            norm = NORMS[name](package)
            first = norm.get_buffer("running_mean").clone()
        refused: Any = contextlib.nullcontext()
        if mode is not torch.inference_mode:
            refused = pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode")
        with mode(), refused:
            norm(new_input())
        if mode is torch.inference_mode:
            assert not torch.equal(first, norm.get_buffer("running_mean"))


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_needs_no_count_of_batches(training: bool) -> None:
    norms = [package.InstanceNorm2d(6, track_running_stats=True).train(training) for package in (nn, fastnorm)]
    for norm in norms:
        del norm.num_batches_tracked
    theirs, ours = (norm(new_input()) for norm in norms)
    torch.testing.assert_close(ours, theirs)


def test_batch_norm_needs_its_count_in_training() -> None:
    for package in (nn, fastnorm):
        norm = package.BatchNorm2d(6)
        del norm.num_batches_tracked
        with pytest.raises(AttributeError, match="'BatchNorm2d' object has no attribute 'num_batches_tracked'"):
            norm(new_input())
        norm.eval()(new_input())
