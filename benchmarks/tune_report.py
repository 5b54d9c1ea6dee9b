"""The findings of tune.py: tables, the lines to reach, the planner's bad choices, and the constants that are off.

Nothing here measures. An outcome without times stands for its prediction, and the same sums are made of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
from rich.console import Console
from rich.markup import escape

from benchmarks.candidates import Candidate, Job, kind_text, predict_copy
from benchmarks.results import CLONE_PASSES, geometric_mean, timing_json
from benchmarks.tables import SHOWN_MISSES
from benchmarks.timing import Timing
from benchmarks.validation import WRONG_EPSILONS
from fastnorm import _C
from tests.common import cases

# Share of the copy's bandwidth to reach, forward and backward.
LINES = {
    "BatchNorm": (0.85, 0.85),
    "GroupNorm": (0.85, 0.80),
    "InstanceNorm": (0.85, 0.85),
    "LayerNorm": (0.90, 0.85),
}
LOSS_LINE = 1.05  # the choice's time over the best one's
PARTS = ("memory", "issue", "waits", "launches")
FIT_ROUNDS = 20
OUTLIER = 3.0  # in medians of the misfits: a misfit further off counts as if it were that far

Table = tuple[Sequence[str], list[tuple[str, Sequence[str]]]]  # headings; title and cells of each line


@dataclass(frozen=True)
class Ceilings:
    """The limits of all plans: a large copy's bandwidth, reading and writing, and the shortest call."""

    bytes_per_us: float
    launch_us: float


@dataclass(frozen=True)
class Outcome:
    """A job and the times of its candidates, the planner's choice first. No times where nothing was measured."""

    job: Job
    facts: _C.DeviceInfo
    candidates: tuple[Candidate, ...]
    times: tuple[Timing, ...] = ()
    copy: Timing | None = None
    disagreements: tuple[float, ...] = ()  # from the choice's outputs, in epsilons
    refusals: tuple[int, ...] = ()  # launches that the GPU refused: the candidate's time is that of another plan

    def ran(self, i: int) -> bool:
        """Whether a candidate's time is its own."""
        return not self.refusals or self.refusals[i] == 0

    def us(self, i: int = 0) -> float:
        """Microseconds of a candidate: measured, or predicted."""
        return self.times[i].median * 1e6 if self.times else self.candidates[i].predicted.total

    @property
    def copy_us(self) -> float:
        return self.copy.median * 1e6 if self.copy else predict_copy(self.job, self.facts)

    @property
    def floor_us(self) -> float:
        """The least bytes at the pace of copying x."""
        return self.copy_us * self.job.passes / CLONE_PASSES

    @property
    def share(self) -> float:
        """The share of that pace that the planner's choice reaches."""
        return self.floor_us / self.us()

    def share_at(self, bytes_per_us: float) -> float:
        """The share of a large copy's pace. Launches count against it."""
        return self.job.row.nbytes * self.job.passes / bytes_per_us / self.us()

    @property
    def line(self) -> float:
        return LINES[self.job.family][self.job.backward] if self.job.family in LINES else 0.0

    @property
    def best(self) -> int:
        return min((i for i in range(len(self.candidates)) if i == 0 or self.ran(i)), key=self.us)

    @property
    def loss(self) -> float:
        """The choice's time over the best one's."""
        return self.us() / self.us(self.best)

    def to_json(self) -> dict[str, object]:
        found = []
        for i, candidate in enumerate(self.candidates):
            predicted = asdict(candidate.predicted) | {"total": candidate.predicted.total}
            entry: dict[str, object] = {
                "plan": str(candidate.plan),
                "forced": candidate.forced,
                "predicted_us": {name: round(value, 3) for name, value in predicted.items()},
            }
            if self.times:
                entry |= {"us": timing_json(self.times[i]), "disagreement_eps": round(self.disagreements[i], 2)}
                entry |= {"refused_launches": self.refusals[i]}
            found.append(entry)
        return {
            "row": self.job.row.name,
            "direction": self.job.direction,
            "bytes": self.job.row.nbytes,
            "passes": self.job.passes,
            "copy_us": timing_json(self.copy) if self.copy else {"predicted": round(self.copy_us, 3)},
            "share": round(self.share, 4),
            "candidates": found,
        }


# ---- tables ----


