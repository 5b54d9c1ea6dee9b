"""Questions to the CUDA planner: geometries, described anew from the norms' definitions, calls and devices.
plan_checks.py has the conditions that its answers have to meet.
"""

from __future__ import annotations

import dataclasses
import random
from math import prod
from typing import Any

import numpy as np

from fastnorm import _C
from tests.common.cases import Layer

BATCH, GROUP, LAYER = "batch", "group", "layer"
DTYPES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
KIB, MIB = 1 << 10, 1 << 20


def device(
    capability: int,
    processors: int,
    megahertz: int,
    threads: int,
    shared: int,
    block: int,
    l2: int,
    gigabytes: int,
    cluster: int = 1,
    covered: int = 0,
    cooperative: bool = True,
    together: bool = True,
) -> _C.DeviceInfo:
    """shared, block: KiB; l2: MiB; gigabytes: of bandwidth, per second; covered: SMs that clusters cover; together:
    cooperative launches may have clusters."""
    return _C.DeviceInfo(
        capability=capability,
        num_sms=processors,
        clock_mhz=megahertz,
        threads_per_sm=threads,
        shared_per_sm=shared * KIB,
        shared_per_block=block * KIB,
        l2_bytes=l2 * MIB,
        bytes_per_us=gigabytes * 1000,
        largest_cluster=cluster,
        cluster_sms=covered,
        cooperative=cooperative,
        cooperative_clusters=cooperative and cluster > 1 and together,
    )


