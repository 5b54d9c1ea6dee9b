"""Images a second and peak memory of whole models: torch.nn, fastnorm.enabled, convert and fuse.

    python benchmarks/end_to_end.py --model resnet18,unet --json out.json
    python benchmarks/end_to_end.py --mode train --dtype bfloat16 --memory-format channels_last --compile
    python benchmarks/end_to_end.py --device cuda --batch 64 --markdown out.md

`fuse` is convert and then fuse, so that norms with nothing to fuse are served too.

A training step is forward, backward and SGD with momentum; an evaluation is forward without gradients. bfloat16 is
autocast, with float32 parameters. Before anything is timed, every contestant's output is compared with torch.nn's;
output and gradients are in float64. Then all take turns (timing.py), by the clock on the wall, on a GPU until it is
done. Peak memory is that of building the model and
two calls, in a process of its own on a CPU, of torch's allocator on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastnorm
from benchmarks.contestants import SHORT
from benchmarks.machine import describe
from benchmarks.memory import in_child, peak
from benchmarks.models import MODELS, why_absent
from benchmarks.options import choices, memory_format, positive
from benchmarks.results import geometric_mean, json_text, timing_from_json, timing_json
from benchmarks.tables import make_console, markdown_table
from benchmarks.timing import Timing, keep_memory, race
from benchmarks.validation import Fault, relative_error
from tests.common.cases import DTYPES, LAYOUTS, to_layout

WAYS = ("torch.nn", "enabled", "convert", "fuse")
MODES = ("train", "eval")
BATCH = {"cpu": 8, "cuda": 64}
BUDGET_S = 20.0  # of timing, for a row
# The output may differ from torch.nn's by this share of its Euclidean norm, and by twice as much as the lower
# precision changes torch.nn's.
LEAST_ERROR = 2e-3
# Gradients of a deep network with random weights multiply roundings by 1e4 and more: in float32 torch.nn's own are off
# by percents. So they are compared in float64, on a few pictures.
EXACT_ERROR, EXACT_BATCH = 1e-5, 2
COMPILED = " compiled"


@dataclass(frozen=True)
class Setup:
    """One row: a model, its input, precision and mode. dtype: bfloat16 is autocast; float64 is for comparing."""

    model: str
    shape: tuple[int, int, int, int]
    dtype: str = "float32"
    layout: str = "planar"
    mode: str = "train"
    device: str = "cpu"

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.model} {size} {SHORT[self.dtype]} {SHORT[self.layout]} {self.mode}"


@dataclass
class Outcome:
    """What was measured of a row, by contestant. memory: bytes. errors: shares by which the output, and
    in float64 output and gradients, differ from torch.nn's."""

    setup: Setup
    times: dict[str, Timing] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def images_per_s(self, contestant: str) -> float:
        return self.setup.shape[0] / self.times[contestant].median

    def speedup(self, contestant: str) -> float:
        """torch.nn's time over this contestant's."""
        return self.times["torch.nn"].median / self.times[contestant].median

    @staticmethod
    def from_json(saved: Mapping[str, Any]) -> Outcome:
        """What `to_json` has saved."""
        batch, channels, height, width = saved["shape"]
        shape = (batch, channels, height, width)
        setup = Setup(saved["model"], shape, saved["dtype"], saved["layout"], saved["mode"])
        times = {name: timing_from_json(t) for name, t in saved["us"].items()}
        memory = {name: round(mb * 1e6) for name, mb in saved["memory_mb"].items()}
        return Outcome(setup, times, memory, saved["compared"])

    def to_json(self) -> dict[str, object]:
        return {
            "model": self.setup.model,
            "shape": list(self.setup.shape),
            "dtype": self.setup.dtype,
            "layout": self.setup.layout,
            "mode": self.setup.mode,
            "us": {name: timing_json(t) for name, t in self.times.items()},
            "images_per_s": {name: round(self.images_per_s(name), 3) for name in self.times},
            "memory_mb": {name: round(n / 1e6, 1) for name, n in self.memory.items()},
            "compared": {
                name: {what: float(f"{error:.3g}") for what, error in errors.items()}
                for name, errors in self.errors.items()
            },
        }


class Contestant:
    """A model in one of WAYS, and the calls on it. compiled: by torch.compile."""

    def __init__(self, model: nn.Module, setup: Setup, way: str, compiled: bool = False) -> None:
        self.setup = setup
        self.training = setup.mode == "train"
        self.model = model.train(self.training)
        if way in ("convert", "fuse"):
            fastnorm.convert(self.model)
        if way == "fuse":
            fastnorm.fuse(self.model)
        self.call = torch.compile(self.model) if compiled else self.model
        self.block = fastnorm.enabled if way == "enabled" else contextlib.nullcontext
        self.x = picture(setup)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9) if self.training else None

    def forward(self) -> Tensor:
        device, dtype = self.setup.device, DTYPES[self.setup.dtype]
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return self.call(self.x)

    def results(self) -> dict[str, Tensor]:
        """The output; in training the gradients of all parameters too, one after the other."""
        with self.block(), torch.set_grad_enabled(self.training):
            output = self.forward()
            if not self.training:
                return {"output": output}
            gradients = torch.autograd.grad(loss_of(output), list(self.model.parameters()), allow_unused=True)
        flat = torch.cat([g.flatten() for g in gradients if g is not None])
        return {"output": output.detach(), "gradients": flat}

    def step(self) -> object:
        """What is timed."""
        if self.optimizer is None:
            with self.block(), torch.no_grad():
                return self.forward()
        with self.block():
            loss_of(self.forward()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return None


def loss_of(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32)).square().mean()


