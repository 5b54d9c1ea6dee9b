"""The measurements and their meaning: against torch.nn, against a copy, and the lines to reach."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.contestants import MODES, Row, passes
from benchmarks.timing import Timing
from tests.common.cases import Layer

# The lines to reach: times torch.nn, for all tensors; and times the copies that move the least
# bytes, for tensors that no cache holds. They are reported, never enforced: a busy machine fails no build.
SPEEDUP_GOAL, SPEEDUP_LINE = 3.0, 1.1
COPIES_LINE = {"forward": 1.3, "step": 1.5}
# On a GPU: no row slower than torch.nn, and the least bytes at 60% of the copy's bandwidth.
CUDA_SPEEDUP_LINE = 1.0
CUDA_COPIES_LINE = {"forward": 1.67, "step": 1.67}
CLONE_PASSES = 2  # a copy reads and writes
# Contestants beside fastnorm; every run has the first. oneDNN's calls include no autograd, inplace_abn's a copy.
NAMES = {
    "torch": "torch.nn",
    "compile": "torch.compile",
    "cudnn": "cuDNN",
    "onednn": "oneDNN",
    "liger": "Liger",
    "apex": "apex",
    "inplace_abn": "inplace_abn",
}
OTHERS = tuple(NAMES)
ONEDNN_LINE = 0.9  # times oneDNN, whose calls include no autograd


@dataclass(frozen=True)
class Result:
    """The timings of one row: mode -> contestant -> seconds."""

    row: Row
    times: dict[str, dict[str, Timing]]
    disagreement: float = 0.0  # see Arena.disagreement
    above_cache: bool = False
    device: str = "cpu"

    @property
    def speedup_line(self) -> float:
        return CUDA_SPEEDUP_LINE if self.device == "cuda" else SPEEDUP_LINE

    def copies_line(self, mode: str) -> float:
        line = CUDA_COPIES_LINE if self.device == "cuda" else COPIES_LINE
        return line.get(mode, line["forward"])

    def seconds(self, mode: str, contestant: str = "fastnorm") -> float:
        return self.times[mode][contestant].median

    def speedup(self, mode: str, contestant: str = "torch") -> float:
        """The other contestant's time over ours."""
        return self.seconds(mode, contestant) / self.seconds(mode)

    def floor(self, mode: str) -> float:
        """Seconds that moving the least bytes takes at the bandwidth of the copy."""
        fewest = passes(mode, self.row.activation, self.row.residual)
        return self.seconds(mode, "clone") * fewest / CLONE_PASSES

    def copies(self, mode: str) -> float:
        """Our time in units of the floor: 1.0 is as fast as copying the same bytes."""
        return self.seconds(mode) / self.floor(mode)

    def share(self, mode: str, contestant: str = "fastnorm") -> float:
        """The share of the copy's bandwidth that a contestant reaches, counting the bytes that must move."""
        return self.floor(mode) / self.seconds(mode, contestant)

    def copy_bandwidth(self, mode: str) -> float:
        """Bytes a second that the copy reads and writes."""
        return CLONE_PASSES * self.row.nbytes / self.seconds(mode, "clone")

    @property
    def is_tiny(self) -> bool:
        """A row that measures the host time of a call; its floor means nothing."""
        return self.row.layer.label == "tiny"

    @staticmethod
    def from_json(saved: Mapping[str, Any], device: str) -> Result:
        """What `to_json` has saved. The layer has no arguments: it is to be shown, not built."""
        fused = saved["epilogue"]
        epilogue = "plain" if fused == "plain" else "add_act" if fused.startswith("+add") else "act"
        activations = (fused[1:],) if epilogue == "act" else ("relu",)
        layer = Layer(saved["model"], saved["norm"], tuple(saved["shape"]), (), (), activations)
        times = {mode: {name: timing_from_json(t) for name, t in m["us"].items()} for mode, m in saved["modes"].items()}
        row = Row(layer, saved["dtype"], saved["layout"], epilogue)
        return Result(row, times, saved["disagreement_eps"], saved["above_cache"], device)

    def to_json(self) -> dict[str, object]:
        row, measured = self.row, {}
        for mode, times in self.times.items():
            measured[mode] = {
                "us": {name: timing_json(t) for name, t in times.items()},
                "times_torch": round(self.speedup(mode), 3),
                "copies": round(self.copies(mode), 3),
                "floor_share": round(self.share(mode), 3),
            }
            if self.device == "cuda":
                others = {name: round(self.share(mode, name), 3) for name in OTHERS if name in times}
                measured[mode] |= {
                    "floor_share_of": others,
                    "copy_gb_per_s": round(self.copy_bandwidth(mode) * 1e-9, 1),
                }
        return {
            "model": row.layer.label,
            "norm": row.layer.norm,
            "shape": list(row.layer.shape),
            "dtype": row.dtype,
            "layout": row.layout,
            "epilogue": row.fused,
            "bytes": row.nbytes,
            "above_cache": self.above_cache,
            "disagreement_eps": round(self.disagreement, 2),
            "modes": measured,
        }


