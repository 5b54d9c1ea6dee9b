"""The rows of the table, and who runs in each: fastnorm, torch.nn, torch.compile, a plain copy.

The shapes are `BENCH` and `TINY` of tests/cases.py, the table that the tests read too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import cases
import fastnorm

Call = Callable[[], object]
Norm = Callable[[Tensor, Tensor | None], Tensor]

MODES = ("forward", "step", "eval")  # step: forward and backward
DTYPES = ("float32", "bfloat16")
SHORT = {
    "planar": "planar",
    "channels_last": "last",
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "float64": "f64",
}
QUICK = (  # a row of each kind: short enough for a demo
    r"^tiny .* float32 planar plain",
    r"x64x56x56 float32 planar \+relu",
    r"x256x56x56 bfloat16 channels_last \+add",
    r"x512x28x28 float32 channels_last \+relu",
    r"x1024x14x14 float32 planar \+add",
    r"x2048x7x7 bfloat16 planar plain",
    r"x320x64x64 float32 planar \+silu",
    r"x640x32x32 bfloat16 channels_last \+silu",
    r"6272x768 float32 planar plain",
    r"InstanceNorm3d .* bfloat16 planar \+relu",
)


@dataclass(frozen=True)
class Row:
    """One line of the table: a layer, its dtype, its layout and what is fused behind it.

    Parameters are float32 whatever the input is, as in training under autocast.
    """

    layer: cases.Layer
    dtype: str
    layout: str
    epilogue: str

    @property
    def activation(self) -> str | None:
        """Of the fused epilogue: the model's own one, and ReLU after a residual add."""
        return {"plain": None, "act": self.layer.activations[0], "add_act": "relu"}[self.epilogue]

    @property
    def residual(self) -> bool:
        return self.epilogue == "add_act"

    @property
    def nbytes(self) -> int:
        """Bytes of the input."""
        elements = 1
        for size in self.layer.shape:
            elements *= size
        return elements * cases.DTYPES[self.dtype].itemsize

    @property
    def title(self) -> str:
        """What the rows of one shape share: "ResNet-50 BatchNorm2d 32x64x56x56"."""
        return f"{self.layer.label} {self.layer.norm} {'x'.join(map(str, self.layer.shape))}"

    @property
    def variant(self) -> str:
        """What tells apart the rows of one shape: "bf16 last +add+relu"."""
        return f"{SHORT[self.dtype]} {SHORT[self.layout]} {self.fused}"

    @property
    def fused(self) -> str:
        return "plain" if self.activation is None else f"{'+add' if self.residual else ''}+{self.activation}"

    @property
    def name(self) -> str:
        """The full name, which --filter searches."""
        return f"{self.title} {self.dtype} {self.layout} {self.fused}"


def passes(mode: str, activation: str | None, residual: bool) -> int:
    """How often, at least, a tensor of the input's size passes between memory and processor.

    forward reads x (and the residual) and writes y; backward reads dy and x and writes dx (and
    dresidual, unless that is dy itself). Behind a residual, ReLU needs one saved bit per element
    (not counted), any other activation needs the residual.
    """
    forward = 3 if residual else 2
    if mode != "step":
        return forward
    backward = 3
    if residual and activation is not None:
        backward += 1 if activation in ("relu", "leaky_relu") else 2
    return forward + backward


def table(
    pattern: str = "",
    dtypes: tuple[str, ...] = DTYPES,
    layouts: tuple[str, ...] = cases.LAYOUTS,
    epilogues: tuple[str, ...] = cases.EPILOGUES,
) -> Iterator[Row]:
    """Every row of the full table whose name has the regular expression `pattern` in it."""
    for layer in (cases.TINY, *cases.BENCH):
        for dtype, layout, epilogue in product(dtypes, layer.layouts, cases.EPILOGUES):
            row = Row(layer, dtype, layout, epilogue)
            wanted = layout in layouts and epilogue in epilogues
            if wanted and re.search(pattern, row.name):
                yield row


