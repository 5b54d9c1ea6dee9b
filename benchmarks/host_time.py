"""The host time of a call: layers on tensors so small that nothing else counts, by torch.nn, enabled, converted, fused.

    python benchmarks/host_time.py --json benchmarks/results/host-time-cpu-epyc.json

Each row is a norm, or a norm with what follows it, in a mode of bench.py. Medians of interleaved runs on one thread;
the table gives how many times longer torch.nn takes.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __package__ is None or not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import fastnorm
from benchmarks import machine, results, timing
from benchmarks.contestants import MODES, mode_call
from benchmarks.options import positive
from benchmarks.tables import markdown_line, markdown_table

BUDGET_S = 1.0
MAPS, ROWS = (2, 8, 4, 4), (4, 64)
CONTESTANTS = ("torch", "convert", "fuse", "enabled")
HEADS = ("layers", "mode", "torch.nn, us", *CONTESTANTS[1:])


class Residual(nn.Module):
    """A norm, an addition and an activation, as the end of a residual block."""

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.activation(self.norm(x) + residual)  # type: ignore[no-any-return]


class Case(NamedTuple):
    """A model of torch.nn and the shape of its input."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    @property
    def title(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}"

    @property
    def fuses(self) -> bool:
        return "+" in self.name

    @property
    def adds(self) -> bool:
        return "+ add" in self.name


CASES = (
    Case("BatchNorm2d", lambda: nn.BatchNorm2d(8), MAPS),
    Case("GroupNorm", lambda: nn.GroupNorm(4, 8), MAPS),
    Case("InstanceNorm2d", lambda: nn.InstanceNorm2d(8, affine=True), MAPS),
    Case("LayerNorm", lambda: nn.LayerNorm(64), ROWS),
    Case("BatchNorm2d + ReLU", lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), MAPS),
    Case("BatchNorm2d + add + ReLU", lambda: Residual(nn.BatchNorm2d(8), nn.ReLU()), MAPS),
    Case("GroupNorm + SiLU", lambda: nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU()), MAPS),
    Case("LayerNorm + GELU", lambda: nn.Sequential(nn.LayerNorm(64), nn.GELU()), ROWS),
)


def call(model: nn.Module, case: Case, mode: str) -> timing.Call:
    """One call of the model in a mode, on inputs of its own, which are everyone's."""
    model.train(mode != "eval")
    torch.manual_seed(0)
    x, residual = (torch.randn(case.shape).requires_grad_(mode != "eval") for _ in range(2))

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        return model(x) if residual is None else model(x, residual)  # type: ignore[no-any-return]

    return mode_call(mode, run, x, residual if case.adds else None, list(model.parameters()))


def race(case: Case, mode: str, budget_s: float) -> dict[str, float]:
    """Microseconds of each but "enabled"."""
    model = case.make()
    models = {"torch": model, "convert": fastnorm.convert(copy.deepcopy(model))}
    if case.fuses:
        models["fuse"] = fastnorm.fuse(copy.deepcopy(model))
    return medians({name: call(each, case, mode) for name, each in models.items()}, budget_s)


def race_enabled(case: Case, mode: str, budget_s: float) -> float:
    """How many times as long as the converted model torch's own takes where it is enabled. (Once anything was, torch's
    operators pass our kernels on their way for good: so the others have run before.)"""
    model = case.make()
    calls = {"enabled": call(model, case, mode), "convert": call(fastnorm.convert(copy.deepcopy(model)), case, mode)}
    with fastnorm.enabled():
        times = medians(calls, budget_s)
    return times["enabled"] / times["convert"]


def medians(calls: dict[str, timing.Call], budget_s: float) -> dict[str, float]:
    """Microseconds of each, once all have given the same values."""
    first, *others = (each() for each in calls.values())
    for other in others:
        torch.testing.assert_close(other, first)
    return {name: each.median * 1e6 for name, each in timing.race(calls, budget_s).items()}


def measure(budget_s: float) -> Iterator[dict[str, Any]]:
    rows = [(case, mode, race(case, mode, budget_s)) for case in CASES for mode in MODES]
    for case, mode, times in rows:
        times["enabled"] = times["convert"] * race_enabled(case, mode, budget_s)
        microseconds = {f"{name}_us": round(times[name], 2) for name in CONTESTANTS if name in times}
        yield {"layers": case.title, "mode": mode, **microseconds}


def cells(row: dict[str, Any]) -> list[str]:
    """Of HEADS."""
    times = [row.get(f"{name}_us") for name in CONTESTANTS[1:]]
    ratios = [f"{row['torch_us'] / us:.2f}" if us else "-" for us in times]
    return [row["layers"], row["mode"], f"{row['torch_us']:.1f}", *ratios]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=partial(positive, float), default=BUDGET_S, help="seconds for each row")
    parser.add_argument("--json", type=Path, help="write the measurement there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    timing.keep_memory()
    facts = machine.describe("cpu")
    print(markdown_table(HEADS, []), end="")
    rows = []
    for row in measure(options.budget):
        rows.append(row)
        print(markdown_line(cells(row)), end="", flush=True)
    if options.json:
        options.json.write_text(results.json_text({**facts, "rows": rows}))


if __name__ == "__main__":
    main()
