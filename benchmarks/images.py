"""Time fastnorm.ImageNormalize against three passes of torch and torchvision's transforms, on batches of uint8 images.

    python benchmarks/images.py --json out.json --markdown out.md
    python benchmarks/images.py --device cuda --dtype bfloat16
    python benchmarks/bench.py compare before.json after.json   # the rows that moved beyond noise

bench.py's rows are norms of torch.nn; these are none, so they have this script, of the same parts: all contestants take
turns, values are compared before a call is timed, and the floor is the time in which the least bytes, the images read
and the result written, move at the bandwidth of a copy. Contestants:

    torch        x.to(float32).div_(255).sub_(mean).div_(std), then .to(dtype): a pass over memory for each
    torchvision  transforms.v2: ToDtype(float32, scale=True) and Normalize, then .to(dtype); where it can be imported

Each keeps the memory format of the images.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastnorm
from benchmarks import peers
from benchmarks.bench import warn_when_busy
from benchmarks.contestants import DTYPES, Call, copies_for, in_turn
from benchmarks.machine import cache_bytes, describe, where
from benchmarks.options import memory_format, positive
from benchmarks.results import CLONE_PASSES, json_text, timing_json
from benchmarks.tables import make_console, markdown_table, microseconds, times
from benchmarks.timing import Timing, keep_memory, race
from benchmarks.validation import OURS, REFERENCE, Fault, faults
from tests.common import cases

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
SHAPE = (32, 3, 224, 224)
ROW_BUDGET_S = 6.0
PEER = "torchvision"
COLUMNS = ("dtype", "layout", "us", REFERENCE, PEER, "floor")


@dataclass(frozen=True)
class Row:
    """uint8 images of a shape and a layout, and the dtype that they become."""

    shape: tuple[int, ...]
    dtype: str
    layout: str

    @property
    def name(self) -> str:
        return f"ImageNormalize {'x'.join(map(str, self.shape))} uint8 to {self.dtype} {self.layout}"

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """The least that moves: the images and the result."""
        return self.elements * (1 + cases.DTYPES[self.dtype].itemsize)


def why_absent() -> str | None:
    """Why torchvision cannot take part, or None."""
    module = "torchvision.transforms.v2"
    if not peers.why_not_imported(module, PEER):
        return None
    # Where its compiled operators are missing: transforms need none of them, but their names, which this declares.
    importlib.import_module("tests.models.conftest")
    return peers.why_not_imported(module, PEER)


def three_passes(x: Tensor, dtype: torch.dtype, of: torch.dtype = torch.float32) -> Tensor:
    """torch's operators, with arithmetic in `of`; in place, which saves them memory."""
    mean, std = (torch.tensor(values, dtype=of, device=x.device).view(-1, 1, 1) for values in (MEAN, STD))
    return x.to(of).div_(255).sub_(mean).div_(std).to(dtype)


