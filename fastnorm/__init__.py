"""fastnorm: normalization layers for PyTorch that run at memory speed.

model = fastnorm.convert(model)        # torch.nn norms -> fastnorm norms; fastnorm.revert(model) goes back
model = fastnorm.fuse(model)           # norm (+ residual add) (+ activation) become one call, where that is proved
fastnorm.BatchNorm2d(64, activation="relu")(x, residual)     # act(norm(x) + residual)
"""

from . import cuda, functional
from .calibrate import calibrate
from .convert import convert, revert
from .enable import disable, enable, enabled
from .freeze import freeze_batch_norm
from .functional import moments
from .fuse import fuse
from .images import ImageNormalize
from .layers import FrozenBatchNorm2d, LayerNorm2d
from .modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
)
from .report import Report, Row, explain, report
from .reverted import reverted
from .settings import set_autocast_mode, set_compile_mode
from .skip_init import SkipInit
from .sync_batch_norm import BatchNorm, SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FrozenBatchNorm2d",
    "GroupNorm",
    "ImageNormalize",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "Report",
    "Row",
    "SkipInit",
    "SyncBatchNorm",
    "calibrate",
    "convert",
    "convert_sync_batchnorm",
    "cuda",
    "disable",
    "enable",
    "enabled",
    "explain",
    "freeze_batch_norm",
    "functional",
    "fuse",
    "moments",
    "report",
    "revert",
    "revert_sync_batchnorm",
    "reverted",
    "set_autocast_mode",
    "set_compile_mode",
]
