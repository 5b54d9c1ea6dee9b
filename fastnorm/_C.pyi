"""The compiled extension. Importing it registers the operators of `torch.ops.fastnorm` (see ops.py)."""

from collections.abc import Sequence

def build_info() -> dict[str, str]:
    """Compiler, torch version and options this extension was built with."""

def cpu_capability() -> str:
    """The instruction set in use: "avx512", "avx2" or "baseline"."""

def cpu_capabilities() -> list[str]:
    """The instruction sets that this build and this CPU can both run."""

def plan(
    kind: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    groups: int,
    dtype: str,
    l2_bytes: int,
) -> str:
    """One line: how the kernels would walk a tensor of these sizes and strides."""
