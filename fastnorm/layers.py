"""Drop-ins for layers that torch.nn lacks and vision models have: torchvision's, timm's and detectron2's."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from . import plain
from .dispatch import Entry, fused_layer_norm2d
from .modules import BY_TORCH_CLASS, BatchNorm2d, Norm, _public
from .ops import OptTensor

__all__ = ["FrozenBatchNorm2d", "LayerNorm2d"]


@_public
class LayerNorm2d(Norm, plain.LayerNorm2d):
    """Layer norm over the channels of every position of x (N, C, H, W), without a permute; weight and bias (C,).

    The state_dict is that of torchvision's and timm's LayerNorm2d, which `convert` turns into this class. Their result
    lies channels_last in memory whatever x does; this one's as x does, where the kernels serve the call. RuntimeError
    where x is not 4-dimensional or has another number of channels.
    Ba et al. 2016, https://arxiv.org/abs/1607.06450; over channels alone: Liu et al. 2022 (ConvNeXt),
    https://arxiv.org/abs/2201.03545."""

    def _fused(self, entry: Entry, x: Tensor, residual: OptTensor, code: int, param: float) -> Tensor:
        shape: Any = self.normalized_shape
        return fused_layer_norm2d(entry, x, shape, *self._affine(), self.eps, residual, code, param)


@_public
class FrozenBatchNorm2d(Norm, plain.FrozenBatchNorm2d):
    """BatchNorm2d of x (N, C, H, W) with given statistics, in train() and eval() alike, in one pass.

    weight, bias, running_mean and running_var (C,) are buffers: only x and the residual get gradients. The state_dict
    is that of torchvision's and detectron2's FrozenBatchNorm2d; BatchNorm2d's is taken too, and its num_batches_tracked
    ignored. ValueError where x is not 4-dimensional, RuntimeError for another number of channels. Returns x's dtype,
    where torchvision's returns the dtype that x and the buffers promote to. Ioffe & Szegedy 2015,
    https://arxiv.org/abs/1502.03167, with the statistics fixed: torchvision.ops.FrozenBatchNorm2d."""

    def _fused(self, entry: Entry, x: Tensor, residual: OptTensor, code: int, param: float) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"expected 4D input (got {x.dim()}D input)")
        buffers = self._buffers
        try:  # nn.Module.__getattr__ takes ten times as long
            weight, bias = buffers["weight"], buffers["bias"]
            mean, var = buffers["running_mean"], buffers["running_var"]
        except KeyError:  # one of them is something else
            weight, bias, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        return entry(x, weight, bias, residual, mean, var, None, 0, 0, self.eps, code, param, False, 0.0)

    @classmethod
    def from_batch_norm(cls, norm: nn.Module) -> FrozenBatchNorm2d:
        """A frozen copy of a torch.nn or fastnorm BatchNorm2d or SyncBatchNorm: its values, eps, device, dtype,
        training flag and, of fastnorm's, the activation.

        TypeError for another class; ValueError where it has no running statistics.
        """
        values = frozen_values(norm)
        frozen = cls(1, **_activation_of(norm))
        frozen.eps = float(norm.eps)  # type: ignore[arg-type]
        for name, value in values.items():
            setattr(frozen, name, value)
        return frozen.train(norm.training)

    def to_batch_norm(self) -> BatchNorm2d:
        """A fastnorm.BatchNorm2d with copies of these values: weight and bias are Parameters, and training moves the
        running statistics."""
        weight = self.weight
        norm = BatchNorm2d(
            self.num_features, self.eps, device=weight.device, dtype=weight.dtype, **_activation_of(self)
        )
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(norm, name).copy_(getattr(self, name))
        return norm.train(self.training)


#: Other packages' classes, by their modules and names, -> fastnorm's: none of these packages is imported here.
_FOREIGN: dict[tuple[str, str], type[Norm]] = {
    ("torchvision.models.convnext", "LayerNorm2d"): LayerNorm2d,
    ("timm.layers.norm", "LayerNorm2d"): LayerNorm2d,
    ("torchvision.ops.misc", "FrozenBatchNorm2d"): FrozenBatchNorm2d,
    ("detectron2.layers.batch_norm", "FrozenBatchNorm2d"): FrozenBatchNorm2d,
}


def fastnorm_class(cls: type[nn.Module]) -> type[Norm] | None:
    """What `convert` makes of modules of exactly this class, of torch.nn or of another package."""
    ours = BY_TORCH_CLASS.get(cls)
    if ours is None and getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls:
        ours = _FOREIGN.get((cls.__module__, cls.__name__))
    return ours


def _activation_of(norm: nn.Module) -> dict[str, Any]:
    activation, param = norm._epilogue() if isinstance(norm, Norm) else (None, 0.0)
    return {} if activation is None else {"activation": activation, "activation_param": param}


def frozen_values(norm: nn.Module) -> dict[str, Tensor]:
    """Copies of what a BatchNorm2d or SyncBatchNorm normalizes by in evaluation; the errors of `from_batch_norm`."""
    if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        raise TypeError(f"norm must be a BatchNorm2d or SyncBatchNorm, but got {type(norm).__name__}")
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm has no running statistics (track_running_stats=False): there is nothing to freeze")
    mean = norm.running_mean
    values = {
        "weight": torch.ones_like(mean) if norm.weight is None else norm.weight,
        "bias": torch.zeros_like(mean) if norm.bias is None else norm.bias,
        "running_mean": mean,
        "running_var": norm.running_var,
    }
    return {name: value.detach().clone() for name, value in values.items()}
