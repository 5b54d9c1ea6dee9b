"""Time fastnorm against torch.nn, torch.compile of torch.nn, and a plain copy of the same tensor.

    python benchmarks/bench.py --quick                      # a row of each kind, half a minute
    python benchmarks/bench.py --json out.json --plot out.png
    python benchmarks/bench.py --filter 'GroupNorm.*bfloat16' --compile
    python benchmarks/bench.py --device cuda --quick --compile --json out.json

All contestants of a row take turns in one process (timing.py); the numbers are medians. Every op
here is bound by memory, so next to torch.nn there is one absolute measure: the time that copying the
least bytes takes (the floor), as a share of ours. On a CPU oneDNN runs too, in the rows that it serves,
where `pip install onednn-cpu-gomp` has put it (onednn.py). On a GPU cuDNN's batch norm runs too, times are the
device's alone, and copies of the tensors take turns, enough of them that the cache holds none.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import onednn
from benchmarks.contestants import DTYPES, MODES, Arena, Row, copies_for, quick_table, table
from benchmarks.machine import busy_cores, cache_bytes, cpu_cores, describe, refusals
from benchmarks.results import Result, json_text, moved
from benchmarks.tables import make_console, make_markdown, print_moved, print_results, print_summary
from benchmarks.timing import keep_memory, race
from fastnorm import _C
from tests.common import cases

SHARE = {"forward": 1, "step": 2, "eval": 1}  # of a row's time, by mode
QUICK_BUDGET_S, FULL_BUDGET_S = 28.0, 900.0
# Cores busy elsewhere: threads wait for each other, so one that is late by a time slice delays all.
NOISY_CORES = 0.2
COMMITTED = Path(__file__).parent / "results" / "cpu-epyc-2core.json"
LEAST_WEIGHT = 4 << 20  # bytes: small rows need time too, for their repeats


def measure(
    rows: Sequence[Row],
    budget_s: float,
    device: str = "cpu",
    modes: tuple[str, ...] = MODES,
    with_compile: bool = False,
    compile_budget_s: float = math.inf,
    tick: Callable[[Row], None] = lambda row: None,
) -> list[Result]:
    """Time every row in about `budget_s` seconds. Compiling does not count; once it has taken `compile_budget_s`, the
    other rows run without torch.compile.
    """
    cache = cache_bytes(device)
    deadline, compiling = time.perf_counter() + budget_s, 0.0
    weights = [max(row.nbytes, LEAST_WEIGHT) for row in rows]
    results = []
    for i, row in enumerate(rows):
        tick(row)
        # A tiny row measures the host; on a CPU the caches hold what they would hold between two layers.
        copies = copies_for(row.nbytes, cache) if device == "cuda" and row.layer.label != "tiny" else 1
        arena = Arena(row, device, copies)
        row_budget = max(0.0, deadline - time.perf_counter()) * weights[i] / sum(weights[i:])
        disagreement, times = arena.disagreement(), {}
        compiled = with_compile and compiling < compile_budget_s
        for mode in modes:
            start = time.perf_counter()
            calls = arena.calls(mode, compiled)
            if device == "cpu" and onednn.serves(row):
                calls["onednn"] = onednn.mode_call(row, mode, arena.x)
            if compiled:
                calls["compile"]()
                deadline += time.perf_counter() - start
                compiling += time.perf_counter() - start
            if "cudnn" in calls and not runs(calls["cudnn"]):
                del calls["cudnn"]
            part = row_budget * SHARE[mode] / sum(SHARE[m] for m in modes)
            times[mode] = race(calls, part, "cpu" if row.layer.label == "tiny" else device)
        results.append(Result(row, times, disagreement, copies * row.nbytes > cache, device))
        if compiled:
            torch._dynamo.reset()
        if device == "cuda":
            del arena, calls
            torch.cuda.empty_cache()
    return results


def runs(call: Callable[[], object]) -> bool:
    """Whether cuDNN serves this call: dtypes and layouts differ from version to version."""
    try:
        call()
    except RuntimeError:
        return False
    return True


def measure_with_bar(rows: Sequence[Row], *arguments: object, **options: object) -> list[Result]:
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

        return measure(rows, *arguments, **options, tick=tick)  # type: ignore[arg-type, misc]


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


def about_this_run(device: str) -> dict[str, object]:
    """machine.describe, with oneDNN's version where it runs."""
    about = describe(device)
    installed = onednn.version() if device == "cpu" else None
    if installed:
        about["versions"] = {**about["versions"], "onednn": installed}  # type: ignore[dict-item]
    return about


