"""What holds back the rows of a run on a CPU that miss a line: cycles a pack of each pass, beside its limits.

A pack is 32 elements. A step is a forward and a backward. A pass takes at least

- what its instructions take to issue (count_cpu_instructions.py), ISSUED a cycle; where an epilogue is not counted,
  those without one;
- what the ports allow for one without an activation, with everything in L1 (PORT_LIMITS);
- what the same machine took, in the same run, to copy as many bytes as it reads and writes: a norm whose sets do not
  lie one behind the other reads its inputs twice, as far as no cache keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.contestants import MODES
from benchmarks.count_cpu_instructions import PACK
from benchmarks.results import CLONE_PASSES, ONEDNN_LINE, Result

ISSUED = 2  # instructions that a Zen 4 core, whose units are 32 bytes wide, issues in a cycle of such loops
# Cycles that a pack takes at least, by what the ports of a Zen 4 core issue with everything in L1; float32, half types.
PORT_LIMITS = {"forward": (8, 9), "backward": (11, 11), "eval": (4, 5)}
LEAST = 1.05  # times torch.nn, of every figure; in evaluation 1
LEAST_EVAL = 1.0
MOST_COPIES = {"forward": 1.2, "step": 1.3, "eval": 1.0}  # above the size of the cache
NEAR = 1.35  # a pass that takes no more than so many times a limit is held back by it

HEADS = ("row", "mode", "misses", "cycles", "instructions", "ports", "memory", "held back by")

Counts = Mapping[tuple[str, str, str, str], float]  # walk, "plain" or another epilogue, direction, dtype


def misses(result: Result, mode: str) -> list[str]:
    """The lines that a figure misses."""
    found = []
    if result.speedup(mode) < (LEAST_EVAL if mode == "eval" else LEAST):
        found.append(f"{result.speedup(mode):.2f} torch.nn")
    if "onednn" in result.times[mode] and result.speedup(mode, "onednn") < ONEDNN_LINE:
        found.append(f"{result.speedup(mode, 'onednn'):.2f} oneDNN")
    if result.above_cache and result.copies(mode) > MOST_COPIES[mode]:
        found.append(f"{result.copies(mode):.2f} copies")
    return found


def walk_of(result: Result) -> str:
    """The walk of count_cpu_instructions.py that is nearest to a row's."""
    row = result.row
    norm, shape, last = row.layer.norm, row.layer.shape, row.layout == "channels_last"
    if norm == "LayerNorm":
        return "layer of 96" if shape[-1] < 256 else "layer of 768"
    if last:
        return "columns, batch" if norm.startswith(("BatchNorm", "InstanceNorm")) else "columns, groups"
    size = row.nbytes // (shape[0] * shape[1])
    if norm.startswith("BatchNorm"):
        return "short runs" if size <= 2048 else "runs, batch"
    return "runs, instances"


def tensors(result: Result, direction: str) -> int:
    """The tensors of x's size that a pass goes through, each time that it does."""
    row = result.row
    columns = row.layout == "channels_last" and row.layer.norm != "LayerNorm"
    once = 3 if direction == "backward" else 2
    again = {"forward": 1, "backward": 2, "eval": 0}[direction] if columns else 0
    return once + again + row.residual


@dataclass(frozen=True)
class Pass:
    """Cycles a pack of one pass of a row, and of its limits."""

    direction: str
    cycles: float
    instructions: float | None
    ports: float | None
    memory: float

    @property
    def reason(self) -> str:
        issue = max((self.instructions or 0) / ISSUED, self.ports or 0)
        near = [
            name for name, limit in (("memory", self.memory), ("instructions", issue)) if self.cycles <= NEAR * limit
        ]
        if near:
            return " and ".join(near)
        return "memory, in part" if self.memory >= issue else "instructions, and waits between them"


def passes_of(result: Result, mode: str, ghz: float, threads: int, counts: Counts) -> Iterator[Pass]:
    """The passes of a figure: a step is a forward and a backward."""
    row = result.row
    to_cycles = ghz * 1e9 * threads / (math.prod(row.layer.shape) / PACK)
    seconds = {"forward": result.seconds("forward"), "eval": result.seconds("eval")}
    seconds["backward"] = result.seconds("step") - result.seconds("forward")
    walk, half = walk_of(result), row.dtype != "float32"
    copy = result.seconds(mode, "clone") * to_cycles / CLONE_PASSES
    for which in {"forward": ("forward",), "eval": ("eval",), "step": ("forward", "backward")}[mode]:
        # Batch norm alone evaluates by statistics that it is given.
        direction = "forward" if which == "eval" and not row.layer.norm.startswith("BatchNorm") else which
        yield Pass(
            direction,
            seconds[which] * to_cycles,
            counts.get((walk, row.fused, direction, row.dtype), counts.get((walk, "plain", direction, row.dtype))),
            PORT_LIMITS[direction][half] if row.fused == "plain" else None,
            copy * tensors(result, direction),
        )


def rows(results: list[Result], run: Mapping[str, Any], counts: Counts) -> Iterator[list[str]]:
    """A row of the table for each figure that misses a line."""
    ghz, threads = float(run["machine"]["clock_ghz"]), int(run["machine"]["threads"])
    for result in results:
        for mode in MODES:
            missed = misses(result, mode)
            if not missed:
                continue
            found = list(passes_of(result, mode, ghz, threads, counts))
            yield [
                f"{result.row.title} {result.row.variant}",
                mode,
                ", ".join(missed),
                *(
                    summands(getattr(p, column) for p in found)
                    for column in ("cycles", "instructions", "ports", "memory")
                ),
                "; ".join(dict.fromkeys(p.reason for p in found)),
            ]


def summands(values: Iterable[float | None]) -> str:
    """Those of the passes of a figure."""
    return " + ".join("-" if v is None else f"{v:.0f}" for v in values)
