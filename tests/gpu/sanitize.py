"""A few hundred calls of the operators, for compute-sanitizer to watch: first the gangs of every kind, whose blocks
share sets and wait for each other; then every small layer of the table in both layouts. All forward and backward, with
precisions, epilogues and modes in turn. Values are compared with the CPU's.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize.py --seconds 40

Inputs come from the host by plain copies, dense in x's layout, and so do those that torch has put together, so that
whoever watches only our kernels knows what was written. Under a sanitizer fewer blocks may be resident than the planner
expects. A launch that is refused for that reason is an error here, because the kernel that was to be watched has not
run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# Run as a file, its own folder is on the path, and not the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fastnorm import _C
from tests.common.cases import LAYERS, PRECISIONS, Case, Layer, modes
from tests.common.gangs import GangCase, device_gang_cases
from tests.common.numerics import make_inputs, measure
from tests.common.raw_calls import RawCall

CUDA, HOST = torch.device("cuda"), torch.device("cpu")
# More than one piece to a set, more than one block to a channel, an odd tail: what the small ones are too small for.
SPLIT = (
    Layer("pieces", "BatchNorm2d", (3, 4, 97, 89), (4,)),
    Layer("pieces", "GroupNorm", (1, 6, 150, 151), (1, 6)),
    Layer("two rows", "LayerNorm", (2, 70001), (70001,)),
    Layer("apart", "GroupNorm", (300, 24), (3, 24)),
)
EPILOGUES = (("relu", True), ("silu", True), (None, False), ("gelu", False), ("leaky_relu", True))


def free_cases() -> Iterator[GangCase]:
    """With the plans that the planner chooses."""
    precisions, epilogues = itertools.cycle(PRECISIONS), itertools.cycle(EPILOGUES)
    for layer in (*LAYERS, *SPLIT):
        for layout in layer.layouts:
            for mode in modes(layer)[::2]:  # training, and frozen with gradients
                activation, residual = next(epilogues)
                case = Case(layer, layout, next(precisions), activation, residual, mode)
                yield GangCase(case, {}, 0)


def all_cases(facts: _C.DeviceInfo) -> list[GangCase]:
    """A third of them has forced gangs and comes first, always in the same order; the others are mixed."""
    free = list(free_cases())
    random.Random(0).shuffle(free)
    return [*itertools.islice(device_gang_cases(facts), len(free) // 2), *free]


def check(case: Case, device: torch.device = CUDA, operators: Any = torch.ops.fastnorm) -> list[str]:
    """What differs from the CPU's kernels by more than two correct computations may."""
    inputs = make_inputs(case, HOST)
    call, reference = RawCall(case, inputs.to(device), operators, device), RawCall(case, inputs)
    forward, expected = call.forward(), reference.forward()
    wrong = []
    if expected["mask"].numel():
        # Each side reads its own mask: the order of the bits is a matter of the kernels.
        ones = dataclasses.replace(inputs, grad=torch.ones_like(inputs.grad))
        slope = slopes(RawCall(case, ones.to(device), operators, device), forward).cpu()
        other_side = slope != slopes(RawCall(case, ones), expected)
        from_kink = RawCall(dataclasses.replace(case, activation=None), inputs).forward()["y"].double().abs()
        epsilon = torch.finfo(expected["stats"].dtype).eps
        at_kink = from_kink <= 64 * epsilon * from_kink.max()
        count = int((other_side & ~at_kink).sum())
        if count:
            wrong.append(f"{case.id}: mask: {count} elements on the wrong side")
        # At the kink a rounding decides. Without a gradient it counts for nothing.
        # (In place: its layout stays, or the operator would copy it into x's by a kernel of torch.)
        inputs.grad.masked_fill_((other_side & at_kink).view(inputs.grad.shape), 0)
        call, reference = RawCall(case, inputs.to(device), operators, device), RawCall(case, inputs)
    results = {"y": forward["y"], **call.backward(forward["stats"], forward["mask"])}
    # The same statistics from here on, or a rounding at a kink would count.
    expected = {"y": expected["y"], **reference.backward(forward["stats"].cpu(), expected["mask"])}
    for name, value in expected.items():
        scale = max(1.0, float(value.double().abs().max())) if value.numel() else 1.0
        error = measure(name, results[name].cpu(), value, value.double(), scale)
        if not error.ours <= 64:
            wrong.append(f"{case.id}: {error}")
    return wrong


def slopes(call_of_ones: RawCall, forward: dict[str, torch.Tensor]) -> torch.Tensor:
    """The activation's slope at every element: what backward makes of ones by the mask."""
    return call_of_ones.backward(forward["stats"], forward["mask"], (False, False, True))["dresidual"]


def other_calls() -> None:
    """moments, running statistics with either kind of momentum, and the steps of a batch norm over several ranks."""
    x = torch.randn(3, 6, 5, 7).to(CUDA)
    mean, var = torch.ops.fastnorm.moments(x)
    torch.testing.assert_close(mean.cpu(), x.cpu().mean((0, 2, 3)))
    stats = torch.rand(4, 6).to(CUDA)
    running_mean, running_var = torch.zeros(3).to(CUDA), torch.ones(3).to(CUDA)
    batches = torch.tensor(0).to(CUDA)
    for momentum in (0.1, None):
        torch.ops.fastnorm.update_running_stats_(running_mean, running_var, batches, stats, 20, momentum)
    ops = torch.ops.fastnorm
    partials = torch.stack([ops.batch_norm_partial(part).cpu() for part in x.split([1, 0, 2])]).to(CUDA)
    stats, count = ops.batch_norm_fold_(partials, None, None, None, 1e-5, 0.1)
    torch.testing.assert_close(stats[0], mean)
    y, mask = ops.batch_norm_apply(x, None, None, x, stats, 1, 0.01, True)
    sums = ops.batch_norm_backward_sums(y, x, None, None, None, stats, mask, 1, 0.01)
    dx, _ = ops.batch_norm_backward_apply(y, x, None, None, None, stats, mask, sums, count, 1, 0.01, [True, True])
    assert count.item() == 105 and bool(dx.cpu().isfinite().all())
    assert batches.item() == 2 and bool(running_var.cpu().isfinite().all()) and bool(var.cpu().isfinite().all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after so long")
    args = parser.parse_args()
    assert torch.cuda.is_available(), "needs a GPU"
    os.environ["FASTNORM_STRICT"] = "0"  # a refusal is counted, and the calls after it are watched
    os.environ["FASTNORM_LOG"] = "fallback"  # and its plan is printed
    deadline = time.monotonic() + args.seconds
    cases = all_cases(_C.cuda_device_info(0))
    other_calls()
    wrong: list[str] = []
    done = gangs = 0
    for gang_case in cases:
        if time.monotonic() > deadline:
            break
        _C.set_plan_options(forced=gang_case.forced, free_sms=gang_case.free_sms)
        wrong += check(gang_case.case)
        done += 1
        gangs += bool(gang_case.forced)
    torch.cuda.synchronize()
    for text in wrong:
        print(text)
    refused = _C.refused_gangs()
    print(
        f"{done} of {len(cases)} cases, {gangs} of forced gangs, {len(wrong)} wrong values, {refused} refused launches"
    )
    sys.exit(bool(wrong or refused))


if __name__ == "__main__":
    main()
