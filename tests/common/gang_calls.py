"""Small calls whose plans are forced to be fused, by blocks alone, clusters and grids: for the tests that execute PTX.

tests/test_emulated_gangs.py has many more of them; here is one of every kind."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch

from fastnorm import _C
from tests.common.cases import Case, Layer
from tests.common.numerics import build, make_inputs, measure, scale_of, truth
from tests.common.raw_calls import RawCall
from tests.emulator.backend import Device

CPU = torch.device("cpu")

# SMs with room for little, so that waves follow each other, and clusters of 16 as on a large device.
FEW = Device(90, 4, 1024, 40 << 10, 39 << 10, 64 << 10, 100_000, 16, 16, True)
FACTS = _C.DeviceInfo(**dataclasses.asdict(FEW))

# Runs that are whole and in parts, rows that are short and long, several teams to a block and to a warp.
LAYERS = (
    Layer("", "BatchNorm2d", (6, 5, 8, 16), (5,)),
    Layer("", "BatchNorm2d", (9, 4, 7, 7), (4,)),
    Layer("", "BatchNorm2d", (9, 40, 7, 7), (40,)),
    Layer("", "BatchNorm1d", (300, 40), (40,)),
    Layer("", "GroupNorm", (2, 12, 16, 16), (4, 12)),
    Layer("", "GroupNorm", (1, 4, 40, 52), (2, 4)),
    Layer("", "GroupNorm", (2, 32, 9, 10), (4, 32)),
    Layer("", "InstanceNorm2d", (3, 40, 4, 4), (40,), (("affine", True),)),
    Layer("", "LayerNorm", (7, 1024), (1024,)),
    Layer("", "LayerNorm", (13, 40), (40,)),
    Layer("", "LayerNorm", (5, 777), (777,)),
)
GANGS = (
    {"gang": "block", "stages": 1},
    {"gang": "block", "stages": 2},
    {"gang": "cluster", "pieces": 2},
    {"gang": "cluster", "pieces": 5},
    {"gang": "grid", "stages": 1},
    {"gang": "grid", "stages": 2},
)


@dataclasses.dataclass(frozen=True)
class GangCall:
    case: Case
    forced: tuple[tuple[str, str | int], ...]

    @property
    def id(self) -> str:
        return "-".join([self.case.id, *(str(value) for _, value in self.forced[1:])])

    def raw(self) -> RawCall:
        return RawCall(self.case, make_inputs(self.case, CPU), torch.ops.fastnorm_ptx)

    def is_served(self) -> bool:
        """Whether there is such a plan in both directions."""
        geometry = RawCall(self.case, make_inputs(self.case, CPU)).shape.geometry
        dtype, forced = self.case.precision[0], dict(self.forced)
        try:
            _C.plan_forward(geometry, dtype, FACTS, forced=forced)
            _C.plan_backward(geometry, dtype, FACTS, residual=self.case.residual, forced=forced)
        except ValueError:
            return False
        return True


def errors_of(case: Case, results: dict[str, torch.Tensor]) -> list[str]:
    """Those of the results that are further from the truth than they may be."""
    exact = truth(case, build(case, torch.nn, CPU), make_inputs(case, CPU))
    found = []
    for key in ("y", "dx", "dweight", "dbias", "dresidual"):
        if key not in exact.values or key not in results or results[key].numel() == 0:
            continue
        value, ours = exact.values[key], results[key].view(exact.values[key].shape)
        error = measure(key, ours, ours, value, scale_of(key, exact, plain=False))
        found += [str(error)] * (not error.ours <= 5)
    return found


def gang_calls(
    precisions: tuple[tuple[str, str], ...], epilogues: tuple[tuple[str | None, bool], ...]
) -> Iterator[GangCall]:
    """Every layer, layout and gang there is a plan for; precisions and epilogues in turn."""
    precision, epilogue = itertools.cycle(precisions), itertools.cycle(epilogues)
    for layer, gang in itertools.product(LAYERS, GANGS):
        for layout in layer.layouts:
            activation, residual = next(epilogue)
            case = Case(layer, layout, next(precision), activation, residual)
            call = GangCall(case, (("strategy", "fused"), *gang.items()))
            if call.is_served():
                yield call
