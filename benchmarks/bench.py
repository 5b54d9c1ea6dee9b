"""Time fastnorm against torch.nn, torch.compile of torch.nn, and a plain copy of the same tensor.

    python benchmarks/bench.py --quick                      # a row of each kind, half a minute
    python benchmarks/bench.py --json out.json --plot out.png
    python benchmarks/bench.py --filter 'GroupNorm.*bfloat16' --compile
    python benchmarks/bench.py --preset unet,vae --memory-format channels_last
    python benchmarks/bench.py --device cuda --quick --vs compile,cudnn,liger,apex --json out.json
    python benchmarks/bench.py compare before.json after.json   # the rows that moved beyond noise

All contestants of a row take turns in one process (timing.py); the numbers are medians. Before a call is timed its
values are compared with torch.nn's (validation.py). Every op here is bound by memory, so next to torch.nn there is one
absolute measure: the time that copying the least bytes takes (the floor), as a share of ours. Of the others (peers.py)
each runs in the rows that it serves; on a CPU oneDNN, where `pip install onednn-cpu-gomp` has put it; on a GPU cuDNN's
batch norm. On a GPU times are the device's alone, and copies of the tensors take turns, enough of them that the cache
holds none.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import compare, onednn, peers
from benchmarks.contestants import DTYPES, MODES, Arena, Row, call_or_refusal, copies_for, quick_table, table
from benchmarks.machine import busy_cores, cache_bytes, cpu_cores, describe, refusals, where
from benchmarks.options import choices, image, memory_format, positive, regex
from benchmarks.presets import PRESETS
from benchmarks.results import Result, json_text, moved
from benchmarks.tables import make_console, make_markdown, print_moved, print_results, print_summary
from benchmarks.timing import keep_memory, race
from benchmarks.validation import OURS, REFERENCE, Fault, faults
from fastnorm import _C
from tests.common import cases

SHARE = {"forward": 1, "step": 2, "eval": 1}  # of a row's time, by mode
QUICK_BUDGET_S, FULL_BUDGET_S = 28.0, 900.0
ROW_BUDGET_S = 6.0  # of a preset
# Cores busy elsewhere: threads wait for each other, so one that is late by a time slice delays all.
NOISY_CORES = 0.2
COMMITTED = Path(__file__).parent / "results" / "cpu-epyc-2core.json"
LEAST_WEIGHT = 4 << 20  # bytes: small rows need time too, for their repeats


def raise_ours(row: Row, mode: str, fault: Fault) -> None:
    """An error for a fault of ours; the others' are theirs."""
    if fault.contestant == OURS:
        raise RuntimeError(f"{row.name}, {mode}: {fault}")


def measure(
    rows: Sequence[Row],
    budget_s: float,
    device: str = "cpu",
    modes: tuple[str, ...] = MODES,
    with_compile: bool = False,
    compile_budget_s: float = math.inf,
    tick: Callable[[Row], None] = lambda row: None,
    vs: Sequence[str] | None = None,
    fault: Callable[[Row, str, Fault], None] = raise_ours,
) -> Iterator[Result]:
    """Time row after row, in about `budget_s` seconds in all. Compiling does not count; once it has taken
    `compile_budget_s`, the other rows run without torch.compile.

    vs: the other contestants, of peers.NAMES; default: peers.DEFAULT. fault: told of each call that is not timed
    because it fails, or computes something else than torch.nn; without ours or torch.nn's a row is left out. Default:
    an error for ours.
    """
    vs = peers.DEFAULT[device] if vs is None else vs
    cache = cache_bytes(device)
    deadline, compiling = time.perf_counter() + budget_s, 0.0
    weights = [max(row.nbytes, LEAST_WEIGHT) for row in rows]
    for i, row in enumerate(rows):
        tick(row)
        # A tiny row measures the host; on a CPU the caches hold what they would hold between two layers.
        copies = copies_for(row.nbytes, cache) if device == "cuda" and row.layer.label != "tiny" else 1
        arena = Arena(row, device, copies, peers.contestants(vs, row))
        row_budget = max(0.0, deadline - time.perf_counter()) * weights[i] / sum(weights[i:])
        times, right = {}, True
        compiled = with_compile and compiling < compile_budget_s
        for mode in modes:
            start = time.perf_counter()
            calls = arena.calls(mode, compiled)
            if "onednn" in vs and onednn.serves(row):
                calls["onednn"] = call_or_refusal(partial(onednn.mode_call, row, mode, arena.x, arena.modules["torch"]))
            for found in faults(calls, partial(arena.exact, mode)):
                fault(row, mode, found)
                del calls[found.contestant]
            if compiled:
                deadline += time.perf_counter() - start
                compiling += time.perf_counter() - start
            right = {OURS, REFERENCE} <= calls.keys()
            if not right:
                break
            part = row_budget * SHARE[mode] / sum(SHARE[m] for m in modes)
            times[mode] = race(calls, part, "cpu" if row.layer.label == "tiny" else device)
        if right:
            yield Result(row, times, arena.disagreement(), copies * row.nbytes > cache, device)
        if compiled:
            torch._dynamo.reset()
        if device == "cuda":
            del arena, calls
            torch.cuda.empty_cache()