def as_json(results: list[Result], options: dict[str, object], device: str) -> dict[str, object]:
    """The whole run: machine, versions, commit, date, options and all rows."""
    counts = {"refused_launches": _C.refused_gangs()} if device == "cuda" else {}
    return about_this_run(device) | counts | {"options": options, "rows": [r.to_json() for r in results]}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a row of each kind, in about half a minute")
    add(
        "--filter",
        default="",
        metavar="REGEX",
        help="only rows whose name has it, e.g. 'GroupNorm.*bfloat16'",
    )
    add("--dtype", choices=cases.DTYPES, action="append", help="default: float32, bfloat16")
    add("--layout", choices=cases.LAYOUTS, action="append", help="default: both")
    add("--epilogue", choices=cases.EPILOGUES, action="append", help="default: all three")
    add("--mode", choices=MODES, action="append", help="default: all; step is forward + backward")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, help="default: torch's")
    add(
        "--compile",
        action="store_true",
        help="torch.compile of torch.nn runs too (it takes its time)",
    )
    add("--compile-budget", type=float, metavar="SECONDS", default=math.inf,
        help="for the compiling, beyond --budget; later rows go without; default: no limit")  # fmt: skip
    add("--budget", type=float, metavar="SECONDS",
        help=f"in all; default {FULL_BUDGET_S:.0f}, quick {QUICK_BUDGET_S:.0f}")  # fmt: skip
    add("--malloc", choices=("keep", "system"), default="keep",
        help="keep: freed memory stays with the process (see timing.py); system: as malloc comes")  # fmt: skip
    add("--json", type=Path, metavar="PATH", help="save everything measured")
    add("--plot", type=Path, metavar="PATH", help="save a picture")
    add("--markdown", type=Path, metavar="PATH", help="save a table for a README")
    add("--list", action="store_true", help="print the names of the rows and stop")
    return parser.parse_args(arguments)


def chosen_rows(args: argparse.Namespace) -> list[Row]:
    rows = list(quick_table(args.filter, args.device)) if args.quick else list(
        table(
            args.filter,
            tuple(args.dtype or DTYPES),
            tuple(args.layout or cases.LAYOUTS),
            tuple(args.epilogue or cases.EPILOGUES),
            args.device,
        )
    )  # fmt: skip
    if not rows:
        sys.exit(f"no row matches --filter {args.filter!r}; --list prints them all")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    rows = chosen_rows(args)
    if args.list:
        print("\n".join(row.name for row in rows))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    kept = args.malloc == "keep" and args.device == "cpu" and keep_memory()
    modes = tuple(args.mode or MODES)
    budget = args.budget or (QUICK_BUDGET_S if args.quick else FULL_BUDGET_S)

    console = make_console()
    about = about_this_run(args.device)
    machine, versions = about["machine"], about["versions"]
    assert isinstance(machine, dict) and isinstance(versions, dict)
    host = f"{machine['cpu']}, {machine['threads']} threads, {machine['fastnorm_capability']}"
    where = machine.get("gpu") or host
    console.print(
        f"[bold]fastnorm {versions['fastnorm']}[/] ({about['commit']}) on {where}; torch "
        f"{versions['torch']} ({machine['torch_capability']}); "
        f"freed memory {'kept' if kept else 'as malloc does'}"
    )
    if args.device == "cpu":
        console.print(
            f"oneDNN: {versions.get('onednn', f'not installed ({onednn.PACKAGE}): no contestant')}", style="dim"
        )
    warn_when_busy(console, args.device)
    results = measure_with_bar(rows, budget, args.device, modes, args.compile, args.compile_budget)
    print_results(console, results, modes)
    print_summary(console, results, modes)
    if args.device == "cuda":
        console.print(refusals())
    else:
        print_how_far_torch_moved(console, results, int(machine["threads"]))
    if args.json:
        options = {"budget_s": budget, "quick": args.quick, "modes": modes, "memory_kept": kept}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json_text(as_json(results, options, args.device)))
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(make_markdown(results, modes))
    if args.plot:
        from benchmarks.figures import save_figure

        save_figure(results, args.plot, f"{where}, torch {versions['torch']}")


if __name__ == "__main__":
    main()
