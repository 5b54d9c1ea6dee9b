"""Small calls whose plans are forced to be fused, by blocks alone, clusters and grids, or to be another: for the
tests that execute PTX.

tests/test_emulated_gangs.py has many more of them; here is one of every kind."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch

from tests.common.cases import Case, Layer
from tests.common.gangs import FEW, GangCase, facts_of
from tests.common.numerics import build, make_inputs, measure, scale_of, truth
from tests.common.raw_calls import RawCall
from tests.emulator.backend import Device

CPU = torch.device("cpu")

# The same with much, for long pieces.
ROOMY = dataclasses.replace(FEW, shared_per_sm=228 << 10, shared_per_block=227 << 10)

# Runs that are whole and in parts, rows that are short and long, several teams to a block and to a warp, channels that
# are whole packs and that are not.
LAYERS = (
    Layer("", "BatchNorm2d", (6, 5, 8, 16), (5,)),
    Layer("", "BatchNorm2d", (9, 4, 7, 7), (4,)),
    Layer("", "BatchNorm2d", (9, 40, 7, 7), (40,)),
    Layer("", "BatchNorm1d", (300, 40), (40,)),
    Layer("", "GroupNorm", (2, 12, 16, 16), (4, 12)),
    Layer("", "GroupNorm", (1, 4, 40, 52), (2, 4)),
    Layer("", "GroupNorm", (2, 32, 9, 10), (4, 32)),
    Layer("", "GroupNorm", (2, 15, 30, 5), (5, 15)),
    Layer("", "GroupNorm", (4, 12, 3, 3), (4, 12)),
    Layer("", "GroupNorm", (4, 12, 4, 4), (4, 12)),
    Layer("", "GroupNorm", (4, 12, 4, 5), (4, 12)),
    Layer("", "InstanceNorm2d", (3, 40, 4, 4), (40,), (("affine", True),)),
    Layer("", "InstanceNorm2d", (3, 40, 5, 5), (40,), (("affine", True),)),
    Layer("", "InstanceNorm2d", (3, 8, 24, 24), (8,), (("affine", True),)),
    Layer("", "LayerNorm", (7, 1024), (1024,)),
    Layer("", "LayerNorm", (13, 40), (40,)),
    Layer("", "LayerNorm", (13, 41), (41,)),
    Layer("", "LayerNorm", (5, 777), (777,)),
    Layer("", "LayerNorm2d", (3, 70, 9, 16), (70,)),
    Layer("", "LayerNorm2d", (9, 13, 7, 7), (13,)),
)
# Pieces so long that every group of copies has something. They have no residual, lest two stages be too much.
LONG_LAYERS = (
    Layer("", "LayerNorm", (5, 13000), (13000,)),
    Layer("", "InstanceNorm2d", (2, 3, 104, 125), (3,)),
    Layer("", "BatchNorm1d", (1700, 8), (8,)),
    Layer("", "BatchNorm1d", (400, 21), (21,)),
)
GANGS: tuple[dict[str, str | int], ...] = (
    {"gang": "block", "stages": 1},
    {"gang": "block", "stages": 2},
    {"gang": "cluster", "pieces": 2},
    {"gang": "cluster", "pieces": 5},
    {"gang": "grid", "stages": 1},
    {"gang": "grid", "stages": 2},
    {"gang": "grid", "exchange": "scatter"},
    {"gang": "grid", "exchange": "scatter", "staged_length": 64, "pieces": 2},
    {"gang": "cluster", "pieces": 2, "traversal": "columns"},
    {"gang": "block", "staged_length": 32},
)
FUSED = tuple({"strategy": "fused", **gang} for gang in GANGS)
OTHERS: tuple[dict[str, str | int], ...] = (
    {"strategy": "fused", "place": "registers"},
    {"strategy": "fused", "place": "shared", "gang": "block"},
    {"strategy": "split"},
)


@dataclasses.dataclass(frozen=True)
class GangCall:
    case: Case
    forced: dict[str, str | int]
    device: Device

    @property
    def id(self) -> str:
        return "-".join([self.case.id, *map(str, self.forced.values())]).replace("-fused", "")

    def raw(self) -> RawCall:
        return RawCall(self.case, make_inputs(self.case, CPU), torch.ops.fastnorm_ptx)

    def is_served(self) -> bool:
        """Whether there is such a plan in both directions."""
        return GangCase(self.case, self.forced, 0).plans(facts_of(self.device)) is not None


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


Table = tuple[tuple[Layer, ...], tuple[dict[str, str | int], ...], Device]
"""Layers, and what their plans are forced to."""
SHORT: Table = (LAYERS, FUSED + OTHERS, FEW)
LONG: Table = (LONG_LAYERS, FUSED[:2], ROOMY)


def gang_calls(
    precisions: tuple[tuple[str, str], ...],
    epilogues: tuple[tuple[str | None, bool], ...],
    tables: tuple[Table, ...] = (SHORT, LONG),
) -> Iterator[GangCall]:
    """Every layer, layout and choice there is a plan for; precisions and epilogues in turn."""
    precision, epilogue = itertools.cycle(precisions), itertools.cycle(epilogues)
    for layers, choices, device in tables:
        for layer, forced in itertools.product(layers, choices):
            for layout in layer.layouts:
                activation, residual = next(epilogue)
                case = Case(layer, layout, next(precision), activation, residual and device is FEW)
                call = GangCall(case, forced, device)
                if call.is_served():
                    yield call
