"""The table of cases, as data: read by the tests and by benchmarks/.

A `Layer` says which normalization runs on which shape; a `Case` adds layout, precision, epilogue and mode.
The class named by `Layer.norm` has the same name and constructor in torch.nn and in fastnorm, so one table builds both;
what torch.nn lacks, fastnorm.plain has in torch's operators.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fastnorm.activations
import fastnorm.plain

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Dtype of the input, dtype of parameters and running statistics.
PRECISIONS = (
    ("float64", "float64"),
    ("float32", "float32"),
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float32"),
    ("float16", "float16"),
)
LAYOUTS = ("planar", "channels_last")
EPILOGUES = ("plain", "act", "add_act")
ACTIVATIONS: tuple[str | None, ...] = (None, *fastnorm.activations.ACTIVATIONS)
DATA = ("normal", "offset", "heavy", "denormal")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A normalization layer and the shape of its input.

    label: the model that has it, or what is awkward about it.  norm: class name.  shape: input shape.
    args, kwargs: of the constructor.  activations: those of the model's fused epilogue.
    """

    label: str
    norm: str
    shape: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    activations: tuple[str, ...] = ("relu",)

    @property
    def id(self) -> str:
        return f"{self.norm}-{'x'.join(map(str, self.shape))}-{self.label.replace(' ', '_')}"

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts that this shape can have."""
        spatial = self.norm != "LayerNorm" and len(self.shape) in (4, 5)
        return LAYOUTS if spatial else LAYOUTS[:1]

    @property
    def groups(self) -> int:
        """Groups of channels that share statistics: 0 for batch norm and layer norm."""
        if self.norm == "GroupNorm":
            return int(self.args[0])
        return int(self.args[0]) if self.norm.startswith("InstanceNorm") else 0

    def build(self, namespace: ModuleType, **extra: Any) -> torch.nn.Module:
        """The layer from `namespace`: torch.nn or fastnorm."""
        cls = getattr(namespace, self.norm, None) or getattr(fastnorm.plain, self.norm)
        module = cls(*self.args, **dict(self.kwargs), **extra)
        assert isinstance(module, torch.nn.Module)
        return module


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer with everything else that a test or a benchmark varies.

    mode: "train"; "eval" (statistics given, no gradient); "frozen" (eval with gradients).
    """

    layer: Layer
    layout: str = "planar"
    precision: tuple[str, str] = ("float32", "float32")
    activation: str | None = None
    residual: bool = False
    mode: str = "train"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision[0]]

    @property
    def param_dtype(self) -> torch.dtype:
        return DTYPES[self.precision[1]]

    @property
    def id(self) -> str:
        precision = "-".join(dict.fromkeys(self.precision))
        epilogue = ("add_" if self.residual else "") + (self.activation or "plain")
        return f"{self.layer.id}-{self.layout}-{precision}-{epilogue}-{self.mode}"


# What benchmarks/ measures and docs/speed.md reports: the layers of real models.
TINY = Layer("tiny", "BatchNorm2d", (2, 8, 4, 4), (8,))
_RESNET = [(64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)]
_UNET = [(320, 64), (640, 32), (1280, 16)]
_CONVNEXT = [(401408, 96), (6272, 768)]
BENCH = (
    *(Layer("ResNet-50", "BatchNorm2d", (32, c, s, s), (c,)) for c, s in _RESNET),
    *(Layer("UNet", "GroupNorm", (2, c, s, s), (32, c), (), ("silu",)) for c, s in _UNET),
    *(Layer("ConvNeXt", "LayerNorm", (n, d), (d,), (), ("gelu",)) for n, d in _CONVNEXT),
    Layer("3d U-Net", "InstanceNorm3d", (2, 32, 64, 64, 64), (32,), (("affine", True),)),
)

_AFFINE = (("affine", True),)
_TRACK = (("affine", True), ("track_running_stats", True))

