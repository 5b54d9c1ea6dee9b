"""What may be set of the CUDA kernels."""

from __future__ import annotations

import operator

from .extension import _C

__all__ = ["leave_multiprocessors_free"]


def leave_multiprocessors_free(count: int) -> None:
    """Keeps launches whose blocks wait for each other off `count` multiprocessors of every GPU, for kernels that run
    beside them: NCCL's, when gradients are exchanged during backward.

    Such a launch takes the whole GPU otherwise, and starts when the whole GPU is free. Holds from the next call on, for
    the whole process; call it while no fastnorm call is under way. 0, the default, leaves none.

    count: 0 or more; ValueError for less, TypeError for what is no integer. At least one multiprocessor stays in use.
    """
    _C.set_plan_options(free_sms=operator.index(count))