def torchvision_transform(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    v2 = importlib.import_module("torchvision.transforms.v2")
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    return lambda x: transform(x).to(dtype)  # type: ignore[no-any-return]


def contestants(dtype: torch.dtype, with_torchvision: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: fastnorm.ImageNormalize(MEAN, STD, dtype=dtype),
        REFERENCE: partial(three_passes, dtype=dtype),
    }
    return found | {PEER: torchvision_transform(dtype)} if with_torchvision else found


def calls_of(row: Row, device: str, with_torchvision: bool) -> tuple[dict[str, Call], Callable[[], Tensor]]:
    """The calls to time, with the copy of the result that measures the floor; and the result in float64, of the first
    images. On a GPU images take turns, so many that no cache holds them."""
    dtype = cases.DTYPES[row.dtype]
    generator = torch.Generator().manual_seed(0)
    copies = copies_for(row.nbytes, cache_bytes(device)) if device == "cuda" else 1
    drawn = (torch.randint(0, 256, row.shape, dtype=torch.uint8, generator=generator) for _ in range(copies))
    images = [cases.to_layout(x.to(device), row.layout) for x in drawn]
    calls = {
        name: in_turn([partial(call, x) for x in images]) for name, call in contestants(dtype, with_torchvision).items()
    }
    calls["clone"] = in_turn([torch.empty_like(x, dtype=dtype).clone for x in images])
    return calls, lambda: three_passes(images[0], torch.float64, torch.float64)


def measure(
    rows: Sequence[Row], budget_s: float, device: str, with_torchvision: bool, fault: Callable[[Row, Fault], None]
) -> Iterator[tuple[Row, dict[str, Timing]]]:
    """Times of each row. fault: told of calls that are not timed because they compute something else; without ours or
    the three passes a row is left out."""
    for row in rows:
        calls, exact = calls_of(row, device, with_torchvision)
        for found in faults(calls, exact):
            fault(row, found)
            del calls[found.contestant]
        if {OURS, REFERENCE} <= calls.keys():
            yield row, race(calls, budget_s / len(rows), device)


def floor_share(row: Row, timing: dict[str, Timing]) -> float:
    """The share of the copy's bandwidth that we reach, of the least bytes."""
    copied = CLONE_PASSES * row.elements * cases.DTYPES[row.dtype].itemsize
    return timing["clone"].median * row.nbytes / copied / timing[OURS].median


def row_json(row: Row, timing: dict[str, Timing]) -> dict[str, Any]:
    """As bench.py has its rows."""
    measured = {
        "us": {name: timing_json(t) for name, t in timing.items()},
        "times_torch": round(timing[REFERENCE].median / timing[OURS].median, 3),
        "floor_share": round(floor_share(row, timing), 3),
    }
    return {
        "model": "images",
        "norm": "ImageNormalize",
        "shape": list(row.shape),
        "dtype": f"uint8 to {row.dtype}",
        "layout": row.layout,
        "bytes": row.nbytes,
        "modes": {"forward": measured},
    }


def cells(row: Row, timing: dict[str, Timing]) -> list[str]:
    """Of COLUMNS: the others' times in units of ours."""
    others = [times(timing[n].median / timing[OURS].median) if n in timing else "-" for n in (REFERENCE, PEER)]
    return [row.dtype, row.layout, microseconds(timing[OURS].median), *others, f"{floor_share(row, timing):.0%}"]


def print_table(console: Console, title: str, results: Sequence[tuple[Row, dict[str, Timing]]]) -> None:
    table = Table(*COLUMNS, title=title, title_justify="left")
    for result in results:
        table.add_row(*cells(*result))
    console.print(table)


def markdown(results: Sequence[tuple[Row, dict[str, Timing]]]) -> str:
    return markdown_table(COLUMNS, (cells(*result) for result in results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=cases.DTYPES, action="append", help="of the result; default: float32, bfloat16")
    add("--memory-format", "--layout", dest="layout", type=memory_format, action="append",
        metavar="{" + ",".join(cases.LAYOUTS) + "}", help="default: both")  # fmt: skip
    add("--batch", type=partial(positive, int), default=SHAPE[0], help=f"default: {SHAPE[0]}")
    add("--size", type=partial(positive, int), default=SHAPE[-1], help=f"height and width; default: {SHAPE[-1]}")
    add("--threads", type=partial(positive, int), help="default: torch's")
    add("--budget", type=partial(positive, float), metavar="SECONDS", help=f"in all; default {ROW_BUDGET_S:.0f} a row")
    add("--json", type=Path, metavar="PATH", help="save everything measured")
    add("--markdown", type=Path, metavar="PATH", help="save a table for a README")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    kept = args.device == "cpu" and keep_memory()
    shape = (args.batch, SHAPE[1], args.size, args.size)
    rows = [Row(shape, *of) for of in itertools.product(args.dtype or DTYPES, args.layout or cases.LAYOUTS)]
    budget = args.budget or ROW_BUDGET_S * len(rows)
    console = make_console()
    reason = why_absent()
    if reason:
        console.print(f"{PEER}: no contestant, {reason}", style="dim", markup=False)
    about = describe(args.device)
    machine, versions = about["machine"], about["versions"]
    assert isinstance(machine, dict) and isinstance(versions, dict)
    if not reason:
        versions[PEER] = importlib.import_module(PEER).__version__
    warn_when_busy(console, args.device)
    wrong: list[tuple[Row, Fault]] = []
    results = list(measure(rows, budget, args.device, not reason, lambda *found: wrong.append(found)))
    print_table(console, f"{'x'.join(map(str, shape))} uint8 images on {where(machine)}", results)
    for row, fault in wrong:
        console.print(f"not timed: {row.name}: {fault}", style="red", markup=False)
    for path in filter(None, (args.json, args.markdown)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.json:
        options = {"budget_s": budget, "memory_kept": kept, "vs": ["eager", *([] if reason else [PEER])]}
        args.json.write_text(json_text(about | {"options": options, "rows": [row_json(*r) for r in results]}))
    if args.markdown:
        args.markdown.write_text(markdown(results))
    if any(fault.contestant == OURS for _, fault in wrong):
        sys.exit("fastnorm computes something else in the rows above")


if __name__ == "__main__":
    main()