# Small shapes, each awkward in its own way.
BATCH = (
    TINY,
    Layer("two dims", "BatchNorm1d", (7, 5), (5,)),
    Layer("odd", "BatchNorm1d", (4, 3, 11), (3,)),
    Layer("one sample", "BatchNorm1d", (1, 3, 17), (3,)),
    Layer("many rows", "BatchNorm1d", (130, 33), (33,)),
    Layer("odd C prime S", "BatchNorm2d", (3, 13, 7, 11), (13,)),
    Layer("S is 1", "BatchNorm2d", (6, 17, 1, 1), (17,)),
    Layer("C is 1", "BatchNorm2d", (3, 1, 9, 5), (1,)),
    Layer("whole packs", "BatchNorm2d", (2, 64, 8, 8), (64,)),
    Layer("pack and tail", "BatchNorm2d", (2, 65, 5, 5), (65,)),
    Layer("wide", "BatchNorm2d", (2, 300, 3, 3), (300,)),
    Layer("packs over runs", "BatchNorm2d", (9, 16, 7, 7), (16,)),
    Layer("runs in a pack", "BatchNorm1d", (6, 40, 3), (40,)),
    Layer("few channels", "BatchNorm2d", (2, 3, 37, 41), (3,)),
    Layer("one sample", "BatchNorm2d", (1, 4, 6, 10), (4,)),
    Layer("split over threads", "BatchNorm2d", (4, 32, 28, 28), (32,)),
    Layer("not affine", "BatchNorm2d", (3, 6, 5, 4), (6,), (("affine", False),)),
    Layer("untracked", "BatchNorm2d", (3, 6, 5, 4), (6,), (("track_running_stats", False),)),
    Layer("cumulative", "BatchNorm2d", (3, 6, 5, 4), (6,), (("momentum", None),)),
    Layer("large eps", "BatchNorm2d", (3, 6, 5, 4), (6,), (("eps", 0.5), ("momentum", 0.9))),
    Layer("odd", "BatchNorm3d", (2, 6, 3, 5, 7), (6,)),
    Layer("smallest", "BatchNorm3d", (1, 2, 2, 1, 1), (2,)),
)
GROUP = (
    Layer("tiny", "GroupNorm", (2, 8, 4, 4), (2, 8)),
    Layer("two dims", "GroupNorm", (5, 12), (3, 12)),
    Layer("three dims", "GroupNorm", (2, 6, 13), (2, 6)),
    Layer("G is C", "GroupNorm", (2, 7, 5, 3), (7, 7)),
    Layer("G is 1", "GroupNorm", (3, 9, 5, 5), (1, 9)),
    Layer("D is 7", "GroupNorm", (2, 21, 3, 5), (3, 21)),
    Layer("D is 10", "GroupNorm", (2, 40, 5, 5), (4, 40)),
    Layer("D is 3 of 32 groups", "GroupNorm", (1, 96, 5, 5), (32, 96)),
    Layer("D is 64", "GroupNorm", (1, 128, 4, 4), (2, 128)),
    Layer("D is 50", "GroupNorm", (2, 100, 3, 3), (2, 100)),
    Layer("S is 1", "GroupNorm", (3, 24, 1, 1), (4, 24)),
    Layer("C is 1", "GroupNorm", (2, 1, 5, 7), (1, 1)),
    Layer("one value", "GroupNorm", (2, 10, 1), (10, 10)),
    Layer("split over threads", "GroupNorm", (2, 64, 24, 24), (32, 64)),
    Layer("not affine", "GroupNorm", (2, 8, 5, 4), (2, 8), (("affine", False),)),
    Layer("large eps", "GroupNorm", (2, 8, 5, 4), (2, 8), (("eps", 0.5),)),
    Layer("five dims", "GroupNorm", (2, 6, 3, 5, 2), (3, 6)),
)
INSTANCE = (
    Layer("odd", "InstanceNorm1d", (3, 5, 13), (5,), _AFFINE),
    Layer("tracked", "InstanceNorm1d", (3, 5, 13), (5,), _TRACK),
    Layer("no batch", "InstanceNorm1d", (5, 13), (5,), _AFFINE),
    Layer("default", "InstanceNorm2d", (2, 8, 4, 4), (8,)),
    Layer("tracked", "InstanceNorm2d", (3, 5, 7, 3), (5,), _TRACK),
    Layer("no batch", "InstanceNorm2d", (5, 7, 3), (5,), _TRACK),
    Layer("cumulative", "InstanceNorm2d", (2, 3, 4, 4), (3,), (*_TRACK, ("momentum", None))),
    Layer("pack and tail", "InstanceNorm2d", (2, 33, 5, 5), (33,), _AFFINE),
    Layer("C is 1", "InstanceNorm2d", (2, 1, 5, 5), (1,), _AFFINE),
    Layer("split over threads", "InstanceNorm2d", (2, 24, 40, 40), (24,), _AFFINE),
    Layer("odd", "InstanceNorm3d", (2, 6, 3, 5, 7), (6,), _AFFINE),
    Layer("tracked", "InstanceNorm3d", (2, 4, 3, 2, 2), (4,), _TRACK),
)
LAYER = (
    Layer("D is 7", "LayerNorm", (5, 7), (7,)),
    Layer("D is 1", "LayerNorm", (5, 1), (1,)),
    Layer("D is 16", "LayerNorm", (9, 16), (16,)),
    Layer("D is 33", "LayerNorm", (4, 33), (33,)),
    Layer("D is 768", "LayerNorm", (3, 768), (768,)),
    Layer("D is 1023", "LayerNorm", (2, 3, 1023), (1023,)),
    Layer("many rows", "LayerNorm", (300, 24), (24,)),
    Layer("one row", "LayerNorm", (13,), (13,)),
    Layer("two dims", "LayerNorm", (3, 5, 6), ((5, 6),)),
    Layer("three dims", "LayerNorm", (2, 3, 4, 5), ((3, 4, 5),)),
    Layer("two of four", "LayerNorm", (2, 3, 4, 5), ((4, 5),)),
    Layer("not affine", "LayerNorm", (4, 10), (10,), (("elementwise_affine", False),)),
    Layer("no bias", "LayerNorm", (4, 10), (10,), (("bias", False),)),
    Layer("large eps", "LayerNorm", (4, 10), (10,), (("eps", 0.5),)),
    Layer("split over threads", "LayerNorm", (700, 96), (96,)),
)
LAYERS = (*BATCH, *GROUP, *INSTANCE, *LAYER)
# Layer norm over channels, which walks tiles of positions where maps are planar.
MAPS = (
    Layer("typical", "LayerNorm2d", (2, 12, 5, 4), (12,)),
    Layer("odd C prime S", "LayerNorm2d", (3, 13, 7, 11), (13,)),
    Layer("S is 1", "LayerNorm2d", (6, 17, 1, 1), (17,)),
    Layer("S is 2", "LayerNorm2d", (5, 9, 1, 2), (9,)),
    Layer("C is 1", "LayerNorm2d", (3, 1, 9, 5), (1,)),
    Layer("C is 3", "LayerNorm2d", (3, 3, 9, 5), (3,)),
    Layer("whole packs", "LayerNorm2d", (2, 64, 8, 8), (64,)),
    Layer("pack and tail", "LayerNorm2d", (2, 35, 5, 13), (35,)),
    Layer("two tiles", "LayerNorm2d", (1, 5, 37, 41), (5,)),
    Layer("tiles of long sets", "LayerNorm2d", (1, 600, 9, 9), (600,)),
    Layer("split over threads", "LayerNorm2d", (4, 96, 14, 14), (96,)),
    Layer("not affine", "LayerNorm2d", (3, 6, 5, 4), (6,), (("elementwise_affine", False),)),
    Layer("no bias", "LayerNorm2d", (3, 6, 5, 4), (6,), (("bias", False),)),
    Layer("large eps", "LayerNorm2d", (3, 6, 5, 4), (6,), (("eps", 0.5),)),
)
# No elements: torch.nn decides which of these are errors.
EMPTY = (
    Layer("no samples", "BatchNorm1d", (0, 5), (5,)),
    Layer("no samples", "BatchNorm2d", (0, 4, 5, 5), (4,)),
    Layer("no space", "BatchNorm2d", (2, 4, 0, 5), (4,)),
    Layer("no channels", "BatchNorm2d", (2, 0, 3, 3), (0,)),
    Layer("no samples", "BatchNorm3d", (0, 4, 2, 5, 5), (4,)),
    Layer("no samples", "GroupNorm", (0, 6, 5), (3, 6)),
    Layer("no space", "GroupNorm", (2, 6, 0, 5), (3, 6)),
    Layer("no samples", "InstanceNorm2d", (0, 4, 5, 5), (4,), _AFFINE),
    Layer("no samples tracked", "InstanceNorm2d", (0, 4, 5, 5), (4,), _TRACK),
    Layer("no space", "InstanceNorm1d", (2, 4, 0), (4,), _AFFINE),
    Layer("no rows", "LayerNorm", (0, 8), (8,)),
    Layer("no columns", "LayerNorm", (3, 0), (0,)),
    Layer("no middle", "LayerNorm", (3, 0, 8), (8,)),
)
# One ordinary layer of each norm, for tests that vary something else.
TYPICAL = (
    Layer("typical", "BatchNorm2d", (3, 6, 5, 4), (6,)),
    Layer("typical", "GroupNorm", (2, 12, 5, 4), (3, 12)),
    Layer("typical", "InstanceNorm2d", (2, 5, 5, 4), (5,), _AFFINE),
    Layer("typical", "LayerNorm", (6, 20), (20,)),
)


