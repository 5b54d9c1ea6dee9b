"""The picture of examples/train_digits.py: loss curves, their differences, seconds per epoch, speed of layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import LogLocator

from benchmarks.figures import draw_panels, plt, style

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure
    from train_digits import Variant

    from benchmarks.results import Result

LOOKS: dict[str, dict[str, Any]] = {
    "torch.nn": {"color": "#b8b8b8", "lw": 5, "alpha": 0.7},
    "converted": {"color": "#e8964c", "lw": 2, "ls": "--"},
    "fused": {"color": "#1f4e8c", "lw": 1},
    "nudged": {"color": "#b8b8b8"},
}


def draw_training(figure: SubFigure, networks: dict[str, list[Variant]]) -> None:
    """Loss curves, below them their differences from torch.nn's, and the seconds per epoch."""
    grid = figure.add_gridspec(2, 3, height_ratios=(2, 1), width_ratios=(1, 1, 0.8))
    bars = figure.add_subplot(grid[:, 2], title="seconds per epoch")
    for place, (title, variants) in enumerate(networks.items()):
        curves = figure.add_subplot(grid[0, place], title=f"{title}: training loss", yscale="log")
        differences = figure.add_subplot(grid[1, place], sharex=curves, yscale="log", xlabel="step")
        differences.set_title("difference from torch.nn (grey: torch.nn itself, nudged)", size=9, weight="normal")
        for i, variant in enumerate(variants):
            reference, look = variants[0], LOOKS[variant.name]
            if variant is not reference:
                visible = [max(difference, 1e-8) for difference in variant.loss_difference(reference)]
                differences.plot(visible, **look | {"lw": 1.2})
            if variant.name == "nudged":
                continue
            curves.plot(variant.losses, label=variant.name, **look)
            bar = bars.bar(place + (i - 1) * 0.27, variant.seconds, 0.25, color=look["color"])
            speed = "" if variant is reference else f"\n{reference.seconds / variant.seconds:.2f}x"
            bars.bar_label(bar, [f"{variant.seconds:.2f}{speed}"], size=8, padding=2)
        curves.legend(frameon=False, fontsize=8)
        curves.tick_params(labelbottom=False)
        curves.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        curves.yaxis.set_major_formatter("{x:g}")
        curves.yaxis.set_minor_formatter("")
        for axes in (curves, differences):
            axes.grid(alpha=0.25)
    bars.set_xticks(range(len(networks)), list(networks))
    bars.margins(y=0.12)


def save_picture(path: Path, networks: dict[str, list[Variant]], results: list[Result], where: str) -> None:
    """The training above, the layers of large models below."""
    style()
    figure = plt.figure(figsize=(13, 10), layout="constrained")
    figure.suptitle(where, x=0.01, ha="left", size=9, color="#444444")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1), hspace=0.03)
    draw_training(top, networks)
    draw_panels(bottom, results, ("forward", "step"))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
