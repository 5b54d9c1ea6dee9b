"""The rows of the table and their contestants: fastnorm, torch.nn, torch.compile, a plain copy; peers.py has others.

The shapes are `BENCH` and `TINY` of tests/common/cases.py, the table that the tests read, and those of presets.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastnorm
from benchmarks.presets import CUDA_LAYERS
from benchmarks.validation import output_error
from fastnorm.activations import ACTIVATIONS
from tests.common import cases

Call = Callable[[], object]
Norm = Callable[[Tensor, Tensor | None], Tensor]

MODE_NAMES = {"forward": "forward", "step": "forward + backward", "eval": "eval"}
MODES = tuple(MODE_NAMES)
DTYPES = ("float32", "bfloat16")
SHORT = {
    "planar": "planar",
    "channels_last": "last",
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "float64": "f64",
}
MAX_COPIES = 64  # of the tensors of a row
DY_SEED = 1 << 20
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
CUDA_QUICK = (
    *QUICK,
    r"256x64x112x112 bfloat16 (planar|channels_last) \+relu",
    r"256x2048x7x7 bfloat16 channels_last \+add",
    r"VAE .*x20x256x256 bfloat16 (planar|channels_last) \+silu",
    r"nnU-Net .*x128x128x128 bfloat16 channels_last \+leaky_relu",
    r"1024x12288 (bfloat16|float32) planar plain",
    r"401408x96 bfloat16 planar plain",
)


@dataclass(frozen=True)
class Row:
    """One line of the table: a layer, its dtype, its layout and its fused epilogue.

    Parameters are float32 whatever the input is, as in training under autocast; torch.nn's where it takes these
    (`torch_parameters`).
    """

    layer: cases.Layer
    dtype: str
    layout: str
    epilogue: str

    @property
    def activation(self) -> str | None:
        """The activation of the epilogue: the model's own, and ReLU after a residual add."""
        return {"plain": None, "act": self.layer.activations[0], "add_act": "relu"}[self.epilogue]

    @property
    def residual(self) -> bool:
        return self.epilogue == "add_act"

    @property
    def nbytes(self) -> int:
        """Bytes in the input."""
        elements = 1
        for size in self.layer.shape:
            elements *= size
        return elements * cases.DTYPES[self.dtype].itemsize

    @property
    def title(self) -> str:
        """The part of the name that all rows of one shape share: "ResNet-50 BatchNorm2d 32x64x56x56"."""
        return f"{self.layer.label} {self.layer.norm} {'x'.join(map(str, self.layer.shape))}"

    @property
    def variant(self) -> str:
        """The part of the name that tells rows of one shape apart: "bf16 last +add+relu"."""
        return f"{SHORT[self.dtype]} {SHORT[self.layout]} {self.fused}"

    @property
    def fused(self) -> str:
        return "plain" if self.activation is None else f"{'+add' if self.residual else ''}+{self.activation}"

    @property
    def name(self) -> str:
        """The full name, which --filter searches."""
        return f"{self.title} {self.dtype} {self.layout} {self.fused}"


def passes(mode: str, activation: str | None, residual: bool) -> int:
    """The least number of times that a tensor of the input's size passes between memory and processor.

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
    device: str = "cpu",
    layers: Sequence[cases.Layer] = (),
) -> Iterator[Row]:
    """Every row of `layers`, by default of the full table, whose name contains a match of the regular expression
    `pattern`."""
    for layer in layers or (cases.TINY, *cases.BENCH, *(CUDA_LAYERS if device == "cuda" else ())):
        for dtype, layout, epilogue in product(dtypes, layer.layouts, cases.EPILOGUES):
            row = Row(layer, dtype, layout, epilogue)
            wanted = layout in layouts and epilogue in epilogues
            if wanted and re.search(pattern, row.name):
                yield row


def quick_table(pattern: str = "", device: str = "cpu") -> Iterator[Row]:
    """The rows of `table` that a demo has the time for."""
    quick = "|".join(CUDA_QUICK if device == "cuda" else QUICK)
    return (row for row in table(quick, device=device) if re.search(pattern, row.name))


def torch_parameters(row: Row, device: str) -> torch.dtype:
    """The dtype of torch.nn's parameters: on a GPU its group norm and layer norm take none but the input's."""
    any_dtype = device == "cpu" or row.layer.norm.startswith(("BatchNorm", "InstanceNorm"))
    return torch.float32 if any_dtype else cases.DTYPES[row.dtype]


def torch_activation(name: str | None) -> Callable[[Tensor], Tensor]:
    """The activation as a torch.nn user writes it: ReLU in place, as in torchvision's models; the others
    not in place, because there they would save a copy for the backward pass.
    """
    if name is None:
        return lambda t: t
    if name in ("relu", "leaky_relu"):
        return partial(getattr(F, name), inplace=True)
    return partial(ACTIVATIONS[name].value, param=0.01)


def torch_norm(row: Row, norm: Callable[[Tensor], Tensor]) -> Norm:
    """torch.nn's side: norm, `out += residual`, activation."""
    act = torch_activation(row.activation)

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        out = norm(x)
        if residual is not None:
            out += residual
        return act(out)

    return run


