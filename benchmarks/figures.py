"""The results as a picture: how many times faster than torch.nn, and how near to the floor."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from benchmarks.contestants import MODE_NAMES, SHORT
from benchmarks.results import Result, geometric_mean, without_tiny

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

MODE_COLOURS = {"forward": "#4c9be8", "step": "#1f4e8c", "eval": "#9fd0a5"}
FEW = 20  # rows: a bar each; more rows: a bar per shape, dtype and layout
LONG_AXIS = 12  # times torch.nn: beyond it, bars of 2 could not be read on a linear axis
GREEN, GREY = "#2e8b57", "#444444"

Label = tuple[str, str]  # the shape, and the rest of the row's name


def style() -> None:
    """Settings that all pictures here share."""
    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "figure.dpi": 130,
        }
    )


def _bars(results: list[Result]) -> list[tuple[Label, list[Result]]]:
    """The bars from top to bottom, each with its label and the rows whose geometric mean it is."""
    shapes = without_tiny(results)
    few = len(shapes) <= FEW

    def label(r: Result) -> Label:
        row = r.row
        size = "x".join(map(str, row.layer.shape))
        return (
            f"{row.layer.norm} {size}",
            row.variant if few else f"{SHORT[row.dtype]} {SHORT[row.layout]}",
        )

    found: dict[Label, list[Result]] = {}
    for result in shapes:
        found.setdefault(label(result), []).append(result)
    return list(found.items())


def draw_bars(
    axes: Axes,
    results: list[Result],
    value: Callable[[Result, str], float],
    modes: tuple[str, ...],
    show: Callable[[float], str],
    labels: bool = True,
) -> None:
    """Horizontal bars, one per mode and row; of many rows, one per shape, dtype and layout."""
    bars = _bars(results)
    height = 0.8 / len(modes)
    ticks, names, y = [], [], 0.0
    for _, group in itertools.groupby(bars, key=lambda bar: bar[0][0]):
        members = list(group)
        for i, ((shape, variant), rows) in enumerate(members):
            for j, mode in enumerate(modes):
                mean = geometric_mean(value(r, mode) for r in rows)
                centre = y + (j - (len(modes) - 1) / 2) * height
                name = MODE_NAMES[mode] if y == 0 else None
                axes.barh(centre, mean, height, color=MODE_COLOURS[mode], label=name)
                box = {"fc": "white", "ec": "none", "pad": 0}
                place = (mean, centre), (3, 0), "data", "offset points"
                axes.annotate(show(mean), *place, va="center", size=6, color=GREY, bbox=box)
            ticks.append(y)
            names.append(f"{shape}  {variant}" if i == 0 else variant)
            y += 1
        y += 0.35 if len(members) > 1 else 0
    axes.set_yticks(ticks, names if labels else [""] * len(ticks))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.35, -0.65)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def draw_speedup(axes: Axes, results: list[Result], modes: tuple[str, ...], labels: bool = True) -> None:
    """Bars of torch.nn's time over ours; on a logarithmic axis when they differ widely."""
    draw_bars(axes, results, Result.speedup, modes, lambda v: f"{v:.1f}x", labels)
    if axes.get_xlim()[1] > LONG_AXIS:
        axes.set_xscale("log")
        longest = axes.get_xlim()[1]
        axes.set_xticks([tick for tick in (1, 2, 3, 5, 10, 20, 50, 100) if tick <= longest])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(0.8, longest * 1.1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
    axes.axvline(1, color=GREY, lw=1)
    axes.set_title("times faster than torch.nn")


def draw_share(axes: Axes, results: list[Result], modes: tuple[str, ...], labels: bool = True) -> None:
    """Bars of the share of the floor that each row reaches."""
    draw_bars(axes, results, Result.share, modes, lambda v: f"{v:.0%}", labels)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.axvline(1, color=GREEN, lw=1)
    axes.set_title("share of a copy's bandwidth (least bytes only)")


def draw_panels(figure: Figure | SubFigure, results: list[Result], modes: tuple[str, ...]) -> None:
    """Both kinds of bars side by side, with a legend below."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 0.8))
    draw_speedup(left, results, modes)
    draw_share(right, results, modes, labels=False)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(modes), frameon=False)


def save_figure(results: list[Result], path: Path, subtitle: str, metadata: dict[str, str] | None = None) -> None:
    """A picture of all results; the suffix of `path` chooses the kind of image. metadata: texts to store in it."""
    style()
    modes = tuple(m for m in MODE_COLOURS if all(m in r.times for r in results))
    bars = len(_bars(results))
    few = len(results) <= FEW
    size = (12, 1.4 + bars * (0.12 + 0.13 * len(modes) if few else 0.05 + 0.095 * len(modes)))
    figure = plt.figure(figsize=size, layout="constrained")
    draw_panels(figure, results, modes)
    figure.suptitle(f"fastnorm on {subtitle}", x=0.01, ha="left", size=9, color=GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata=metadata)
    plt.close(figure)
