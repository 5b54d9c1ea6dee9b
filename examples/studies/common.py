"""What the studies share: the digits, training, and the page, picture and table that each writes.

A study is a module with

    measure(quick) -> dict       what was measured, as plain numbers: it is what the JSON file holds
    report(measured) -> Report   what the source claims beside what was measured, and tables
    draw(figure, measured)       the picture

so that a page can be written again from its JSON, and no figure in it is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import fastnorm
from benchmarks.figures import plt, style
from fastnorm import _C
from fastnorm.__main__ import cpu_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "studies"
HELD_OUT = 360  # of 1797 images
DPI = 80

Measured = dict[str, Any]


@dataclass
class Claim:
    """What a source says, what was measured here, and whether they agree."""

    source: str
    measured: str
    agrees: bool


@dataclass
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass
class Report:
    """The text of a page."""

    title: str
    introduction: str
    sources: Sequence[str]
    claims: Sequence[Claim]
    tables: Sequence[Table]
    caption: str


@dataclass
class Digits:
    """scikit-learn's handwritten digits, scaled to mean 0 and deviation 1 over all pixels: x (N, 1, 8, 8)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def batches(self, size: int, seed: int, keep: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
        """Epochs without end, in orders that the seed decides; a last batch of less than `keep` is left out."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for chosen in torch.randperm(len(self.train_x), generator=generator).split(size):
                if len(chosen) >= keep:
                    yield self.train_x[chosen], self.train_y[chosen]


def load() -> Digits:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    x, y = (x - x.mean()) / x.std(), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(x[train], y[train], x[test], y[test])


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In evaluation mode; NaN counts as wrong."""
    training = model.training
    model.eval()
    right = float((model(x).argmax(1) == y).float().mean())
    model.train(training)
    return right


@dataclass
class Training:
    """losses of every step, accuracies on the held-out images: (step, accuracy). diverged: the loss was not finite."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    diverged: bool = False

    def steps_to(self, target: float) -> int | None:
        """The first step at which the accuracy reached `target`; None if it never did."""
        return next((step for step, reached in self.accuracies if reached >= target), None)

    @property
    def best(self) -> float:
        return max((reached for _, reached in self.accuracies), default=0.0)


def train(
    model: nn.Module,
    data: Digits,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch: int = 64,
    seed: int = 0,
    evaluate_every: int = 0,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> Training:
    """`steps` steps on the cross entropy, fewer where the loss is not finite; the accuracy after every
    `evaluate_every` of them, and at the end."""
    record = Training()
    model.train()
    batches = data.batches(batch, seed)
    for step in range(1, steps + 1):
        x, y = next(batches)
        loss = F.cross_entropy(model(x), y)
        if not math.isfinite(loss.item()):
            record.diverged = True
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        record.losses.append(loss.item())
        if step == steps or (evaluate_every and step % evaluate_every == 0):
            record.accuracies.append((step, accuracy(model, data.test_x, data.test_y)))
    return record


def median(values: Sequence[float | None], missing: float = math.inf) -> float | None:
    """The middle value, where None counts as more than any other; None if that is None."""
    ordered = sorted(missing if value is None else value for value in values)
    middle = ordered[len(ordered) // 2]
    return None if middle == missing else middle


def estimate(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two runs, and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


# Writing it down.


def show(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return "never"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if math.isnan(value) or math.isinf(value):
            return "not finite"
        return f"{value:.0f}" if value == 0 or 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return str(value)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(show, line)) + " |" for line in lines)


def where() -> str:
    """The machine and the versions."""
    threads = torch.get_num_threads()
    return (
        f"fastnorm {fastnorm.__version__}, torch {torch.__version__}, {cpu_model()}, {threads} threads, "
        f"{_C.cpu_capability()}"
    )


def page(name: str, report: Report, facts: dict[str, Any]) -> str:
    claims = markdown_table(
        ("the source", "measured here", "agrees"), [(c.source, c.measured, c.agrees) for c in report.claims]
    )
    quick = " This is the quick form." if facts["quick"] else ""
    parts = [
        f"# {report.title}",
        report.introduction,
        "## Claimed and measured",
        claims,
        "## Figures",
        f"![{report.title}]({name}.png)",
        report.caption,
        *(f"{table.title}:\n\n{markdown_table(table.columns, table.rows)}" for table in report.tables),
        "## Sources",
        "\n".join(f"- {source}" for source in report.sources),
        f"Written by `python examples/studies/{name}.py` in {facts['seconds']:.0f} s; the figures: "
        f"[{name}.json]({name}.json). {facts['where']}.{quick}",
    ]
    return "\n\n".join(parts) + "\n"


def write_index(folder: Path) -> None:
    """README.md: the studies that are in the folder, each with its claims."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        facts = json.loads(path.read_text())
        agreeing = sum(claim["agrees"] for claim in facts["claims"])
        rows.append((f"[{facts['title']}]({path.stem}.md)", f"{agreeing} of {len(facts['claims'])}"))
    text = [
        "# Studies: which norm helps, when, and why",
        "Small experiments behind what is said about normalization. Each page puts what its source claims beside what "
        "was measured here, agreeing or not. All use fastnorm's own modules and scikit-learn's handwritten digits, and "
        "run on two CPU cores in minutes: `make studies`. They show directions, not the figures of large networks.",
        markdown_table(("study", "claims that agree"), rows),
        "Every page, picture and JSON file here is written by the script in examples/studies that has its name.",
    ]
    (folder / "README.md").write_text("\n\n".join(text) + "\n")


