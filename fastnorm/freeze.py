"""freeze_batch_norm: batch norms become FrozenBatchNorm2d, in place, for finetuning with small batches."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .convert import change_class, has_own_forward, is_public
from .layers import FrozenBatchNorm2d, frozen_values

__all__ = ["freeze_batch_norm"]

Model = TypeVar("Model", bound=nn.Module)

#: What a batch norm has and a frozen one has not.
_LEFTOVERS = ("momentum", "affine", "track_running_stats", "process_group", "num_features")


def freeze_batch_norm(model: Model) -> Model:
    """Turn every BatchNorm2d and SyncBatchNorm of `model` into a FrozenBatchNorm2d, in place; returns `model`.

    The modules change their class and stay where they are, with their hooks, as in `convert` (detectron2's
    convert_frozen_batchnorm puts new modules in their place). Their Parameters become buffers that are copies: an
    optimizer that holds the Parameters moves nothing any more, and should be made after this call. Subclasses, which
    may compute something else (a norm with a parametrized weight is one), and norms whose forward was replaced on the
    instance are left as they are. `to_batch_norm` is the way back for one norm.

    ValueError, and nothing is changed, where a norm has no running statistics.
    """
    frozen = {}
    for name, module in model.named_modules():
        if _is_batch_norm(module):
            try:
                frozen[name] = frozen_values(module)
            except ValueError as error:
                raise ValueError(f"{name or 'model'}: {error}") from None
    for name, values in frozen.items():
        module = model.get_submodule(name)
        for parameter in ("weight", "bias"):
            del module._parameters[parameter]
        module._buffers.clear()
        for leftover in _LEFTOVERS:
            vars(module).pop(leftover, None)
        change_class(module, FrozenBatchNorm2d)
        for buffer, value in values.items():
            module.register_buffer(buffer, value)
    return model


def _is_batch_norm(module: nn.Module) -> bool:
    exact = type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or is_public(module)
    return exact and isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and not has_own_forward(module)