def picture(setup: Setup) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    pictures = to_layout(torch.randn(setup.shape, generator=generator), setup.layout).to(setup.device)
    return pictures.double() if setup.dtype == "float64" else pictures


def build(setup: Setup) -> nn.Module:
    """The model of torch.nn, with the same random weights each time. What the norms have is moved off 0 and 1, lest a
    call that ignores it pass."""
    torch.manual_seed(0)
    model = MODELS[setup.model].build()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=0.1)
    model = model.to(setup.device)
    model = model.double() if setup.dtype == "float64" else model
    return model.to(memory_format=torch.channels_last) if setup.layout == "channels_last" else model


def contestants(setup: Setup, compiled: bool) -> Iterator[tuple[str, Contestant]]:
    """All of a row by name, torch.nn first, with the same weights."""
    model = build(setup)
    for with_compile, way in itertools.product((False, True) if compiled else (False,), WAYS):
        yield way + COMPILED * with_compile, Contestant(copy.deepcopy(model), setup, way, with_compile)


def exact_errors(setup: Setup) -> dict[str, float]:
    """By way, the larger of the shares by which output and gradients differ from torch.nn's in float64."""
    _, *rest = setup.shape
    exact = replace(setup, dtype="float64", shape=(min(setup.shape[0], EXACT_BATCH), *rest))
    reference: dict[str, Tensor] = {}
    errors = {}
    for name, contestant in contestants(exact, compiled=False):
        found = contestant.results()
        reference = reference or found
        errors[name] = max(relative_error(value, reference[what]) for what, value in found.items())
    return errors


def compare(found: dict[str, Contestant], outcome: Outcome) -> None:
    """Note by how much each contestant's results differ from torch.nn's, and take out those that differ too much."""
    setup = outcome.setup
    exact = exact_errors(setup)
    reference = found["torch.nn"].results()["output"]
    allowed = LEAST_ERROR
    if setup.dtype != "float32":
        wide = Contestant(build(setup), replace(setup, dtype="float32"), "torch.nn").results()["output"]
        allowed += 2 * relative_error(reference, wide)
    for name in [name for name in found if name != "torch.nn"]:
        output = relative_error(found[name].results()["output"], reference)
        outcome.errors[name] = {"output": output, "float64": exact[name.removesuffix(COMPILED)]}
        for what, most in (("output", allowed), ("float64", EXACT_ERROR)):
            error = outcome.errors[name][what]
            if not error <= most:
                where = "in float64, output and gradients differ" if what == "float64" else "the output differs"
                why = f"is wrong: {where} from torch.nn's by {error:.2g} of it, at most {most:.2g} may be"
                outcome.faults.append(Fault(name, why))
                del found[name]
                break


def to_the_end(contestant: Contestant) -> None:
    """A step by the clock on the wall: what the host takes counts, and a GPU has to be done."""
    contestant.step()
    if contestant.setup.device == "cuda":
        torch.cuda.synchronize()


def peak_memory(setup: Setup, way: str, compiled: bool, threads: int) -> int:
    """Bytes that building the model in this way and two calls take at most at a time."""
    torch.set_num_threads(threads)

    def work() -> None:
        contestant = Contestant(build(setup), setup, way, compiled)
        for _ in range(2):
            contestant.step()

    return peak(work, setup.device)


def measure(setup: Setup, budget_s: float, compiled: bool = False, with_memory: bool = True) -> Outcome:
    """Compare, then time, then weigh the contestants of one row."""
    outcome = Outcome(setup)
    found = dict(contestants(setup, compiled))
    compare(found, outcome)
    outcome.times = race({name: partial(to_the_end, c) for name, c in found.items()}, budget_s)
    names = list(found)
    del found
    if with_memory:
        run = in_child if setup.device == "cpu" else (lambda function, *arguments: function(*arguments))
        for name in names:
            way, with_compile = name.removesuffix(COMPILED), name.endswith(COMPILED)
            outcome.memory[name] = run(peak_memory, setup, way, with_compile, torch.get_num_threads())
    if compiled:
        torch._dynamo.reset()
    return outcome