def quick_table(pattern: str = "") -> Iterator[Row]:
    """The rows of `table` that a demo has the time for."""
    return table(f"(?=.*(?:{pattern}))(?:{'|'.join(QUICK)})" if pattern else "|".join(QUICK))


def torch_activation(name: str | None) -> Callable[[Tensor], Tensor]:
    """The activation as a torch.nn user writes it: ReLU in place, as torchvision's models have it;
    the others not, since in place they would save a copy for the backward pass.
    """
    return {
        None: lambda t: t,
        "relu": lambda t: F.relu(t, inplace=True),
        "silu": F.silu,
        "gelu": F.gelu,
    }[name]


def torch_norm(row: Row, norm: nn.Module) -> Norm:
    """torch.nn's side: norm, `out += residual`, activation."""
    act = torch_activation(row.activation)

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        out = norm(x)
        if residual is not None:
            out += residual
        return act(out)

    return run


def mode_call(mode: str, norm: Norm, x: Tensor, residual: Tensor | None, parameters: list[Tensor]) -> Call:
    """One call of `norm` in `mode`.

    A step takes the gradients of x, the residual and the parameters from `torch.autograd.grad`:
    accumulating into `.grad` of a leaf would copy a gradient that an add hands to two places.
    """
    if mode == "eval":

        def evaluate() -> Tensor:
            with torch.no_grad():
                return norm(x, residual)

        return evaluate
    if mode == "forward":
        return lambda: norm(x, residual)
    inputs = [x, *parameters] if residual is None else [x, residual, *parameters]
    dy = torch.randn_like(norm(x, residual))  # in the layout of the output: the fastest case for each
    return lambda: torch.autograd.grad((norm(x, residual),), inputs, (dy,))


class Arena:
    """The tensors and modules of one row, and the calls to time on them."""

    def __init__(self, row: Row, device: str = "cpu") -> None:
        self.row = row

        def tensor(seed: int) -> Tensor:
            generator = torch.Generator(device).manual_seed(seed)
            t = torch.randn(row.layer.shape, device=device, generator=generator)
            return cases.to_layout(t.to(cases.DTYPES[row.dtype]), row.layout).requires_grad_()

        self.x = tensor(0)
        self.residual = tensor(1) if row.residual else None
        self.modules = {
            "fastnorm": row.layer.build(fastnorm, activation=row.activation).to(device),
            "torch": row.layer.build(nn).to(device),
        }
        self.modules["compile"] = self.modules["torch"]
        self.norms: dict[str, Norm] = {
            "fastnorm": self.modules["fastnorm"],
            "torch": torch_norm(row, self.modules["torch"]),
        }

    def calls(self, mode: str, with_compile: bool = False) -> dict[str, Call]:
        """What to time in `mode`, by contestant; "clone" is the copy that measures the floor."""
        for module in self.modules.values():
            module.train(mode != "eval")
        if with_compile and "compile" not in self.norms:
            self.norms["compile"] = torch.compile(self.norms["torch"], fullgraph=True, dynamic=False)
        calls = {
            name: mode_call(mode, norm, self.x, self.residual, list(self.modules[name].parameters()))
            for name, norm in self.norms.items()
        }
        x = self.x.detach()
        return calls | {"clone": x.clone}

    def disagreement(self) -> float:
        """The largest difference between our training output and torch.nn's, in epsilons of the
        dtype times the larger of 1 and the value: a bench of wrong answers is worth nothing.
        """
        for module in self.modules.values():
            module.train()
        with torch.no_grad():
            ours, theirs = (self.norms[name](self.x, self.residual).float() for name in ("fastnorm", "torch"))
        error = (ours - theirs).abs_().div_(theirs.abs_().clamp_min_(1))
        return float(error.max()) / torch.finfo(self.x.dtype).eps
