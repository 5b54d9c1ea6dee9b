"""Calls of fused kernels whose sets are shared by several blocks: layers small enough for an emulator or a sanitizer,
and the gangs that their plans are forced to have."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from fastnorm import _C
from tests.common.cases import Case, Layer
from tests.common.raw_calls import planned_shape
from tests.emulator.backend import Device

Forced = dict[str, str | int]

# SMs with room for little, so that waves follow each other, and clusters of 16 as on a large device.
FEW = Device(
    capability=90,
    num_sms=4,
    clock_mhz=1000,
    threads_per_sm=1024,
    shared_per_sm=40 << 10,
    shared_per_block=39 << 10,
    l2_bytes=64 << 10,
    bytes_per_us=10_000,  # so little that reading once is worth the barriers
    largest_cluster=16,
    cluster_sms=16,
    cooperative=True,
    cooperative_clusters=True,
)


def facts_of(device: Device) -> _C.DeviceInfo:
    """What plans are made from."""
    return _C.DeviceInfo(**dataclasses.asdict(device))


# Runs that are whole and in parts, pieces of several runs, cells in parts, accesses of every width.
GANG_LAYERS = (
    Layer("", "BatchNorm2d", (6, 5, 8, 16), (5,)),
    Layer("", "BatchNorm2d", (2, 3, 48, 64), (3,)),
    Layer("", "BatchNorm2d", (9, 4, 7, 7), (4,)),
    Layer("", "BatchNorm2d", (70, 16, 7, 7), (16,)),
    Layer("", "BatchNorm1d", (300, 40), (40,)),
    Layer("", "GroupNorm", (2, 12, 16, 16), (4, 12)),
    Layer("", "GroupNorm", (1, 4, 40, 52), (2, 4)),
    Layer("", "GroupNorm", (2, 32, 9, 10), (4, 32)),
    Layer("", "InstanceNorm3d", (1, 3, 8, 8, 16), (3,), (("affine", True),)),
    Layer("", "LayerNorm", (7, 1024), (1024,)),
    Layer("", "LayerNorm", (5, 777), (777,)),
    Layer("", "LayerNorm", (3, 2, 4096), ((2, 4096),)),
)
# So many sets that a large device takes them in several waves.
MANY_SETS = (Layer("many", "LayerNorm", (400, 1024), (1024,)), Layer("many", "BatchNorm1d", (64, 2000), (2000,)))
GANG_PRECISIONS = (("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16"))
GANG_EPILOGUES = ((None, False), ("silu", True), ("relu", True), ("leaky_relu", True), ("relu", False))


class GangCase(NamedTuple):
    case: Case
    forced: Forced
    free_sms: int
    """The multiprocessors that launches whose blocks wait for each other leave alone."""

    @property
    def id(self) -> str:
        return "-".join([self.case.id, *map(str, self.forced.values())])

    def plans(self, facts: _C.DeviceInfo) -> tuple[_C.ForwardPlan, _C.BackwardPlan] | None:
        """None where there is no such plan in one direction."""
        case, geometry = self.case, planned_shape(self.case).geometry
        options = {"forced": self.forced, "free_sms": self.free_sms, "activation": case.activation or "none"}
        masked = case.residual and case.activation in _C.two_sided_activations()
        recomputes = case.residual and case.activation is not None and not masked
        try:
            return (
                _C.plan_forward(geometry, case.precision[0], facts, residual=case.residual, **options),
                _C.plan_backward(
                    geometry,
                    case.precision[0],
                    facts,
                    residual=recomputes,
                    mask=masked,
                    dresidual=case.activation is not None,
                    **options,
                ),
            )
        except ValueError:
            return None


def device_gang_cases(facts: _C.DeviceInfo) -> Iterator[GangCase]:
    """For a device of any size: every kind of gang with the layers of many sets, then with all others in turn. Launches
    whose blocks wait for each other have as many multiprocessors as the largest cluster, or four, so that small tensors
    take several waves."""
    few_clusters, few = max(0, facts.cluster_sms - facts.largest_cluster), max(0, facts.num_sms - 4)
    gangs: list[tuple[Forced, int]] = [
        ({"gang": "cluster", "pieces": pieces, "stages": stages, "blocks_per_sm": 1}, few_clusters)
        for pieces, stages in itertools.product((2, 5, 16), (1, 2))
    ]
    # Narrow tiles take several waves of channels, and those of all channels one.
    gangs += [({"gang": "grid", "stages": stages, "tile_bytes": 64}, few) for stages in (1, 2)]
    gangs += [({"gang": "grid", "stages": 2, "pieces": 3}, few)]
    places = [(layer, layout) for layer in GANG_LAYERS for layout in layer.layouts]
    turns = [(layer, "planar", gang) for layer in MANY_SETS for gang in gangs]
    turns += [
        (*places[(first + i) % len(places)], gang) for first in range(len(places)) for i, gang in enumerate(gangs)
    ]
    precisions, epilogues = itertools.cycle(GANG_PRECISIONS), itertools.cycle(GANG_EPILOGUES)
    for layer, layout, (forced, free_sms) in turns:
        activation, residual = next(epilogues)
        case = Case(layer, layout, next(precisions), activation, residual)
        found = GangCase(case, {"strategy": "fused", **forced}, free_sms)
        if found.plans(facts) is not None:
            yield found