def make_markdown(outcomes: Sequence[Outcome]) -> str:
    """A row for each model, precision, layout and mode: torch.nn's images a second, and by contestant how many times as
    fast it is and its share of torch.nn's memory."""
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.times if name != "torch.nn"))
    heads = ["model", "batch", "dtype", "layout", "mode", "torch.nn: images/s, memory", *names]
    rows = []
    for outcome in outcomes:
        setup = outcome.setup
        cells = [setup.model, "x".join(map(str, setup.shape)), setup.dtype, setup.layout, setup.mode]
        base = outcome.memory.get("torch.nn", 0)
        cells.append(f"{outcome.images_per_s('torch.nn'):.1f}" + (f", {base / 1e6:,.0f} MB" if base else ""))
        for name in names:
            if name not in outcome.times:
                cells.append("-")
                continue
            share = f", {outcome.memory[name] / base:.0%}" if base and name in outcome.memory else ""
            cells.append(f"{outcome.speedup(name):.2f}x{share}")
        rows.append(cells)
    return markdown_table(heads, rows)


def line_of(outcome: Outcome) -> str:
    """A row as soon as it is measured."""
    parts = [f"torch.nn {outcome.images_per_s('torch.nn'):.1f} images/s"]
    parts += [f"{name} {outcome.speedup(name):.2f}x" for name in outcome.times if name != "torch.nn"]
    if outcome.memory:
        parts.append("peak MB " + " ".join(f"{n / 1e6:.0f}" for n in outcome.memory.values()))
    return f"{outcome.setup.name}: " + ", ".join(parts)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, names = parser.add_argument, tuple(MODELS)
    add("--model", type=partial(choices, names), default=names, metavar="NAME,...", help=f"of {', '.join(names)}")
    add("--mode", type=partial(choices, MODES), default=MODES, metavar="NAME,...", help="train,eval")
    add("--dtype", type=partial(choices, ("float32", "bfloat16")), default=("float32",), metavar="NAME,...",
        help="float32, bfloat16 (autocast); default: float32")  # fmt: skip
    add("--memory-format", dest="layout", type=memory_format, action="append",
        metavar="{" + ",".join(LAYOUTS) + "}", help="default: both")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add(
        "--batch",
        type=partial(positive, int),
        help="pictures; default: " + ", ".join(f"{k} {v}" for k, v in BATCH.items()),
    )
    add("--size", type=partial(positive, int), help="height and width of a picture; default: the model's own")
    add("--threads", type=partial(positive, int), help="default: torch's")
    add("--compile", action="store_true", help="each contestant under torch.compile too")
    add("--budget", type=partial(positive, float), default=BUDGET_S, metavar="SECONDS",
        help=f"of timing, for a row; default {BUDGET_S:.0f}")  # fmt: skip
    add("--no-memory", action="store_true", help="leave out peak memory, which takes a process for each contestant")
    add("--json", type=Path, metavar="PATH", help="save everything measured")
    add("--markdown", type=Path, metavar="PATH", help="save a table")
    add("--list", action="store_true", help="print the names of the rows and stop")
    return parser.parse_args(arguments)


def setups(args: argparse.Namespace, console: Console) -> list[Setup]:
    """The rows; says which models are absent, and why."""
    rows = []
    for name in args.model:
        reason = why_absent(name)
        if reason:
            console.print(f"{name}: absent, {reason}", style="dim", markup=False)
            continue
        size = args.size or MODELS[name].size
        shape = (args.batch or BATCH[args.device], 3, size, size)
        for dtype, layout, mode in itertools.product(args.dtype, args.layout or LAYOUTS, args.mode):
            rows.append(Setup(name, shape, dtype, layout, mode, args.device))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    args, console = parse(arguments), make_console()
    rows = setups(args, console)
    if args.list:
        print("\n".join(row.name for row in rows))
        return
    if not rows:
        sys.exit("none of these models can be built here")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here")
    for path in filter(None, (args.json, args.markdown)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    kept = args.device == "cpu" and keep_memory()
    outcomes = []
    for row in rows:
        outcomes.append(measure(row, args.budget, args.compile, not args.no_memory))
        console.print(line_of(outcomes[-1]), markup=False, soft_wrap=True)
        for fault in outcomes[-1].faults:
            console.print(f"not timed: {fault}", style="red", markup=False)
    if args.json:
        options = {"budget_s": args.budget, "memory_kept": kept, "compile": args.compile}
        facts = describe(args.device)
        args.json.write_text(json_text({**facts, "options": options, "rows": [o.to_json() for o in outcomes]}))
    if args.markdown:
        args.markdown.write_text(make_markdown(outcomes))
    for name in dict.fromkeys(name for o in outcomes for name in o.times if name != "torch.nn"):
        speedups = [o.speedup(name) for o in outcomes if name in o.times]
        mean = geometric_mean(speedups)
        console.print(f"{name}: {mean:.2f} times as fast as torch.nn, geometric mean of {len(speedups)}")
    if any(outcome.faults for outcome in outcomes):
        sys.exit("a contestant above computes something else than torch.nn")


if __name__ == "__main__":
    main()
