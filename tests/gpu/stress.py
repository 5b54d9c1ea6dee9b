"""Cooperative grids of different shapes on two streams, and on a third a matrix product that holds a hundred
multiprocessors, 2000 times. Every grid is planned to have the whole device, and its blocks wait for each other.

    python tests/gpu/stress.py --iterations 2000 --seconds 60

CUDA is believed to admit a cooperative grid only as a whole. If it ever admitted a part of one grid while a part of
another was resident, both would wait for ever. So the calls are made by a process of their own, and when it does not
end in time, this one says how far it came.

If that ever happens, the remedy is an event chain. Every device has an event and a lock. A cooperative launch takes the
lock, has its stream wait for the event (cudaStreamWaitEvent), launches, and records the event on its stream
(cudaEventRecord). Then one cooperative grid is in flight at a time. That costs two driver calls a launch. In a stream
capture the event belongs to the capture, so a graph needs a chain of its own. It is not built, because no hang is
known.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

import torch

# Run as a file, its own folder is on the path, and not the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fastnorm import _C
from tests.common.cases import Case, Layer
from tests.common.gangs import GangCase
from tests.common.numerics import make_inputs
from tests.common.raw_calls import RawCall, same_bits

CHECKED = 100  # iterations between two comparisons, for which the host waits

BFLOAT16 = ("bfloat16", "float32")
# Rows and columns, in waves of one stage and of two, one block a multiprocessor and two.
CASES = tuple(
    GangCase(Case(layer, layout, BFLOAT16, "relu"), {"strategy": "fused", "gang": "grid", **forced}, 0)
    for layer, layout, forced in (
        (Layer("", "BatchNorm2d", (64, 64, 56, 56), (64,)), "planar", {"stages": 1}),
        (Layer("", "GroupNorm", (16, 256, 48, 48), (8, 256)), "planar", {"stages": 2, "blocks_per_sm": 1}),
        (Layer("", "BatchNorm2d", (32, 256, 28, 28), (256,)), "channels_last", {"stages": 2}),
        (Layer("", "LayerNorm", (24, 300000), (300000,)), "planar", {"stages": 1, "blocks_per_sm": 1}),
        (Layer("", "GroupNorm", (8, 256, 40, 40), (32, 256)), "channels_last", {"stages": 1}),
    )
)


def blocks_of(gang_case: GangCase, facts: _C.DeviceInfo) -> tuple[int, int] | None:
    """The cooperative grids, forward and backward; None where this device has no room for them."""
    plans = gang_case.plans(facts)
    return plans and (plans[0].grid.blocks, plans[1].reduce.blocks)


def make_call(gang_case: GangCase) -> RawCall:
    cuda = torch.device("cuda")
    return RawCall(gang_case.case, make_inputs(gang_case.case, cuda), device=cuda)


def stress(iterations: int) -> int:
    """The number of calls that gave other bits than alone."""
    facts = _C.cuda_device_info(0)
    cases = [gang_case for gang_case in CASES if blocks_of(gang_case, facts)]
    print("grids:", *(blocks_of(gang_case, facts) for gang_case in cases), flush=True)
    assert len({blocks_of(gang_case, facts) for gang_case in cases}) > 1, "this device has no two such grids"

    def run(i: int) -> dict[str, torch.Tensor]:
        _C.set_plan_options(forced=cases[i].forced)
        return calls[i].both()

    calls = [make_call(gang_case) for gang_case in cases]
    alone = [run(i) for i in range(len(calls))]
    a, b = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in ((1280, 1 << 14), (1 << 14, 1280)))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    pairs = itertools.cycle(itertools.permutations(range(len(calls)), 2))
    wrong = 0
    for iteration in range(1, iterations + 1):
        with torch.cuda.stream(streams[2]):
            a @ b
        results = []
        for stream, i in zip(streams, next(pairs), strict=False):
            with torch.cuda.stream(stream):
                results.append((i, run(i)))
        if iteration % CHECKED == 0 or iteration == iterations:
            torch.cuda.synchronize()
            wrong += sum(bool(same_bits(found, alone[i])) for i, found in results)
            print("iteration", iteration, flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=60.0, help="a process that takes longer hangs")
    parser.add_argument("--alone", action="store_true", help="make the calls in this process, without a limit")
    args = parser.parse_args()
    if args.alone:
        wrong = stress(args.iterations)
        refused = _C.refused_gangs()
        print(f"stress: {args.iterations} iterations, {wrong} with other bits, {refused} refused launches", flush=True)
        sys.exit(bool(wrong or refused))
    command = [sys.executable, __file__, "--alone", "--iterations", str(args.iterations)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=args.seconds)
    except subprocess.TimeoutExpired as expired:
        printed = expired.stdout or b""  # bytes, whatever `text` says
        lines = (printed if isinstance(printed, str) else printed.decode()).split()
        last = " ".join(lines[-2:]) or "the start"
        sys.exit(f"stress: HANG: {args.seconds:.0f} s are over, and nothing came after: {last}")
    print(done.stdout, end="")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
