"""Whether a contestant computes what torch.nn does: asked of every call before it is timed.

torch.nn's own float32 sums can be far off (channels_last batch norm on a CPU: by hundreds of epsilons). So where a call
disagrees with it, torch.nn in float64 decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Of outputs, in epsilons of the dtype times the larger of 1 and the value: roundings differ by a few.
WRONG_EPSILONS = 64
OTHERS_EPSILONS = 256  # other libraries take liberties: inplace_abn adds eps to the weight too
# Of gradients, as a share of torch.nn's by the Euclidean norm. Single elements differ by as much as they are large,
# where a rounding moves a value across the kink of ReLU.
WRONG_GRADIENT = {torch.float64: 1e-2, torch.float32: 2e-2, torch.bfloat16: 0.15, torch.float16: 0.05}
REFERENCE = "torch"
OURS = "fastnorm"


@dataclass(frozen=True)
class Fault:
    """Why a call is not timed. contestant: its name in the table; reason: a sentence."""

    contestant: str
    reason: str

    def __str__(self) -> str:
        return f"{self.contestant} {self.reason}"


def refusal(contestant: str, error: Exception) -> Fault:
    first = (str(error).strip().splitlines() or [""])[0]
    return Fault(contestant, f"refuses: {type(error).__name__}: {first}")


def output_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in epsilons of the dtype of `ours` times the larger of 1 and the value."""
    ours_32, theirs_32 = ours.detach().float(), theirs.detach().float()
    error = (ours_32 - theirs_32).abs_().div_(theirs_32.abs().clamp_min_(1))
    return float(error.max()) / torch.finfo(ours.dtype).eps


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The Euclidean norm of the difference over that of `theirs`; 0.0 where both are zero."""
    difference = torch.linalg.vector_norm(ours.detach().float() - theirs.detach().float())
    size = float(torch.linalg.vector_norm(theirs.detach().float()))
    return float(difference) / size if size else float(difference)


def disagreement(value: object, reference: object, limit: float) -> str | None:
    """Why `value` is not the same result as `reference`, or None. Both are an output, or gradients: as many of these
    are compared as both have, the input's first."""
    if isinstance(value, Tensor) and isinstance(reference, Tensor):
        if value.shape != reference.shape or value.dtype != reference.dtype:
            return f"returns {_described(value)}, expected {_described(reference)}"
        error = output_error(value, reference)
        return None if error <= limit else f"differs from torch.nn by {error:.0f} epsilons, at most {limit:.0f} may be"
    ours, theirs = (v if isinstance(v, tuple) else (v,) for v in (value, reference))
    if not ours or not all(isinstance(v, Tensor) for v in ours):
        return f"returns {', '.join(type(v).__name__ for v in ours) or 'nothing'}, expected tensors"
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        error, most = relative_error(a, b), WRONG_GRADIENT[ours[0].dtype]
        if not error <= most:
            return (
                f"has a gradient (number {i}) that differs from torch.nn's by {error:.2g} of it, at most {most} may be"
            )
    return None


def _described(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} of shape {tuple(t.shape)}"


def _rounded(value: object, like: object) -> object:
    """`value`, a tensor or several, in the dtypes of `like`."""
    if isinstance(value, Tensor) and isinstance(like, Tensor):
        return value.to(like.dtype)
    return tuple(a.to(b.dtype) for a, b in zip(value, like, strict=True))  # type: ignore[call-overload]


def faults(calls: Mapping[str, Callable[[], object]], exact: Callable[[], object]) -> list[Fault]:
    """Run each call once, and say which do not compute what torch.nn does, or refuse. What our own call raises is
    raised; the copy is no norm; where torch.nn refuses there is nothing to compare with. exact: the same by torch.nn in
    float64, called where a call disagrees."""
    try:
        reference = calls[REFERENCE]()
    except Exception as error:
        return [refusal(REFERENCE, error)]
    found = []
    for name, call in calls.items():
        if name in (REFERENCE, "clone"):
            continue
        try:
            value = call()
        except Exception as error:
            if name == OURS:
                raise
            found.append(refusal(name, error))
            continue
        limit = WRONG_EPSILONS if name == OURS else OTHERS_EPSILONS
        reason = disagreement(value, reference, limit)
        if reason is not None:
            reason = disagreement(value, _rounded(exact(), reference), limit)
        if reason is not None:
            found.append(Fault(name, reason))
    return found
