"""Choices that hold for the whole process: what torch.compile sees, and what autocast does."""

from __future__ import annotations

from typing import Any, Literal, get_args

__all__ = ["set_autocast_mode", "set_compile_mode"]

CompileMode = Literal["auto", "kernel", "decompose"]
AutocastMode = Literal["torch", "keep"]

compile_mode: CompileMode = "auto"
autocast_mode: AutocastMode = "torch"


def set_compile_mode(mode: CompileMode) -> None:
    """What torch.compile makes of a fastnorm norm.

    "kernel": one call of our kernels. "decompose": torch's own operators, which inductor may fuse with what stands
    before and after. "auto", the default: "kernel", but "decompose" for batch norm by running statistics on a GPU: a
    multiplication and an addition, which cost nothing once they are fused.

    benchmarks/compile_modes.py measures both; docs/choosing.md has figures of a CPU. On a GPU nobody has measured yet.
    Functions compiled before are compiled anew at their next call. ValueError for another mode.
    """
    global compile_mode
    compile_mode = _checked(mode, get_args(CompileMode))


def set_autocast_mode(mode: AutocastMode) -> None:
    """What fastnorm's group norm and layer norm do under autocast, on devices where torch's run in float32 (CUDA).

    "torch", the default: as torch's, inputs are widened to float32 and the output is float32. "keep": the output has
    the input's dtype; half types are summed in float32 all the same, and half the bytes move. Where autocast leaves
    norms alone (CPU; batch and instance norm) there is nothing to choose. ValueError for another mode.
    """
    global autocast_mode
    autocast_mode = _checked(mode, get_args(AutocastMode))


def _checked(mode: str, modes: tuple[str, ...]) -> Any:
    if mode not in modes:
        raise ValueError(f"mode is {mode!r}, expected {', '.join(map(repr, modes))}")
    return mode
