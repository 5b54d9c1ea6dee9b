"""fastnorm: normalization layers for PyTorch that run at memory speed.

model = fastnorm.convert(model)        # torch.nn norms -> fastnorm norms; fastnorm.revert(model) goes back
fastnorm.BatchNorm2d(64, activation="relu")(x, residual)     # act(norm(x) + residual)
"""

from . import cuda, functional
from .convert import convert, revert, reverted
from .enable import disable, enable, enabled
from .freeze import freeze_batch_norm
from .functional import moments
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
from .settings import set_autocast_mode, set_compile_mode

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FrozenBatchNorm2d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "Report",
    "Row",
    "convert",
    "cuda",
    "disable",
    "enable",
    "enabled",
    "explain",
    "freeze_batch_norm",
    "functional",
    "moments",
    "report",
    "revert",
    "reverted",
    "set_autocast_mode",
    "set_compile_mode",
]