# The last five do not exist: a part of a device, devices without a kind of gang or two kinds together, and one with
# little of everything.
DEVICES = {
    "T4": device(75, 40, 1590, 1024, 64, 64, 4, 320),
    "A100": device(80, 108, 1410, 2048, 164, 163, 40, 1555),
    "RTX 4090": device(89, 128, 2520, 1536, 100, 99, 72, 1008),
    "H100": device(90, 132, 1980, 2048, 228, 227, 50, 3350, 16, 112),
    "H200": device(90, 132, 1980, 2048, 228, 227, 60, 4800, 16, 128),
    "B200": device(100, 148, 1965, 2048, 228, 227, 126, 8000, 8, 144),
    "slice": device(90, 18, 1980, 2048, 228, 227, 8, 600, 8, 16),
    "not together": device(90, 132, 1980, 2048, 228, 227, 60, 4800, 16, 128, together=False),
    "clusters alone": device(90, 132, 1980, 2048, 228, 227, 60, 4800, 16, 128, cooperative=False),
    "no gangs": device(90, 132, 1980, 2048, 228, 227, 60, 4800, cooperative=False),
    "tiny": device(75, 2, 1000, 1024, 34, 16, 1, 100),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The planner's Geometry, described anew from the norms' definitions."""

    kind: str
    N: int
    C: int
    S: int
    G: int
    last: bool

    @property
    def geometry(self) -> _C.Geometry:
        return _C.Geometry(self.kind, self.N, self.C, self.S, self.G, self.last)

    @property
    def of_positions(self) -> bool:
        """Layer norm over the channels of planar maps, whose sets are the positions."""
        return self.kind == LAYER and self.S > 1

    @property
    def sets(self) -> int:
        if self.of_positions:
            return self.N * self.S
        return self.C if self.kind == BATCH else self.N * self.G

    @property
    def set_size(self) -> int:
        return self.numel // self.sets

    @property
    def numel(self) -> int:
        return self.N * self.C * self.S

    @property
    def per_element(self) -> bool:
        return self.kind != BATCH and self.S == 1

    @property
    def traversal(self) -> str:
        side_by_side = self.of_positions or (self.last and self.S > 1)
        return "columns" if side_by_side or (self.kind == BATCH and (self.last or self.S == 1)) else "rows"

    @property
    def mask_run(self) -> int:
        """Elements that lie side by side and share a row of the mask."""
        if self.of_positions:
            return self.S
        if self.traversal == "columns":
            return self.C
        return self.C // self.G if self.per_element else self.S

    @property
    def set_channels(self) -> int:
        """The channels of a set at one position of columns."""
        return 1 if self.kind == BATCH else self.C // self.G

    @property
    def outer(self) -> int:
        return 1 if self.kind == BATCH else self.N

    @property
    def positions(self) -> int:
        return self.N * self.S // self.outer

    @property
    def runs(self) -> tuple[int, int, int]:
        """The number of a set's runs (of one weight, or a row), the elements of a run, the elements from one to the
        next."""
        if self.kind == BATCH:
            return self.N, self.S, self.C * self.S
        per_group = self.C // self.G
        return (1, per_group, 0) if self.per_element else (per_group, self.S, self.S)

    def set_of(self, address: np.ndarray) -> np.ndarray:
        """The set of the element at each address."""
        sample, rest = address // (self.C * self.S), address % (self.C * self.S)
        if self.of_positions:
            return sample * self.S + rest % self.S
        channel = rest % self.C if self.last else rest // self.S
        return channel if self.kind == BATCH else sample * self.G + channel // (self.C // self.G)

    def walked_as(self, traversal: str) -> Shape:
        """Columns of a planar batch norm: the elements of a sample are channels, those of a run are a group, and the
        samples are the positions. Columns of layer norm over the channels of planar maps: channels and positions are
        exchanged."""
        if self.of_positions:
            return Shape(GROUP, self.N, self.S, self.C, self.S, True)
        if traversal == self.traversal or self.kind != BATCH:
            return self
        return Shape(GROUP, 1, self.C * self.S, self.N, self.C, True)

    @property
    def cells(self) -> Shape:
        """The shape in which every cell is a set, where a cell is a run or more."""
        splits = self.traversal == "rows" and self.kind == GROUP and not self.per_element
        return dataclasses.replace(self, G=self.C) if splits else self


def shape_of(layer: Layer, layout: str) -> Shape:
    n, c, *space = layer.shape if len(layer.shape) > 1 else (1, *layer.shape)
    if layer.norm == "LayerNorm2d":
        planar = layout == "planar" and c > 1 and prod(space) > 1
        return Shape(LAYER, n, c, prod(space), 1, False) if planar else Shape(LAYER, n * prod(space), c, 1, 1, False)
    if layer.norm == "LayerNorm":
        normalized = layer.args[0]
        c = prod(normalized) if isinstance(normalized, tuple) else normalized
        return Shape(LAYER, prod(layer.shape) // c, c, 1, 1, False)
    if layer.norm.startswith("Instance") and len(layer.shape) == int(layer.norm[-2]) + 1:  # no batch
        n, c, space = 1, layer.shape[0], list(layer.shape[1:])
    groups = c if layer.norm.startswith("Batch") else layer.groups
    kind = BATCH if layer.norm.startswith("Batch") else GROUP
    return Shape(kind, n, c, prod(space), groups, layout == "channels_last")


def div_up(a: int, b: int) -> int:
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything that a plan depends on, except the device. residual: backward reads it again; adds: there is one that
    it does not read. options: `forced` and `free_sms`."""

    shape: Shape
    dtype: str
    alignment: int
    residual: bool
    frozen: bool
    input: bool
    params: bool
    activation: str = "none"
    adds: bool = False

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype]

    @property
    def accum(self) -> int:
        """Bytes of a number of an accumulator."""
        return 8 if self.dtype == "float64" else 4

    @property
    def bytes(self) -> int:
        """Of one tensor."""
        return self.shape.numel * self.size

    @property
    def mask(self) -> bool:
        return self.adds and self.activation in _C.two_sided_activations()

    @property
    def forward_needs(self) -> dict[str, Any]:
        needs = {name: getattr(self, name) for name in ("alignment", "frozen", "activation")}
        return needs | {"output": self.input, "residual": self.residual or self.adds}

    @property
    def backward_needs(self) -> dict[str, Any]:
        names = ("alignment", "residual", "mask", "frozen", "input", "params", "activation")
        needs = {name: getattr(self, name) for name in names}
        return needs | {"dresidual": self.input and (self.residual or self.adds)}

    def forward(self, facts: _C.DeviceInfo, **options: Any) -> _C.ForwardPlan:
        return _C.plan_forward(self.shape.geometry, self.dtype, facts, **self.forward_needs, **options)

    def backward(self, facts: _C.DeviceInfo, **options: Any) -> _C.BackwardPlan:
        return _C.plan_backward(self.shape.geometry, self.dtype, facts, **self.backward_needs, **options)

    def all_forward(self, facts: _C.DeviceInfo, **options: Any) -> list[_C.ForwardPlan]:
        return _C.compare_forward(self.shape.geometry, self.dtype, facts, **self.forward_needs, **options)

    def all_backward(self, facts: _C.DeviceInfo, **options: Any) -> list[_C.BackwardPlan]:
        return _C.compare_backward(self.shape.geometry, self.dtype, facts, **self.backward_needs, **options)


