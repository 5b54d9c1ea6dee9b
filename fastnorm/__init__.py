"""fastnorm: normalization layers for PyTorch that run at memory speed.

model = fastnorm.convert(model)        # torch.nn norms -> fastnorm norms; fastnorm.revert(model) goes back
fastnorm.BatchNorm2d(64, activation="relu")(x, residual)     # act(norm(x) + residual)
"""

from . import cuda, functional
from .convert import convert, revert, reverted
from .functional import moments
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
from .sync_batch_norm import BatchNorm, SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "Report",
    "Row",
    "SyncBatchNorm",
    "convert",
    "convert_sync_batchnorm",
    "cuda",
    "explain",
    "functional",
    "moments",
    "report",
    "revert",
    "revert_sync_batchnorm",
    "reverted",
]
