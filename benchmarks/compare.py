"""Which rows moved beyond noise from one saved run to another: of bench.py, of end_to_end.py, or of tune.py.

    python benchmarks/compare.py before.json after.json
    python benchmarks/bench.py compare before.json after.json      # the same

A figure has moved when the quartiles of its two runs do not overlap and the medians differ by more than --least. By
default times are in units of torch.nn's in the same row, whose turns were taken in between: so a machine that is
slower today has moved nothing. `--unit us` compares microseconds. The exit status is 1 where one of fastnorm's figures
is slower.

Runs of tune.py are compared plan by plan: the same words, whatever forced them, in units of the job's copy. For every
kind of plan a line says how many of how many plans both runs have, because a mean over others says nothing of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.markup import escape

from benchmarks.options import positive
from benchmarks.results import geometric_mean
from benchmarks.tables import make_console
from tests.common.plan_model import words

LEAST = 0.03  # of a median: less is within what another order of the same code changes
NOT_THE_NAME = ("modes", "us", "bytes", "above_cache", "disagreement_eps", "memory_mb", "images_per_s", "compared")
REFERENCES = ("torch", "torch.nn")  # what bench.py and end_to_end.py call it
UNITS = {"reference": "the reference's time: torch.nn's, of tune.py the copy's", "us": "microseconds"}
MACHINE = ("cpu", "gpu", "threads", "fastnorm_capability", "torch_capability")


@dataclass(frozen=True)
class Figure:
    """A time: the median and the quartiles, in microseconds or in units of torch.nn's."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(saved: Mapping[str, Any]) -> Figure:
        return Figure(saved["median"], saved["low"], saved["high"])

    def over(self, other: Figure) -> Figure:
        """This time in units of another, with the widest quartiles that the two allow."""
        return Figure(self.median / other.median, self.low / other.high, self.high / other.low)


@dataclass(frozen=True)
class Move:
    """A figure in two runs."""

    row: str
    contestant: str
    before: Figure
    after: Figure

    @property
    def ratio(self) -> float:
        """The time after over that before: above 1 is slower."""
        return self.after.median / self.before.median

    def beyond_noise(self, least: float) -> bool:
        apart = self.after.low > self.before.high or self.after.high < self.before.low
        return apart and max(self.ratio, 1 / self.ratio) > 1 + least


def _name(row: Mapping[str, Any]) -> str:
    values = (v for k, v in row.items() if k not in NOT_THE_NAME)
    return " ".join("x".join(map(str, v)) if isinstance(v, list) else str(v) for v in values)


def figures(run: Mapping[str, Any], unit: str) -> Iterator[tuple[tuple[str, str], Figure]]:
    """((row and mode, contestant), time) of every time of a saved run. The reference has none in its own units."""
    yield from _plans(run, unit) if "jobs" in run else _rows(run, unit)


def _rows(run: Mapping[str, Any], unit: str) -> Iterator[tuple[tuple[str, str], Figure]]:
    for row in run["rows"]:
        modes = row.get("modes", {None: row})
        for mode, measured in modes.items():
            times = {name: Figure.of(time) for name, time in measured["us"].items()}
            name = _name(row) + (f", {mode}" if mode else "")
            reference = next((times[r] for r in REFERENCES if r in times), None)
            for contestant, time in times.items():
                if unit == "us":
                    yield (name, contestant), time
                elif reference is not None and contestant not in (*REFERENCES, "clone"):
                    yield (name, contestant), time.over(reference)


def _plans(run: Mapping[str, Any], unit: str) -> Iterator[tuple[tuple[str, str], Figure]]:
    """Of tune.py: the row is the job and the plan's words, the contestant the plan's kind."""
    for job in run["jobs"]:
        copy = Figure.of(job["copy_us"])
        for candidate in job["candidates"]:
            if candidate.get("refused_launches"):  # its time is another plan's
                continue
            plan = words(candidate["plan"])
            kind, time = plan.split(",")[0].replace(":", ""), Figure.of(candidate["us"])
            yield (f"{job['row']} {job['direction']}: {plan}", kind), time if unit == "us" else time.over(copy)


def moves(before: Mapping[str, Any], after: Mapping[str, Any], unit: str = "reference") -> list[Move]:
    """Every figure that both runs have."""
    saved = dict(figures(before, unit))
    return [Move(*key, saved[key], now) for key, now in figures(after, unit) if key in saved]


def load(text: str) -> dict[str, Any]:
    """A saved run."""
    try:
        run = json.loads(Path(text).read_text())
        known = "machine" in run and ("jobs" in run or any("modes" in row or "us" in row for row in run["rows"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {type(error).__name__}: {error}") from None
    if not known:
        raise argparse.ArgumentTypeError(f"{text}: expected what bench.py, end_to_end.py or tune.py --json saves")
    return dict(run)


def print_moves(console: Console, found: Sequence[Move], counted: Mapping[str, int], least: float, unit: str) -> None:
    """The slower ones first, each side by how far it moved. counted: the figures of each contestant, moved or not, that
    the run after has."""
    moved = sorted((m for m in found if m.beyond_noise(least)), key=lambda m: -m.ratio)
    digits = 1 if unit == "us" else 3
    for move in moved:
        verdict = f"[red]{move.ratio:.2f}x slower[/]" if move.ratio > 1 else f"[green]{1 / move.ratio:.2f}x faster[/]"
        values = f"{move.before.median:.{digits}f} -> {move.after.median:.{digits}f}"
        console.print(f"{verdict}  {escape(move.row)}, {move.contestant}  [dim]{values}[/]", soft_wrap=True)
    slower = sum(m.ratio > 1 for m in moved)
    console.print(
        f"{len(found)} figures in both runs, in {'microseconds' if unit == 'us' else 'units of the reference'}: "
        f"{slower} slower, {len(moved) - slower} faster, {len(found) - len(moved)} within noise"
    )
    for contestant in dict.fromkeys(m.contestant for m in found):
        ratios = [m.ratio for m in found if m.contestant == contestant]
        console.print(
            f"  {contestant}: {geometric_mean(ratios):.3f} times as long as before, geometric mean of {len(ratios)} of "
            f"{counted[contestant]} figures",
            style="dim",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=load, metavar="BEFORE.json")
    parser.add_argument("after", type=load, metavar="AFTER.json")
    parser.add_argument(
        "--unit", choices=tuple(UNITS), default="reference", help="; ".join(f"{k}: {v}" for k, v in UNITS.items())
    )
    parser.add_argument("--least", type=partial(positive, float), default=LEAST, help=f"default: {LEAST}")
    args = parser.parse_args(arguments)
    console = make_console()
    for fact in MACHINE:
        was, is_now = (run["machine"].get(fact) for run in (args.before, args.after))
        if was != is_now:
            console.print(f"[yellow]not the same machine: {fact} was {was}, is {is_now}")
    found = moves(args.before, args.after, args.unit)
    if not found:
        sys.exit("the two runs have no row in common")
    counted = Counter(contestant for (_, contestant), _ in figures(args.after, args.unit))
    print_moves(console, found, counted, args.least, args.unit)
    return int(
        any(m.ratio > 1 and m.beyond_noise(args.least) for m in found if m.contestant not in (*REFERENCES, "clone"))
    )


if __name__ == "__main__":
    sys.exit(main())
