"""Loads the extension `fastnorm._C`, which registers the operators; where it does not load, says what to do."""

from __future__ import annotations

import torch

__all__ = ["_C"]

try:
    from . import _C as _C
except ImportError as error:
    if "FASTNORM_CPU" in str(error):
        raise
    raise ImportError(
        f"fastnorm's extension is not built for torch {torch.__version__} here: run `pip install --no-build-isolation "
        f"--force-reinstall --no-deps .` in its checkout, and Python outside of it ({error})"
    ) from error

if _C.build_info()["cuda"] != "none" and torch.version.cuda is not None and not _C.has_stream():
    raise ImportError(
        f"torch {torch.__version__} does not export aoti_torch_get_current_cuda_stream, which fastnorm's CUDA kernels "
        "need: install another torch, or build fastnorm with FASTNORM_CUDA=0"
    )
