"""The launches that may fail as such on a new device or driver: clusters, cooperative grids, and clusters in a
cooperative grid, which no sentence of NVIDIA's allows or forbids. Each is one small call; what the driver says is
printed.

    python tests/gpu/first.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

# Run as a file, its own folder is on the path, and not the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fastnorm import _C
from tests.common.cases import Case, Layer
from tests.common.gangs import Forced, GangCase
from tests.gpu.sanitize import check

# The backward of a group norm folds its weights' gradients after a grid sync.
CASE = Case(Layer("", "GroupNorm", (2, 32, 24, 24), (4, 32)), "channels_last", ("bfloat16", "float32"), "silu")
GANGS = {"block": 1, "cluster": 2, "large cluster": 16, "grid": 2}


def gang_case(name: str, pieces: int) -> GangCase:
    forced: Forced = {"strategy": "fused", "gang": name.split()[-1]}
    return GangCase(CASE, forced | ({"pieces": pieces} if pieces > 1 else {}), 0)


def outcome(planned: GangCase, facts: _C.DeviceInfo) -> tuple[bool, str]:
    """Whether a call works as planned, forward and backward, and what there is to say of it."""
    plans = planned.plans(facts)
    if plans is None:
        return True, "no such plan for this device"
    kind = "cooperative, by one grid sync" if plans[1].grid_sync else "not cooperative"
    _C.set_plan_options(forced=planned.forced)
    try:
        wrong = check(planned.case)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return False, f"backward {kind}: {error}"
    return not wrong, f"backward {kind}: {'; '.join(wrong) or 'right'}"


def main() -> None:
    os.environ["FASTNORM_STRICT"] = "1"  # a refusal is an error with the driver's words
    facts = _C.cuda_device_info(0)
    numbers = {name: getattr(facts, name) for name in dir(facts) if not name.startswith("_")}
    print(", ".join(f"{name} {number}" for name, number in numbers.items()))
    right = True
    for name, pieces in GANGS.items():
        works, text = outcome(gang_case(name, pieces), facts)
        print(f"{name}: {text}", flush=True)
        right = right and works
    sys.exit(not right)


if __name__ == "__main__":
    main()