def as_json(document: dict[str, Any], depth: int = 2) -> str:
    """An entry a line, and those of a dictionary in it; a curve is on one line."""
    entries = []
    for key, value in document.items():
        nested = depth > 1 and isinstance(value, dict)
        entries.append(f"{json.dumps(key)}: {as_json(value, depth - 1) if nested else json.dumps(value)}")
    return "{\n" + ",\n".join(entries) + "\n}"


def publish(
    name: str,
    measured: Measured,
    report: Report,
    draw: Callable[[Figure, Measured], None],
    folder: Path,
    size: tuple[float, float],
    facts: dict[str, Any],
) -> None:
    """Writes NAME.json, NAME.png, NAME.md and README.md into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    claims = [vars(claim) for claim in report.claims]
    document = {"title": report.title, **facts, "claims": claims, "measured": measured}
    (folder / f"{name}.json").write_text(as_json(document) + "\n")
    (folder / f"{name}.md").write_text(page(name, report, facts))
    style()
    figure = plt.figure(figsize=size, layout="constrained")
    draw(figure, measured)
    figure.savefig(folder / f"{name}.png", dpi=DPI)
    plt.close(figure)
    write_index(folder)


def main(
    module: Any,
    size: tuple[float, float],
    arguments: Sequence[str] | None = None,
) -> None:
    """The command line of a study."""
    name = Path(module.__file__).stem
    parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller form, of some seconds")
    parser.add_argument("--redraw", action="store_true", help="page and picture from the JSON that is there")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: docs/studies, quick: build/studies")
    args = parser.parse_args(arguments)
    folder = args.out or (ROOT / "build" / "studies" if args.quick else PAGES)
    torch.set_num_threads(1)  # the tensors are small
    start = time.monotonic()
    if args.redraw:
        document = json.loads((folder / f"{name}.json").read_text())
        facts = {key: document[key] for key in ("quick", "seconds", "where")}
        measured = document["measured"]
    else:
        # Through JSON, so that the page is what the file says.
        measured = json.loads(json.dumps(module.measure(args.quick)))
        facts = {"quick": args.quick, "seconds": round(time.monotonic() - start, 1), "where": where()}
    report = module.report(measured)
    publish(name, measured, report, module.draw, folder, size, facts)
    for claim in report.claims:
        print(f"{'agrees   ' if claim.agrees else 'DISAGREES'}  {claim.source}\n           {claim.measured}")
    print(f"Saved {folder / name}.md, .png and .json after {facts['seconds']} s", file=sys.stderr)