def measure_with_bar(rows: Sequence[Row], *arguments: object, **options: object) -> Iterator[Result]:
    """`measure` with a progress bar on stderr."""
    counts = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns = (TextColumn("measuring"), *counts, TextColumn("[dim]{task.description}"))
    # No refreshing in the background: its thread would take time from the timed calls.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task, started = progress.add_task("", total=len(rows)), False

        def tick(row: Row) -> None:
            nonlocal started
            progress.update(task, advance=int(started), description=row.name, refresh=True)
            started = True

        yield from measure(rows, *arguments, **options, tick=tick)  # type: ignore[arg-type, misc]


def warn_when_busy(console: Console, device: str) -> None:
    """Warn where other processes would disturb the timing."""
    busy = busy_cores() if device == "cpu" else 0.0
    if busy > NOISY_CORES:
        console.print(f"[yellow]Other processes keep {busy} of {cpu_cores()} cores busy: do not trust the times below.")


def print_how_far_torch_moved(console: Console, results: list[Result], threads: int) -> None:
    """Compare torch.nn's times with those of the committed run."""
    saved = json.loads(COMMITTED.read_text())
    if saved["machine"]["threads"] == threads:
        print_moved(console, moved(results, saved), f"results/{COMMITTED.name}")


def about_this_run(device: str, vs: Sequence[str] = ()) -> dict[str, object]:
    """machine.describe, with the versions of the libraries that take part."""
    about = describe(device)
    versions = {name: peers.version(name) for name in vs}
    about["versions"] = {**about["versions"], **{name: v for name, v in versions.items() if v}}  # type: ignore[dict-item]
    return about


def as_json(
    results: list[Result], options: dict[str, object], device: str, vs: Sequence[str] = ()
) -> dict[str, object]:
    """The whole run: machine, versions, commit, date, options and all rows."""
    counts = {"refused_launches": _C.refused_gangs()} if device == "cuda" else {}
    return about_this_run(device, vs) | counts | {"options": options, "rows": [r.to_json() for r in results]}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a row of each kind, in about half a minute")
    add("--preset", type=partial(choices, tuple(PRESETS)), default=(), metavar="NAME,...",
        help=f"the layers of whole models in place of the table: {', '.join(PRESETS)}")  # fmt: skip
    add("--filter", type=regex, default="", metavar="REGEX",
        help="only rows whose name has it, e.g. 'GroupNorm.*bfloat16'")  # fmt: skip
    add("--dtype", choices=cases.DTYPES, action="append", help="default: float32, bfloat16")
    add("--memory-format", "--layout", dest="layout", type=memory_format, action="append",
        metavar="{" + ",".join(cases.LAYOUTS) + "}", help="default: both")  # fmt: skip
    add("--epilogue", choices=cases.EPILOGUES, action="append", help="default: all three")
    add("--mode", choices=MODES, action="append", help="default: all; step is forward + backward")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=partial(positive, int), help="default: torch's")
    add("--vs", type=partial(choices, peers.NAMES), metavar="NAME,...",
        help=f"the other contestants, of {', '.join(peers.NAMES)}; each runs in the rows that it serves; eager, which "
        "is torch.nn, always does; default: "
        + "; ".join(f"on {device} {', '.join(names)}" for device, names in peers.DEFAULT.items()))  # fmt: skip
    add("--compile", action="store_true", help="torch.compile of torch.nn runs too (it takes its time)")
    add("--compile-budget", type=partial(positive, float), metavar="SECONDS", default=math.inf,
        help="for the compiling, beyond --budget; later rows go without; default: no limit")  # fmt: skip
    add("--budget", type=partial(positive, float), metavar="SECONDS",
        help=f"of timing, in all, but a few rounds of each row; default {FULL_BUDGET_S:.0f}, "
        f"quick {QUICK_BUDGET_S:.0f}, {ROW_BUDGET_S:.0f} a row of a preset")  # fmt: skip
    add("--malloc", choices=("keep", "system"), default="keep",
        help="keep: freed memory stays with the process (see timing.py); system: as malloc comes")  # fmt: skip
    add("--json", type=Path, metavar="PATH", help="save everything measured")
    add("--plot", type=image, metavar="PATH", help="save a picture")
    add("--markdown", type=Path, metavar="PATH", help="save a table for a README")
    add("--list", action="store_true", help="print the names of the rows and stop")
    args = parser.parse_args(arguments)
    if args.quick and args.preset:
        parser.error("--quick and --preset each choose the rows: give one of them")
    return args


