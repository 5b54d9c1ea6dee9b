"""A norm and its activation in torch's own modules: what `revert` leaves of a fastnorm norm that fuses an activation,
and what torch.jit.script compiles in place of any fastnorm norm."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from . import plain, reference
from .activations import ACTIVATIONS

__all__ = ["UNFUSED", "TorchNormActivation", "forget_activation", "scriptable"]


class TorchNormActivation(nn.Module):
    """A torch.nn norm, the residual add and the activation, in torch's own operators."""

    torch_class: type[nn.Module]
    activation: str | None
    activation_param: float

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return reference.epilogue(super().forward(input), residual, self.activation, self.activation_param)

    def _epilogue(self) -> tuple[str | None, float]:
        return self.activation, self.activation_param

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self)


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch.nn's batch norm of any number of dimensions, as torch.nn.SyncBatchNorm is where it synchronizes nothing:
    what `revert_sync_batchnorm` makes of a module that never was of 1, 2 or 3 dimensions. x (N, C, *)."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


class BatchNormActivation(TorchNormActivation, BatchNorm):
    torch_class = BatchNorm


class SyncBatchNormActivation(TorchNormActivation, nn.SyncBatchNorm):
    torch_class = nn.SyncBatchNorm


class BatchNorm1dActivation(TorchNormActivation, nn.BatchNorm1d):
    torch_class = nn.BatchNorm1d


class BatchNorm2dActivation(TorchNormActivation, nn.BatchNorm2d):
    torch_class = nn.BatchNorm2d


class BatchNorm3dActivation(TorchNormActivation, nn.BatchNorm3d):
    torch_class = nn.BatchNorm3d


class InstanceNorm1dActivation(TorchNormActivation, nn.InstanceNorm1d):
    torch_class = nn.InstanceNorm1d


class InstanceNorm2dActivation(TorchNormActivation, nn.InstanceNorm2d):
    torch_class = nn.InstanceNorm2d


class InstanceNorm3dActivation(TorchNormActivation, nn.InstanceNorm3d):
    torch_class = nn.InstanceNorm3d


class GroupNormActivation(TorchNormActivation, nn.GroupNorm):
    torch_class = nn.GroupNorm


class LayerNormActivation(TorchNormActivation, nn.LayerNorm):
    torch_class = nn.LayerNorm


class LayerNorm2dActivation(TorchNormActivation, plain.LayerNorm2d):
    torch_class = plain.LayerNorm2d


class FrozenBatchNorm2dActivation(TorchNormActivation, plain.FrozenBatchNorm2d):
    torch_class = plain.FrozenBatchNorm2d


#: torch.nn class -> the same with an activation behind it
UNFUSED: dict[type[nn.Module], type[TorchNormActivation]] = {
    cls.torch_class: cls
    for cls in (
        BatchNormActivation,
        SyncBatchNormActivation,
        BatchNorm1dActivation,
        BatchNorm2dActivation,
        BatchNorm3dActivation,
        InstanceNorm1dActivation,
        InstanceNorm2dActivation,
        InstanceNorm3dActivation,
        GroupNormActivation,
        LayerNormActivation,
        LayerNorm2dActivation,
        FrozenBatchNorm2dActivation,
    )
}


def as_torch(norm: Any) -> nn.Module:
    """A torch.nn norm with `norm`'s Parameters, buffers and settings; `norm` stays what it is."""
    plain: nn.Module = copy.copy(norm)
    plain.__class__ = norm.torch_class
    if norm._epilogue()[0] is not None:
        forget_activation(plain)
    return plain


def forget_activation(module: nn.Module) -> None:
    """Remove what a fused activation has left on a module that is a plain norm from now on."""
    for name in ("activation", "activation_param", "_fuses", "_fusion", "_adds_in_place"):
        vars(module).pop(name, None)


def scriptable(norm: Any) -> nn.Module:
    """What torch.jit.script compiles in place of `norm`: torch.nn's modules, with the same Parameters and buffers."""
    plain, (activation, param) = as_torch(norm), norm._epilogue()
    return plain if activation is None else nn.Sequential(plain, ACTIVATIONS[activation].module(param))