def copies_for(nbytes: int, cache: int) -> int:
    """The number of copies of a row's tensors that take turns, so that a cache of `cache` bytes holds none."""
    return min(MAX_COPIES, 1 + -(-cache // max(nbytes, 1)))


def in_turn(calls: Sequence[Call]) -> Call:
    """A call that runs `calls` in turn, and keeps each result until its next turn: no output lands in warm memory."""
    if len(calls) == 1:
        return calls[0]
    results: list[object] = [None] * len(calls)
    turns = itertools.cycle(range(len(calls)))

    def call() -> object:
        turn = next(turns)
        results[turn] = calls[turn]()
        return results[turn]

    return call


def refusing(error: Exception) -> Callable[..., Any]:
    """A call or a norm that fails with `error`."""

    def refuse(*_: object) -> Any:
        raise error

    return refuse


def call_or_refusal(make: Callable[[], Call]) -> Call:
    """The call that `make` makes; where that fails, one that fails likewise, so that validation tells of it."""
    try:
        return make()
    except Exception as error:
        return refusing(error)


def incoming(y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient of y: the same values for everyone, in the layout of y, which is the fastest case for each. No input
    has its seed: where dy is x, the gradient of a batch norm is nothing but roundings. dtype: what the values are
    rounded to, if not to y's.
    """
    generator = torch.Generator(y.device).manual_seed(DY_SEED)
    values = torch.randn(y.shape, device=y.device, generator=generator)
    return torch.empty_like(y).copy_(values.to(dtype or y.dtype))


def mode_call(
    mode: str,
    norm: Norm,
    x: Tensor,
    residual: Tensor | None,
    parameters: list[Tensor],
    dy_dtype: torch.dtype | None = None,
) -> Call:
    """One call of `norm` in `mode`. dy_dtype: what the incoming gradient is rounded to, if not to the output's dtype.

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
    dy = incoming(norm(x, residual), dy_dtype)
    return lambda: torch.autograd.grad((norm(x, residual),), inputs, (dy,))


class Arena:
    """The tensors and modules of one row, and the calls to time on them.

    copies: how many inputs take turns. others: further contestants by name, each its module and its call.
    """

    def __init__(
        self,
        row: Row,
        device: str = "cpu",
        copies: int = 1,
        others: Mapping[str, tuple[nn.Module, Norm]] = MappingProxyType({}),
    ) -> None:
        self.row = row

        def tensor(seed: int) -> Tensor:
            generator = torch.Generator(device).manual_seed(seed)
            t = torch.randn(row.layer.shape, device=device, generator=generator)
            return cases.to_layout(t.to(cases.DTYPES[row.dtype]), row.layout).requires_grad_()

        self.inputs = [(tensor(2 * i), tensor(2 * i + 1) if row.residual else None) for i in range(copies)]
        self.x, self.residual = self.inputs[0]
        self.modules = {
            "fastnorm": row.layer.build(fastnorm, activation=row.activation).to(device),
            "torch": row.layer.build(nn).to(device, torch_parameters(row, device)),
        }
        self.modules["compile"] = self.modules["torch"]
        self.norms: dict[str, Norm] = {
            "fastnorm": self.modules["fastnorm"],
            "torch": torch_norm(row, self.modules["torch"]),
        }
        for name, (module, norm) in others.items():
            self.modules[name], self.norms[name] = module.to(device), norm

    def calls(self, mode: str, with_compile: bool = False) -> dict[str, Call]:
        """The calls to time in `mode`, by contestant; "clone" is the copy that measures the floor. Where one of the
        others fails to be made, its call fails."""
        if with_compile and "compile" not in self.norms:
            self.norms["compile"] = torch.compile(self.norms["torch"], fullgraph=True, dynamic=False)
        calls = {"fastnorm": self._call("fastnorm", mode)}
        for name in self.norms:
            calls.setdefault(name, call_or_refusal(partial(self._call, name, mode)))
        return calls | {"clone": in_turn([x.detach().clone for x, _ in self.inputs])}

    def _call(self, name: str, mode: str) -> Call:
        module = self.modules[name].train(mode != "eval")
        if mode == "eval":  # by the same running statistics, however often each was called before
            module.load_state_dict(self.modules["torch"].state_dict())
        parameters = list(module.parameters())
        return in_turn([mode_call(mode, self.norms[name], x, r, parameters) for x, r in self.inputs])

    def exact(self, mode: str) -> object:
        """What torch.nn returns in float64, for the first of the inputs: who is right where two disagree."""
        module = self.row.layer.build(nn).to(self.x.device, torch.float64).train(mode != "eval")
        module.load_state_dict(self.modules["torch"].state_dict())
        x, residual = (None if t is None else t.detach().double().requires_grad_() for t in self.inputs[0])
        norm = torch_norm(self.row, module)
        return mode_call(mode, norm, x, residual, list(module.parameters()), self.x.dtype)()

    def disagreement(self) -> float:
        """The largest difference between our training output and torch.nn's, in epsilons of the
        dtype times the larger of 1 and the value: a bench of wrong answers is worth nothing.
        """
        for module in self.modules.values():
            module.train()
        with torch.no_grad():
            return output_error(*(self.norms[name](self.x, self.residual) for name in ("fastnorm", "torch")))