def chosen_rows(args: argparse.Namespace) -> list[Row]:
    if args.quick:
        rows = list(quick_table(args.filter, args.device))
    else:
        dtypes, layouts = tuple(args.dtype or DTYPES), tuple(args.layout or cases.LAYOUTS)
        epilogues = tuple(args.epilogue or cases.EPILOGUES)
        layers = [layer for name in args.preset for layer in PRESETS[name]]
        rows = list(table(args.filter, dtypes, layouts, epilogues, args.device, layers))
    if not rows:
        sys.exit(f"no row matches --filter {args.filter!r}; --list prints them all")
    return rows


def default_budget(args: argparse.Namespace, rows: Sequence[Row]) -> float:
    """Seconds, where --budget names none."""
    if args.preset:
        return ROW_BUDGET_S * len(rows)
    return QUICK_BUDGET_S if args.quick else FULL_BUDGET_S


def chosen_others(console: Console, args: argparse.Namespace, rows: Sequence[Row]) -> list[str]:
    """The other contestants that take part; says which do not, and why."""
    wanted = dict.fromkeys([*(args.vs or peers.DEFAULT[args.device]), *(["compile"] if args.compile else [])])
    reasons = {name: peers.why_absent(name, args.device) or peers.why_idle(name, rows) for name in wanted}
    for name, reason in reasons.items():
        if reason:
            console.print(f"{name}: no contestant, {reason}", style="dim", markup=False)
    return [name for name, reason in reasons.items() if not reason]


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        sys.exit(compare.main(arguments[1:]))
    args = parse(arguments)
    rows = chosen_rows(args)
    if args.list:
        print("\n".join(row.name for row in rows))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here")
    for path in filter(None, (args.json, args.markdown, args.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    kept = args.malloc == "keep" and args.device == "cpu" and keep_memory()
    modes = tuple(args.mode or MODES)
    budget = args.budget or default_budget(args, rows)

    console = make_console()
    vs = chosen_others(console, args, rows)
    about = about_this_run(args.device, vs)
    machine, versions = about["machine"], about["versions"]
    assert isinstance(machine, dict) and isinstance(versions, dict)
    place = where(machine)
    console.print(
        f"[bold]fastnorm {versions['fastnorm']}[/] ({about['commit']}) on {place}; torch "
        f"{versions['torch']} ({machine['torch_capability']}); "
        f"freed memory {'kept' if kept else 'as malloc does'}"
    )
    warn_when_busy(console, args.device)
    wrong: list[tuple[Row, str, Fault]] = []
    results: list[Result] = []
    measuring = measure_with_bar(
        rows, budget, args.device, modes, "compile" in vs, args.compile_budget, vs=vs, fault=lambda *f: wrong.append(f)
    )
    with suppress(KeyboardInterrupt):
        for result in measuring:
            results.append(result)  # each by itself: those before an interruption are kept
    done = {result.row for result in results} | {row for row, *_ in wrong}
    if missing := len(rows) - len(done):
        console.print(f"interrupted: {missing} of {len(rows)} rows were not measured", style="yellow")
    if not done:
        sys.exit(1)
    print_results(console, results, modes)
    print_summary(console, results, modes)
    for row, mode, fault in wrong:
        console.print(f"not timed: {row.name}, {mode}: {fault}", style="red", markup=False)
    if args.device == "cuda":
        console.print(refusals())
    else:
        print_how_far_torch_moved(console, results, int(machine["threads"]))
    if args.json:
        options = {"budget_s": budget, "quick": args.quick, "modes": modes, "memory_kept": kept, "vs": vs}
        args.json.write_text(json_text(as_json(results, options, args.device, vs)))
    if args.markdown:
        args.markdown.write_text(make_markdown(results, modes))
    if args.plot:
        from benchmarks.figures import save_figure

        save_figure(results, args.plot, f"{place}, torch {versions['torch']}")
    if any(fault.contestant == OURS for *_, fault in wrong):
        sys.exit("fastnorm computes something else than torch.nn in the rows above")


if __name__ == "__main__":
    main()
