"""The results as text: one table with a section per shape, and the summary."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from benchmarks.contestants import MODE_NAMES, MODES
from benchmarks.results import NAMES, OTHERS, SPEEDUP_GOAL, Result, geometric_mean, means, summary_lines, without_tiny

PLAIN_WIDTH = 140  # of a file or a pipe
LABEL = 26
WIDTHS = {
    "us": 9,
    "torch": 7,
    "compile": 9,
    "cudnn": 7,
    "onednn": 8,
    "liger": 7,
    "apex": 7,
    "inplace_abn": 12,
    "copies": 7,
    "floor": 6,
}  # of the columns of one mode
SHOWN_MISSES = 12

Cell = tuple[str, str]  # text and style


def make_console() -> Console:
    """A console as wide as the terminal; plain and wide when the output is not a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=PLAIN_WIDTH, highlight=False, color_system=None)


def microseconds(seconds: float) -> str:
    us = seconds * 1e6
    return f"{us:.1f}" if us < 100 else f"{us:,.0f}".replace(",", " ")


def times(ratio: float) -> str:
    return f"{ratio:.{2 if ratio < 10 else 1 if ratio < 100 else 0}f}x"


def _against(ratio: float, line: float) -> Cell:
    """Speed against another contestant: green from the line upwards, red when slower."""
    good = "bold green" if ratio >= SPEEDUP_GOAL else "green"
    return times(ratio), good if ratio >= line else "yellow" if ratio >= 1 else "red"


def _cell(result: Result, mode: str, column: str) -> Cell:
    if column == "us":
        return microseconds(result.seconds(mode)), ""
    if column in OTHERS:
        there = column in result.times[mode]
        return _against(result.speedup(mode, column), result.speedup_line) if there else ("-", "dim")
    if result.is_tiny:
        return "-", "dim"  # a call's host time has nothing to do with bytes
    good = result.copies(mode) <= result.copies_line(mode)
    text = f"{result.copies(mode):.2f}" if column == "copies" else f"{result.share(mode):.0%}"
    return text, "green" if good else "yellow" if result.share(mode) >= 0.5 else "red"


def _layout(results: Sequence[Result], width: int, modes: Sequence[str]) -> tuple[list[str], list[str]]:
    """The modes and columns that fit into `width`. The copies (which are 1 / floor) are left out first,
    then the last modes.
    """
    columns = list(WIDTHS)
    for other in OTHERS[1:]:
        if not any(other in r.times[m] for r in results for m in modes):
            columns.remove(other)
    shown = list(modes)

    def needed() -> int:
        return LABEL + len(shown) * (sum(WIDTHS[c] for c in columns) + 2)

    if needed() > width:
        columns.remove("copies")
    while needed() > width and len(shown) > 1:
        shown.pop()
    return shown, columns


def make_table(results: Sequence[Result], width: int, modes: Sequence[str] = MODES) -> Text:
    """One line per row, one group of columns per mode; `print_results` explains the columns."""
    modes, columns = _layout(results, width, modes)
    block = sum(WIDTHS[c] for c in columns)
    lines = [
        Text(" " * LABEL + "".join(f"  {MODE_NAMES[m]:>{block}}" for m in modes), "bold"),
        Text(
            " " * LABEL + len(modes) * ("  " + "".join(f"{c:>{WIDTHS[c]}}" for c in columns)),
            "bold",
        ),
        Text("─" * (LABEL + len(modes) * (block + 2)), "dim"),
    ]
    for title, group in itertools.groupby(results, key=lambda r: r.row.title):
        lines.append(Text(title, "bold cyan"))
        for result in group:
            line = Text(f"  {result.row.variant}".ljust(LABEL))
            for mode in modes:
                line.append("  ")
                for column in columns:
                    text, style = _cell(result, mode, column)
                    line.append(f"{text:>{WIDTHS[column]}}", style)
            lines.append(line)
    return Text("\n").join(lines)


