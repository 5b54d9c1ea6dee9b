"""LayerNorm2d and FrozenBatchNorm2d in torch's own operators: torch.nn has neither.

The drop-ins of the same names (layers.py) derive from these, as the others do from torch.nn's. `revert` leaves these of
modules that were not converted from another package's class, torch.jit.script compiles them: it reads the annotations,
which therefore are no strings here.
"""

from typing import Any

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FrozenBatchNorm2d", "LayerNorm2d", "layer_norm2d"]


def layer_norm2d(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Layer norm over the channels of input (N, C, H, W), by F.layer_norm on a permuted view: the result lies
    channels_last in memory."""
    x = F.layer_norm(input.permute(0, 2, 3, 1), normalized_shape, weight, bias, eps)
    return x.permute(0, 3, 1, 2)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of x (N, C, H, W): torchvision's and timm's class of this name."""

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm2d(input, self.normalized_shape, self.weight, self.bias, self.eps)  # type: ignore[arg-type]


def rounded_to(x: Tensor, y: Tensor) -> Tensor:
    """y in x's dtype; integers get the floating-point results that they have."""
    return y.to(x.dtype) if x.is_floating_point() else y


torch.fx.wrap("rounded_to")  # a traced tensor does not say what it is


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm2d of x (N, C, H, W) whose weight, bias and statistics are buffers (C,), and stay what they are:
    torchvision's and detectron2's class of this name. Returns x's dtype where it is a floating-point one; torchvision's
    returns the dtype that x and the buffers promote to."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    _version = 3  # detectron2's

    def __init__(
        self, num_features: int, eps: float = 1e-5, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value, device=device, dtype=dtype))

    @property
    def num_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        y = input * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
        return rounded_to(input, y)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Takes BatchNorm2d's state too, and that of detectron2's first version, which has weight and bias alone."""
        state_dict.pop(prefix + "num_batches_tracked", None)
        version = local_metadata.get("version")
        if version is None or version < 2:
            state_dict.setdefault(prefix + "running_mean", torch.zeros_like(self.running_mean))
            state_dict.setdefault(prefix + "running_var", torch.ones_like(self.running_var))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"
