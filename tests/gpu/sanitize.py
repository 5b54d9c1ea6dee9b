"""A few hundred calls of the operators, for compute-sanitizer to watch: every small layer of the table in both layouts,
forward and backward, with precisions, epilogues and modes in turn. Values are compared with the CPU's.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize.py --seconds 40

Inputs come from the host by plain copies, so that whoever watches only our kernels knows what was written.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

# Run as a file, its own folder is on the path, and not the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fastnorm.ops
from tests.common.cases import LAYERS, PRECISIONS, Case, Layer, modes
from tests.common.numerics import make_inputs, measure
from tests.common.raw_calls import RawCall

CUDA = torch.device("cuda")
# More than one piece to a set, more than one block to a channel, an odd tail: what the small ones are too small for.
SPLIT = (
    Layer("pieces", "BatchNorm2d", (3, 4, 97, 89), (4,)),
    Layer("pieces", "GroupNorm", (1, 6, 150, 151), (1, 6)),
    Layer("two rows", "LayerNorm", (2, 70001), (70001,)),
    Layer("apart", "GroupNorm", (300, 24), (3, 24)),
)
EPILOGUES = (("relu", True), ("silu", True), (None, False), ("gelu", False), ("leaky_relu", True))


def all_cases() -> Iterator[Case]:
    precisions, epilogues = itertools.cycle(PRECISIONS), itertools.cycle(EPILOGUES)
    for layer in (*LAYERS, *SPLIT):
        for layout in layer.layouts:
            for mode in modes(layer)[::2]:  # training, and frozen with gradients
                activation, residual = next(epilogues)
                yield Case(layer, layout, next(precisions), activation, residual, mode)


def check(case: Case) -> list[str]:
    """What differs from the CPU's kernels by more than two correct computations may."""
    inputs = make_inputs(case, torch.device("cpu"))
    call, reference = RawCall(case, make_inputs(case, CUDA), device=CUDA), RawCall(case, inputs)
    forward, expected = call.forward(), reference.forward()
    # The same statistics and mask from here on, or a rounding at a kink would count.
    gradients = call.backward(forward["stats"], forward["mask"])
    results = {"y": forward["y"], **gradients}
    saved = {name: forward[name].cpu() for name in ("stats", "mask")}
    expected = {"y": expected["y"], **reference.backward(saved["stats"], saved["mask"])}
    wrong = []
    for name, value in expected.items():
        scale = max(1.0, float(value.double().abs().max())) if value.numel() else 1.0
        error = measure(name, results[name].cpu(), value, value.double(), scale)
        if not error.ours <= 64:
            wrong.append(f"{case.id}: {error}")
    return wrong


def other_calls() -> None:
    """moments, and running statistics with either kind of momentum."""
    x = torch.randn(3, 6, 5, 7).to(CUDA)
    mean, var = torch.ops.fastnorm.moments(x)
    torch.testing.assert_close(mean.cpu(), x.cpu().mean((0, 2, 3)))
    stats = torch.rand(4, 6).to(CUDA)
    running_mean, running_var = torch.zeros(3).to(CUDA), torch.ones(3).to(CUDA)
    batches = torch.tensor(0).to(CUDA)
    for momentum in (0.1, None):
        torch.ops.fastnorm.update_running_stats_(running_mean, running_var, batches, stats, 20, momentum)
    assert batches.item() == 2 and bool(running_var.cpu().isfinite().all()) and bool(var.cpu().isfinite().all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after so long; the order is mixed")
    args = parser.parse_args()
    assert fastnorm.ops and torch.cuda.is_available(), "needs a GPU"
    cases = list(all_cases())
    random.Random(0).shuffle(cases)
    deadline = time.monotonic() + args.seconds
    other_calls()
    wrong, done = [], 0
    for case in cases:
        if time.monotonic() > deadline:
            break
        wrong += check(case)
        done += 1
    torch.cuda.synchronize()
    for text in wrong:
        print(text)
    print(f"{done} of {len(cases)} cases, {len(wrong)} wrong values")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
