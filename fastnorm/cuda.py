"""Settings of the CUDA kernels."""

from __future__ import annotations

import operator

from .extension import _C

__all__ = ["leave_multiprocessors_free"]


def leave_multiprocessors_free(count: int) -> None:
    """Keeps launches whose blocks wait for each other off `count` multiprocessors (SMs) of every GPU, for kernels that
    run beside them: NCCL's, when gradients are exchanged during backward.

    Otherwise such a launch takes the whole GPU, and starts when the whole GPU is free. The setting holds for the whole
    process, from the next call on. 0, the default, leaves none.

    count: 0 or more. ValueError for less, TypeError for anything but an integer. At least one SM stays in use.
    """
    free_sms = operator.index(count)
    if free_sms < 0:
        raise ValueError(f"count is {free_sms}, expected 0 or more")
    _C.set_plan_options(free_sms=free_sms)
