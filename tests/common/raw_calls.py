"""A case as calls of raw operators, forward and backward apart: of torch.ops.fastnorm_emulated, or of fastnorm."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastnorm.activations import CODES
from fastnorm.ops import NORMALIZED_CHANNELS
from tests.common.cases import Case
from tests.common.numerics import SLOPE, Inputs, add_batch, build
from tests.common.plan_model import Shape, shape_of


def planned_shape(case: Case) -> Shape:
    """What the planner is told of x. One channel lies the same in either layout, and counts as planar."""
    shape = shape_of(case.layer, case.layout)
    return dataclasses.replace(shape, last=shape.last and shape.C > 1)


@dataclasses.dataclass
class RawCall:
    """ops: torch.ops.fastnorm or torch.ops.fastnorm_emulated."""

    case: Case
    inputs: Inputs
    ops: Any = torch.ops.fastnorm
    device: torch.device = torch.device("cpu")  # noqa: RUF009

    def __post_init__(self) -> None:
        case, inputs = self.case, self.inputs
        self.module = build(case, torch.nn, self.device)
        self.x, self.residual, self.dy = (add_batch(t, case) for t in (inputs.x, inputs.residual, inputs.grad))
        self.weight, self.bias = (
            None if t is None else t.detach() for t in (self.module._parameters.get(n) for n in ("weight", "bias"))
        )
        norm = case.layer.norm
        normalized_dims = len(self.module.normalized_shape) if norm == "LayerNorm" else 0
        if norm == "LayerNorm2d":
            normalized_dims = NORMALIZED_CHANNELS
        is_batch = norm.startswith("Batch")
        self.frozen = is_batch and case.mode != "train" and self.module._buffers["running_mean"] is not None
        self.activation = CODES[case.activation]
        self.settings = (case.layer.groups, normalized_dims, self.module.eps, self.activation, SLOPE)

    @property
    def shape(self) -> Shape:
        return planned_shape(self.case)

    def forward(self, save_mask: bool = True) -> dict[str, Tensor]:
        statistics = [self.module.running_mean, self.module.running_var] if self.frozen else [None, None]
        outputs = self.ops.norm_forward(
            self.x,
            self.weight,
            self.bias,
            self.residual,
            *statistics,
            *self.settings,
            save_mask,
        )
        return dict(zip(("y", "stats", "mask"), outputs, strict=True))

    def backward(
        self, stats: Tensor, mask: Tensor, output_mask: tuple[bool, bool, bool] = (True, True, True)
    ) -> dict[str, Tensor]:
        """output_mask: of dx, of dweight and dbias, of dresidual."""
        recomputes = self.activation != 0 and mask.numel() == 0
        outputs = self.ops.norm_backward(
            self.dy,
            self.x,
            self.weight,
            self.bias,
            self.residual if recomputes else None,
            stats,
            mask,
            *self.settings,
            self.frozen,
            list(output_mask),
        )
        return dict(zip(("dx", "dweight", "dbias", "dresidual"), outputs, strict=True))

    def both(self) -> dict[str, Tensor]:
        """All outputs; of the mask the bits that mean something."""
        forward = self.forward()
        results = forward | self.backward(forward["stats"], forward["mask"])
        return results | {"mask": mask_bits(forward["mask"], self.shape)}


def mask_bits(mask: Tensor, shape: Shape) -> Tensor:
    """A row of bits for every run, without those that fill its last bytes up."""
    rows = mask.numel() and shape.N * shape.C * shape.S // shape.mask_run
    if rows == 0:
        return mask
    bits = mask.view(rows, -1, 1).cpu() >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.reshape(rows, -1)[:, : shape.mask_run]


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names of what differs; a NaN is the same as itself."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [
        name
        for name in a
        if not torch.equal(a[name].contiguous().view(integers[a[name].element_size()]),
                           b[name].contiguous().view(integers[b[name].element_size()]))
    ]  # fmt: skip