def print_results(console: Console, results: Sequence[Result], modes: Sequence[str] = MODES) -> None:
    """Print the table and the meaning of its columns."""
    console.print(make_table(results, console.width, modes), no_wrap=True, crop=False)
    _, columns = _layout(results, console.width, modes)
    meaning = {
        "us": "fastnorm's microseconds",
        "torch": "how many times longer torch.nn takes",
        **{other: f"likewise {name}" for other, name in NAMES.items() if other != "torch"},
        "copies": "our time, where copying the least bytes that must move takes 1",
        "floor": "that copy's share of our time",
    }
    console.print("; ".join(f"{c}: {meaning[c]}" for c in columns) + ".", style="dim")


def markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return markdown_line(heads) + "|---" * len(heads) + "|\n" + "".join(map(markdown_line, rows))


def make_markdown(results: Sequence[Result], modes: Sequence[str] = MODES, copies: bool = True) -> str:
    """A row per shape: times torch.nn and, if wanted, copies, as geometric means over dtypes, layouts and epilogues,
    with the least and the most. Tiny rows, where there are no others, have no copies.
    """

    def cell(values: list[float], unit: str) -> str:
        mean, low, high = geometric_mean(values), min(values), max(values)
        return f"{mean:.1f}{unit}" + (f" ({low:.1f} to {high:.1f})" if len(values) > 1 else "")

    copies = copies and not all(r.is_tiny for r in results)
    heads = [f"{MODE_NAMES[m]}: {what}" for m in modes for what in ("torch.nn", *["copies"] * copies)]
    rows = []
    for title, group in itertools.groupby(without_tiny(results), key=lambda r: r.row.title):
        members, cells = list(group), [title]
        for mode in modes:
            cells.append(cell([r.speedup(mode) for r in members], "x"))
            if copies:
                cells.append(cell([r.copies(mode) for r in members], ""))
        rows.append(cells)
    return markdown_table(["layer", *heads], rows)


def print_moved(console: Console, ratios: Sequence[float], name: str) -> None:
    """Print how torch.nn's own times compare with those of a saved run: other times of ours say nothing beyond that."""
    if not ratios:
        return
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * [ratios[0]]
    console.print(
        f"torch.nn itself takes {middle:.2f} times (quartiles {low:.2f} and {high:.2f}) what it took in {name}: the "
        f"median of {len(ratios)} figures. Compare ratios, not microseconds."
    )


def print_summary(console: Console, results: list[Result], modes: tuple[str, ...] = MODES) -> None:
    """Print geometric means, then each line to reach with the rows that miss it."""
    console.print("\n[bold]Geometric means[/]")
    for mode in modes:
        mean = means(results, mode)
        if math.isnan(mean["times_torch"]):
            continue
        text = f"  {MODE_NAMES[mode]:<19} {times(mean['times_torch']):>6} torch.nn"
        for other in OTHERS[1:]:
            if f"times_{other}" in mean:
                text += f", {times(mean[f'times_{other}'])} {NAMES[other]}"
        if not math.isnan(mean["copies"]):
            text += f"; {mean['copies']:.2f} copies"
        if not math.isnan(mean["copies_above_cache"]):
            text += f", {mean['copies_above_cache']:.2f} above cache size"
        console.print(text)
    copies = [r.copy_bandwidth(m) for r in results for m in modes if r.device == "cuda" and not r.is_tiny]
    if copies:
        console.print(f"  the copy at most   {max(copies) * 1e-9:6,.0f} GB/s".replace(",", " "))
    console.print("[bold]Lines to reach[/] [dim](reported, never enforced)[/]")
    for line in summary_lines(results, modes):
        met = f"{line.rows - len(line.misses)} of {line.rows}"
        console.print(f"  [{'yellow' if line.misses else 'green'}]{met:>10}[/]  {escape(line.what)}")
        for name, value in line.misses[:SHOWN_MISSES]:
            console.print(f"  [yellow]{value:>10}[/]    {escape(name)}", style="dim")
        if len(line.misses) > SHOWN_MISSES:
            console.print(f"              and {len(line.misses) - SHOWN_MISSES} more", style="dim")
