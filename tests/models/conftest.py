"""torchvision's models need none of its compiled operators, which the package index has for CUDA's torch alone."""

from __future__ import annotations

import contextlib

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):  # those whose fake kernels it registers whether they are there or not
    with contextlib.suppress(RuntimeError):  # it is there
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