def by_shape(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Rows of a shape beside each other, in the order in which shapes first appear."""
    first = {o.job.row.title: i for i, o in reversed(list(enumerate(outcomes)))}
    return sorted(outcomes, key=lambda o: first[o.job.row.title])


def measured_table(outcomes: Sequence[Outcome]) -> Table:
    heads = ("variant", "", "floor", "us", "predicted", "share", "best", "best/us", "which")
    lines: list[tuple[str, Sequence[str]]] = []
    for o in by_shape(outcomes):
        which = "the choice" if o.best == 0 else o.candidates[o.best].label
        which += "" if o.ran(0) else ", which was refused: the time is of another plan"
        us = (o.floor_us, o.us(), o.candidates[0].predicted.total)
        cells = [o.job.row.variant, o.job.direction, *(f"{each:.1f}" for each in us), f"{o.share:.0%}"]
        lines.append((o.job.row.title, [*cells, f"{o.us(o.best):.1f}", f"{1 / o.loss:.2f}", which]))
    return heads, lines


def predicted_table(outcomes: Sequence[Outcome]) -> Table:
    """All plans that would be tried, one per line, the choice first."""
    heads = ("variant", "", "floor", "share", "predicted", *PARTS, "plan")
    lines: list[tuple[str, Sequence[str]]] = []
    for o in by_shape(outcomes):
        for i, c in enumerate(o.candidates):
            about = [o.job.row.variant, o.job.direction, f"{o.floor_us:.1f}"] if i == 0 else ["", "", ""]
            parts = [f"{getattr(c.predicted, part):.1f}" for part in PARTS]
            total = f"{c.predicted.total:.1f}"
            lines.append((o.job.row.title, [*about, f"{o.floor_us / o.us(i):.0%}", total, *parts, c.label]))
    return heads, lines


def as_text(table: Table) -> str:
    heads, lines = table
    widths = [max(len(cells[i]) for cells in (heads, *(cells for _, cells in lines))) for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        words = len(cells) - 1  # the first two and the last column are words, the others numbers
        padded = [
            c.ljust(w) if i in (0, 1, words) else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return ("  " + "  ".join(padded)).rstrip()

    text, title = [line(heads)], ""
    for its_title, cells in lines:
        if its_title != title:
            text.append(its_title)
        title = its_title
        text.append(line(cells))
    return "\n".join(text)


def as_markdown(table: Table) -> str:
    heads, lines = table
    rows = [["layer", *heads], ["---"] * (1 + len(heads)), *([title, *cells] for title, cells in lines)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in rows)


def family_table(outcomes: Sequence[Outcome], bytes_per_us: float) -> Table:
    """Geometric means per family and direction; and per layout, where there are two."""
    heads = ("direction", "", "share", "line", "rows at it", "of the large copy")
    lines: list[tuple[str, Sequence[str]]] = []
    for family, direction in product((*LINES, "small"), ("forward", "backward")):
        whole = [o for o in outcomes if o.job.family == family and o.job.direction == direction]
        parts = {layout: [o for o in whole if o.job.row.layout == layout] for layout in cases.LAYOUTS}
        for layout, those in ({"": whole} | (parts if all(parts.values()) else {})).items():
            if not those:
                continue
            means = [geometric_mean(values) for values in ([o.share for o in those],
                                                           [o.share_at(bytes_per_us) for o in those])]  # fmt: skip
            reached = sum(o.share >= o.line for o in those)
            line = [f"{those[0].line:.0%}", f"{reached} of {len(those)}"] if those[0].line else ["-", "-"]
            lines.append((family, [direction, layout, f"{means[0]:.0%}", *line, f"{means[1]:.0%}"]))
    return heads, lines


# ---- the constants ----


def fit(parts: np.ndarray, us: np.ndarray) -> np.ndarray:
    """Factors, none negative, by which the parts [n, parts] come closest to what was measured [n]. Relative errors
    count, and outliers little: least squares, reweighted by Huber's rule.
    """
    weights, factors = np.ones(len(us)), np.ones(parts.shape[1])
    for _ in range(FIT_ROUNDS):
        used = list(range(parts.shape[1]))
        while used:
            scaled = parts[:, used] * (weights / us)[:, None]
            found = np.linalg.lstsq(scaled, weights, rcond=None)[0]
            factors = np.zeros(parts.shape[1])
            factors[used] = found
            if (found >= 0).all():
                break
            used.remove(used[int(found.argmin())])
        misfits = np.abs(parts @ factors / us - 1)
        limit = OUTLIER * max(float(np.median(misfits)), 1e-12)
        weights = np.sqrt(np.minimum(1, limit / np.maximum(misfits, 1e-12)))
    return factors


@dataclass(frozen=True)
class Fit:
    """By which factors measured times exceed the estimate's parts, and the median of what is left unexplained."""

    plans: int
    memory: float
    issue: float
    waits: float
    launches: float
    misfit: float
    by_kind: dict[str, float]  # the median of measured over predicted, of each kind of plan

    @property
    def factors(self) -> str:
        return ", ".join(f"{part} {getattr(self, part):.2f}" for part in PARTS)


def fit_parts(outcomes: Iterable[Outcome]) -> Fit | None:
    """None where there are too few plans to mean anything."""
    parts, us, kinds = [], [], []
    for o in outcomes:
        for i, candidate in enumerate(o.candidates if o.times else ()):
            if not o.ran(i):
                continue
            parts.append([candidate.predicted.counted[part] for part in PARTS])
            us.append(o.us(i))
            kinds.append(kind_text(candidate.plan))
    if len(us) < 2 * len(PARTS):
        return None
    known, taken = np.array(parts), np.array(us)
    factors = fit(known, taken)
    misfits = np.abs(known @ factors / taken - 1)
    ratios = taken / known.sum(axis=1)
    by_kind = {
        k: statistics.median(r for r, kind in zip(ratios, kinds, strict=True) if kind == k) for k in sorted(set(kinds))
    }
    by_part = dict(zip(PARTS, map(float, factors), strict=True))
    return Fit(len(us), **by_part, misfit=float(np.median(misfits)), by_kind={k: float(v) for k, v in by_kind.items()})


# ---- the summary ----


def print_list(console: Console, heading: str, lines: Sequence[str], shown: int = SHOWN_MISSES) -> None:
    if not lines:
        return
    console.print(f"[bold]{heading}:[/] {len(lines)}")
    for line in lines[:shown]:
        console.print(f"  {escape(line)}")
    if len(lines) > shown:
        console.print(f"  and {len(lines) - shown} more")


def losses(outcomes: Sequence[Outcome]) -> list[str]:
    """The jobs in which another plan is faster by more than chance, the worst first."""
    worst = sorted((o for o in outcomes if o.loss > LOSS_LINE), key=lambda o: -o.loss)
    return [
        f"{o.loss:.2f}x  {o.job.name}: {o.candidates[0].label} {o.us():.1f} us, "
        f"{o.candidates[o.best].label} {o.us(o.best):.1f} us"
        for o in worst
    ]


def misses(outcomes: Sequence[Outcome]) -> list[str]:
    """Rows below their line, the furthest first."""
    below = sorted((o for o in outcomes if o.share < o.line), key=lambda o: o.share / o.line)
    return [f"{o.share:.0%}  {o.job.name}" for o in below]


def print_report(
    console: Console,
    outcomes: Sequence[Outcome],
    facts: _C.DeviceInfo,
    skipped: Sequence[tuple[str, str]] = (),
    ceilings: Ceilings | None = None,
) -> None:
    """The summary comes last, where a long output is seen. skipped: jobs and why."""
    measured = any(o.times for o in outcomes)
    table = (measured_table if measured else predicted_table)(outcomes)
    console.print(as_text(table), markup=False, no_wrap=True, crop=False, overflow="ignore")
    bandwidth = ceilings.bytes_per_us if ceilings else facts.bytes_per_us
    how = "measured" if measured else "predicted"
    console.print(f"\n[bold]Share of the copy's bandwidth on the least bytes[/], {how}, geometric means")
    console.print(as_text(family_table(outcomes, bandwidth)), markup=False)
    print_list(console, "Below their line", misses(outcomes))
    print_list(console, f"The planner's choice loses more than {LOSS_LINE - 1:.0%}", losses(outcomes), len(outcomes))
    wrong = [
        f"{error:.0f} epsilons  {o.job.name}: {candidate.label}"
        for o in outcomes
        for candidate, error in zip(o.candidates, o.disagreements, strict=False)
        if not error <= WRONG_EPSILONS
    ]
    print_list(console, "Differs from the planner's choice", wrong, len(wrong))
    refused = [
        f"{count}  {o.job.name}: {candidate.plan}"
        for o in outcomes
        for candidate, count in zip(o.candidates, o.refusals, strict=False)
        if count
    ]
    print_list(console, "Refused by the GPU, at so many launches, and replaced by another plan", refused, len(refused))
    print_list(console, "Not measured", [f"{name}: {why}" for name, why in skipped])
    if ceilings:
        console.print(
            f"[bold]Ceilings:[/] a large copy moves {ceilings.bytes_per_us * 1e-3:,.0f} GB/s, "
            f"of {facts.bytes_per_us * 1e-3:,.0f}; the shortest call takes {ceilings.launch_us:.1f} us"
        )
    found = fit_parts(outcomes)
    if found:
        console.print(
            f"[bold]Measured over estimated:[/] {found.factors}; fits {found.plans} plans to {found.misfit:.1%}"
        )
        console.print("  unfitted: " + ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in found.by_kind.items()))
