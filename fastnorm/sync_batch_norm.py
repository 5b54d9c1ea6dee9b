"""SyncBatchNorm, and the conversion of batch norms to it and back.

    model = fastnorm.convert_sync_batchnorm(model)     # every BatchNorm1d/2d/3d -> fastnorm.SyncBatchNorm
    model = fastnorm.revert_sync_batchnorm(model)      # each back to the class it had

Both change a module's class and nothing else: its Parameters, buffers, hooks, flags and fused activation stay, so that
optimizers and wrappers that hold them need no second look. (sync.py has the exchange between processes.)
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from . import sync, unfused
from .convert import change_class, has_own_forward
from .dispatch import Entry
from .modules import BY_TORCH_CLASS, _BatchNorm, _public
from .ops import OptTensor
from .unfused import UNFUSED, TorchNormActivation

__all__ = ["BatchNorm", "SyncBatchNorm", "convert_sync_batchnorm", "revert_sync_batchnorm"]

Model = TypeVar("Model", bound=nn.Module)


@_public
class BatchNorm(_BatchNorm, unfused.BatchNorm):
    """A batch norm of any number of dimensions with a fused epilogue, as torch.nn.SyncBatchNorm alone: x (N, C, *).

    ValueError for less than two dimensions, and in training for a single value per channel or an eps that is not
    positive; RuntimeError for another number of channels. Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167."""


@_public
class SyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm with a fused epilogue, on the CPU too: x (N, C, *), over all ranks of `process_group`.

    In training, where torch.distributed is initialized and the group has other ranks: mean and variance are those of
    all ranks' elements; the running ones move by them, alike on every rank. N and * may differ from rank to rank, and N
    may be 0. Else it is an ordinary batch norm. Every rank has to call it equally often, in the same order.
    torch.nn's DistributedDataParallel refuses it on the CPU: wrap the model first, then call convert_sync_batchnorm.

    ValueError for less than two dimensions; TypeError for a process_group that is none, where torch.distributed is
    initialized; RuntimeError for what the kernels refuse of a CPU tensor while ranks synchronize. Ioffe & Szegedy 2015,
    https://arxiv.org/abs/1502.03167; Chan et al. 1979 (merging).
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.size(1) == 0:  # two calls of torch's take 0.3 us
            super()._check_input_dim(input)
            self._check_non_zero_input_channels(input)

    def _fused(self, entry: Entry, x: Tensor, residual: OptTensor, code: int, param: float) -> Tensor:
        if (group := self._group()) is not None:
            entry = partial(sync.batch_norm, group)
        return _BatchNorm._fused(self, entry, x, residual, code, param)

    def _unfused(self, activation: str | None, param: float, x: Tensor, residual: OptTensor) -> Any:
        if isinstance(x, Tensor) and x.device.type == "cpu" and self._group() is not None:
            raise RuntimeError(
                "fastnorm.SyncBatchNorm: the kernels do not serve this call (the exception before this one says why), "
                "and torch.nn.SyncBatchNorm serves no CPU tensors"
            )
        return super()._unfused(activation, param, x, residual)

    def _group(self) -> Any:
        """Whose statistics a call takes now: None for this process's own."""
        return sync.group_to_join(self.process_group) if self.training else None

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """fastnorm.convert_sync_batchnorm."""
        return convert_sync_batchnorm(module, process_group)


#: What becomes a SyncBatchNorm: torch.nn's classes, the same with an activation behind them, fastnorm's.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, unfused.BatchNorm)
_CONVERTED = frozenset(cls for plain in _BATCH_NORMS for cls in (plain, UNFUSED[plain], BY_TORCH_CLASS[plain]))

#: On a converted module: the class it had.
_ORIGIN = "_class_before_sync"


def convert_sync_batchnorm(model: Model, process_group: Any = None) -> Model:
    """Turn the batch norms of `model` into fastnorm.SyncBatchNorm, in place; returns `model`.

    torch.nn's BatchNorm1d/2d/3d and SyncBatchNorm and fastnorm's, by their exact class; all of them then synchronize in
    `process_group` (None: all processes). A subclass may compute something else: it is left as it is, with a warning
    that names it, as is a module whose forward was replaced. AttributeError if `model` is no nn.Module. process_group
    is not looked at here: TypeError for anything but a group comes from the first call that synchronizes.
    Source: torch.nn.SyncBatchNorm.convert_sync_batchnorm.
    """
    for name, module in model.named_modules():
        why = None
        if type(module) not in _CONVERTED:
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                why = f"{type(module).__name__} is a subclass, which may compute something else"
        elif has_own_forward(module):
            why = "its forward was replaced on the instance"
        else:
            if not isinstance(module, nn.SyncBatchNorm):
                vars(module)[_ORIGIN] = type(module)
            change_class(module, SyncBatchNorm)
            module.process_group = process_group
        if why is not None:
            warnings.warn(
                f"convert_sync_batchnorm leaves {name or 'the model'} as it is, without synchronization: {why}",
                stacklevel=2,
            )
    return model


def revert_sync_batchnorm(model: Model) -> Model:
    """Turn the SyncBatchNorms of `model`, fastnorm's and torch.nn's, into batch norms of one process, in place; returns
    `model`.

    One that convert_sync_batchnorm has made gets the class it had. Of any other, and of those that torch.nn's own
    conversion has made, nobody knows the number of dimensions: it becomes a fastnorm.BatchNorm, which takes any. A
    subclass of either stays. AttributeError if `model` is no nn.Module; nothing else is raised.
    """
    for module in model.modules():
        if type(module) in (SyncBatchNorm, nn.SyncBatchNorm, UNFUSED[nn.SyncBatchNorm]):
            origin = vars(module).pop(_ORIGIN, BatchNorm)
            if issubclass(origin, TorchNormActivation) and "activation" not in vars(module):  # `revert` has dropped it
                origin = origin.torch_class
            change_class(module, origin)
            vars(module).pop("process_group", None)
    return model
