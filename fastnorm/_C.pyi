"""The compiled extension. Importing it registers the operators of `torch.ops.fastnorm` (see ops.py)."""

def build_info() -> dict[str, str]:
    """Version, torch, compiler and instruction sets this extension was built with."""

def cpu_capability() -> str:
    """The instruction set in use: "avx512", "avx2" or "baseline"."""

def cpu_capabilities() -> list[str]:
    """The instruction sets that this build and this processor can both run, best first."""

def plan(
    kind: int,
    N: int,
    C: int,
    S: int,
    groups: int,
    channels_last: bool,
    dtype: str,
    streams: int,
    l2_bytes: int,
    l3_bytes: int,
    threads: int,
) -> str:
    """How a call on (N, C, S) is cut into tasks, on one line."""