def words(plan: _C.ForwardPlan | _C.BackwardPlan | str) -> str:
    """The plan, or its text, without its estimate."""
    return str(plan).split("; estimate ")[0]


def random_call(r: random.Random) -> Call:
    """Sizes from one to far beyond 2^31 elements, of powers of two, their neighbours and multiples."""
    scale = r.choice((0.25, 0.5, 0.5, 1.0))

    def size(bits: float) -> int:
        n = int(2 ** r.uniform(0, bits * scale))
        return max(1, r.choice((n, n, n // 8 * 8, 1 << n.bit_length(), n + 1)))

    kind = r.choice((BATCH, GROUP, GROUP, LAYER))
    groups, per_group = size(11), size(9)
    if kind == LAYER and r.random() < 0.5:
        shape = Shape(kind, size(14), 1 + groups * per_group, size(24), 1, False)
    elif kind == LAYER:
        shape = Shape(kind, size(26), groups * per_group, 1, 1, False)
    else:
        C = groups * per_group
        space = 1 if r.random() < 0.1 else size(24)
        shape = Shape(kind, size(14), C, space, C if kind == BATCH else groups, r.random() < 0.5)
    flags = (r.random() < 0.3, r.random() < 0.3, r.random() < 0.8, r.random() < 0.7)
    dtype = r.choice(list(DTYPES))
    alignment = r.choice([a for a in (2, 4, 8, 16, 16, 16) if a >= DTYPES[dtype]])
    residual, frozen, needs_input, params = flags
    frozen &= kind == BATCH
    activation = r.choice(_C.activations())
    return Call(
        shape, dtype, alignment, residual, frozen, needs_input or not params, params, activation, r.random() < 0.3
    )


def large_call(r: random.Random) -> Call:
    """Training on tensors that devices have room for and take microseconds to read: 4 to 400 million elements."""
    numel = 2 ** r.uniform(22, 28.5)
    kind, C, G = r.choice((BATCH, GROUP, LAYER)), int(2 ** r.uniform(0, 13)), 1
    if kind == LAYER:
        n, space = max(1, int(numel / C)), 1
    else:
        per_group = int(2 ** r.uniform(0, 6))
        G = max(1, C // per_group)
        C = G * per_group
        n = int(2 ** r.uniform(0, 8)) if r.random() < 0.8 else max(1, int(numel / C))
        space = max(1, int(numel / C / n))
    shape = Shape(kind, n, C, space, C if kind == BATCH else G, kind != LAYER and r.random() < 0.5)
    dtype = r.choice(("float32", "bfloat16"))
    flags = (r.random() < 0.5, False, True, r.random() < 0.7)
    return Call(shape, dtype, r.choice((4, 16, 16)), *flags, r.choice(_C.activations()), r.random() < 0.3)
