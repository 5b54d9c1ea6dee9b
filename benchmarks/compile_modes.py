"""What fastnorm.set_compile_mode should be: the kernels and inductor's own code, under torch.compile and beside eager.

    python benchmarks/compile_modes.py --json benchmarks/results/compile-modes.json

Each row is a norm with what follows it, a training step or an evaluation. Times are medians of interleaved runs; the
table gives how many times longer torch.nn takes without torch.compile.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if __package__ is None or not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import fastnorm
from benchmarks import machine, results, timing
from benchmarks.tables import markdown_line, markdown_table

BUDGET_S = 4.0


class Case(NamedTuple):
    """A norm, what follows it, and the shape of its input."""

    name: str
    norm: str
    arguments: tuple[Any, ...]
    activation: str | None
    residual: bool
    shape: tuple[int, ...]


CASES = (
    Case("BatchNorm + add + ReLU", "BatchNorm2d", (64,), "relu", True, (16, 64, 56, 56)),
    Case("BatchNorm + ReLU", "BatchNorm2d", (64,), "relu", False, (16, 64, 56, 56)),
    Case("GroupNorm + SiLU", "GroupNorm", (32, 320), "silu", False, (2, 320, 64, 64)),
    Case("LayerNorm", "LayerNorm", (768,), None, False, (3136, 768)),
    Case("InstanceNorm3d + LeakyReLU", "InstanceNorm3d", (32,), "leaky_relu", False, (2, 32, 32, 32, 32)),
)
CONTESTANTS = ("torch", "torch compiled", "fastnorm", "kernel", "decompose")
HEADS = ("case", "dtype", "mode", *CONTESTANTS[1:])


class Unfused(nn.Module):
    """torch.nn's norm, addition and activation."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.norm = getattr(nn, case.norm)(*case.arguments)
        self.activation = fastnorm.activations.ACTIVATIONS[case.activation].module(0.01) if case.activation else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x) if residual is None else self.norm(x) + residual
        return self.activation(y) if self.activation is not None else y


def contestants(case: Case, dtype: torch.dtype, training: bool, device: str) -> dict[str, timing.Call]:
    """A call of each; those under torch.compile set the compile mode first, and keep a graph for each."""
    unfused = Unfused(case).to(device, dtype).train(training)
    fused = getattr(fastnorm, case.norm)(*case.arguments, activation=case.activation).to(device, dtype).train(training)
    inputs = [torch.randn(case.shape, device=device, dtype=dtype) for _ in range(1 + case.residual)]
    dy = torch.randn_like(inputs[0])

    def call(run: Callable[..., Tensor], module: nn.Module) -> timing.Call:
        leaves = [t.clone().requires_grad_(training) for t in inputs]

        def step() -> object:
            if not training:
                with torch.no_grad():
                    return run(*leaves)
            return torch.autograd.grad(run(*leaves), [*leaves, *module.parameters()], dy)

        return step

    calls = {"torch": call(unfused, unfused), "fastnorm": call(fused, fused)}
    for name, module, mode in (
        ("torch compiled", unfused, "auto"),
        ("kernel", fused, "kernel"),
        ("decompose", fused, "decompose"),
    ):
        compiled_module = torch.compile(copy.deepcopy(module), fullgraph=True)
        calls[name] = in_mode(mode, call(compiled_module, compiled_module))
    return calls


def in_mode(mode: Any, call: timing.Call) -> timing.Call:
    def run() -> object:
        fastnorm.set_compile_mode(mode)
        return call()

    return run


def measure(device: str, budget_s: float) -> list[dict[str, object]]:
    rows = []
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            for training in (True, False):
                torch._dynamo.reset()
                times = timing.race(contestants(case, dtype, training, device), budget_s, device)
                row: dict[str, object] = {"case": case.name, "shape": list(case.shape), "dtype": str(dtype)[6:]}
                row |= {"mode": "step" if training else "eval"}
                row |= {f"{name}_us": round(times[name].median * 1e6, 1) for name in CONTESTANTS}
                rows.append(row)
                print(markdown_line(cells(row)), end="", flush=True)
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """Of HEADS."""
    ratios = [f"{row['torch_us'] / row[f'{name}_us']:.2f}" for name in CONTESTANTS[1:]]
    return [f"{row['case']} {'x'.join(map(str, row['shape']))}", row["dtype"], row["mode"], *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for each row")
    parser.add_argument("--json", type=Path, help="write the measurement there")
    options = parser.parse_args()
    timing.keep_memory()
    facts = machine.describe(options.device)
    print(markdown_table(HEADS, []), end="")
    rows = measure(options.device, options.budget)
    if options.json:
        options.json.write_text(results.json_text({**facts, "rows": rows}))


if __name__ == "__main__":
    main()