def modes(layer: Layer) -> tuple[str, ...]:
    """The modes in which this layer computes different things."""
    kwargs = dict(layer.kwargs)
    tracks = layer.norm.startswith("BatchNorm") and kwargs.get("track_running_stats", True)
    tracks = tracks or (layer.norm.startswith("Instance") and kwargs.get("track_running_stats"))
    return ("train", "eval", "frozen") if tracks else ("train",)


def parity_cases() -> Iterator[Case]:
    """Every layer x layout x precision x mode with three epilogues; every epilogue on the typical layers."""
    epilogues = ((None, False), ("relu", True), ("silu", False))
    for layer in (*LAYERS, *MAPS):
        for layout, precision, mode, (activation, residual) in itertools.product(
            layer.layouts, PRECISIONS, modes(layer), epilogues
        ):
            yield Case(layer, layout, precision, activation, residual, mode)
    for layer in (*TYPICAL, MAPS[0]):
        for layout, precision, mode, activation, residual in itertools.product(
            layer.layouts, PRECISIONS[1:3], modes(layer), ACTIVATIONS, (False, True)
        ):
            yield Case(layer, layout, precision, activation, residual, mode)


def thinned(cases: Iterable[Case], start: int = 0) -> Iterator[Case]:
    """Every layer x layout x epilogue x mode of `cases` once, each with the next of its precisions."""
    choices: dict[Case, list[Case]] = {}
    for case in cases:
        choices.setdefault(dataclasses.replace(case, precision=PRECISIONS[0]), []).append(case)
    for i, group in enumerate(choices.values()):
        # The second term, lest an epilogue always meet the same ones.
        yield group[(start + i + i // len(group)) % len(group)]


def to_layout(t: Tensor, layout: str) -> Tensor:
    """t, dense, in the layout named; same values."""
    if layout == "planar" or t.dim() not in (4, 5):
        return t.contiguous()
    last = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
    return t.contiguous(memory_format=last)


def make_data(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random values of one of the DATA kinds, drawn in float64 and rounded to dtype, on the CPU.

    normal: mean 0.5, std 2.  offset: mean 1e6 (1e3 for float16), std 1.  heavy: a tenth of the values
    a hundred times larger.  denormal: below the dtype's smallest normal number.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    if kind == "normal":
        x = 2 * x + 0.5
    elif kind == "offset":
        x = x + (1e3 if dtype == torch.float16 else 1e6)
    elif kind == "heavy":
        x = x * torch.where(torch.rand(shape, generator=generator) < 0.1, 100.0, 1.0)
    elif kind == "denormal":
        x = x * torch.finfo(dtype).tiny / 8
    else:
        raise ValueError(f"unknown kind of data {kind!r}, expected one of {DATA}")
    return x.to(dtype)