def json_text(run: Mapping[str, object]) -> str:
    """A run as JSON: one line for every entry and for every element of a list of rows, so that diffs show rows."""

    def entry(key: str, value: object) -> str:
        if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], dict):
            return f" {json.dumps(key)}: {json.dumps(value)}"
        return f" {json.dumps(key)}: [\n" + ",\n".join(f"  {json.dumps(each)}" for each in value) + "\n ]"

    return "{\n" + ",\n".join(entry(key, value) for key, value in run.items()) + "\n}\n"


def timing_json(timing: Timing) -> dict[str, float]:
    """Median and quartiles in microseconds, and the number of rounds."""
    return {k: v if k == "rounds" else round(v * 1e6, 3) for k, v in asdict(timing).items()}


def timing_from_json(saved: Mapping[str, Any]) -> Timing:
    """What `timing_json` has saved."""
    return Timing(*(saved[part] * 1e-6 for part in ("median", "low", "high")), saved["rounds"])


def geometric_mean(values: Iterable[float]) -> float:
    """NaN when there are no values."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


@dataclass
class Line:
    """One line to reach: the number of rows that it is about, and the rows that miss it, the furthest first."""

    what: str
    rows: int = 0
    misses: list[tuple[str, str]] = field(default_factory=list)  # (row and mode, by how much)


def _line(
    what: str,
    results: Iterable[Result],
    modes: Iterable[str],
    value: Callable[[Result, str], float],
    limit: Callable[[str], float],
    more_is_better: bool,
) -> Line:
    line, missed = Line(what), []
    for result in results:
        for mode in modes:
            line.rows += 1
            got, wanted = value(result, mode), limit(mode)
            badness = wanted / got if more_is_better else got / wanted
            if badness > 1:
                missed.append((badness, (f"{result.row.name}, {mode}", f"{got:.2f}")))
    line.misses = [miss for _, miss in sorted(missed, reverse=True)]
    return line


def summary_lines(results: list[Result], modes: tuple[str, ...] = MODES) -> list[Line]:
    """The results against the lines to reach."""
    big = [r for r in results if r.above_cache]
    tiny = [r for r in results if r.is_tiny]
    shapes = [r for r in results if not r.is_tiny]
    timed = tuple(m for m in COPIES_LINE if m in modes)
    line = shapes[0].speedup_line if shapes else SPEEDUP_LINE
    lines = [
        _line(f"at least {line} x torch.nn", shapes, modes, Result.speedup, lambda _: line, True),
        *(
            _line(
                f"{mode} within {big[0].copies_line(mode)} x the corresponding copies (above cache size)",
                big, (mode,), Result.copies, big[0].copies_line, False,
            )
            for mode in timed if big
        ),
        _line(
            f"at least {ONEDNN_LINE} x oneDNN",
            [r for r in shapes if all("onednn" in r.times[m] for m in modes)],
            modes, lambda r, m: r.speedup(m, "onednn"), lambda _: ONEDNN_LINE, True,
        ),
        _line("a tiny call within torch.nn's host time", tiny, timed, Result.speedup, lambda _: 1.0, True),
    ]  # fmt: skip
    return [line for line in lines if line.rows]


def moved(results: Iterable[Result], saved: Mapping[str, Any]) -> list[float]:
    """torch.nn's times over those of a saved run, in the rows and modes that both have: how far the machine itself has
    moved."""

    def key(row: Mapping[str, Any]) -> tuple[object, ...]:
        return row["norm"], tuple(row["shape"]), row["dtype"], row["layout"], row["epilogue"]

    before = {key(row): row["modes"] for row in saved["rows"]}
    ratios = []
    for result in results:
        row = result.row
        modes = before.get((row.layer.norm, tuple(row.layer.shape), row.dtype, row.layout, row.fused), {})
        for mode in result.times:
            if mode in modes:
                ratios.append(result.seconds(mode, "torch") * 1e6 / modes[mode]["us"]["torch"]["median"])
    return ratios


def without_tiny(results: Iterable[Result]) -> list[Result]:
    """The results that tell of kernels; the tiny ones, which tell of the host, where there are no others."""
    every = list(results)
    return [r for r in every if not r.is_tiny] or every


def means(results: list[Result], mode: str) -> dict[str, float]:
    """Geometric means of `mode` over the rows that are not tiny; over these where there are no others, NaN copies."""
    shapes = without_tiny(results)
    found = {
        "times_torch": geometric_mean(r.speedup(mode) for r in shapes),
        "copies": geometric_mean(r.copies(mode) for r in shapes if not r.is_tiny),
        "copies_above_cache": geometric_mean(r.copies(mode) for r in shapes if r.above_cache),
    }
    for other in OTHERS[1:]:
        against = [r for r in shapes if other in r.times[mode]]
        if against:
            found[f"times_{other}"] = geometric_mean(r.speedup(mode, other) for r in against)
    return found
