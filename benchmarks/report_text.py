"""What the sections of the report are made of: runs, sentences, lists, spans of figures, and where a run was made."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from typing import Any

from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"
WIDTH = 120
BUSY_CORES = 0.1  # from here on a machine is not idle


class ReportError(Exception):
    """A page has markers that cannot be filled."""


def load(name: str) -> dict[str, Any]:
    path = RESULTS / name
    if not path.exists():
        raise ReportError(f"{path.relative_to(ROOT)} does not exist: save a run there first")
    return dict(json.loads(path.read_text()))


def paragraph(*sentences: str) -> str:
    return textwrap.fill(" ".join(filter(None, sentences)), WIDTH, break_long_words=False, break_on_hyphens=False)


def listed(words: Iterable[str]) -> str:
    """a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def between(values: Iterable[float], digits: int = 1) -> str:
    """The least and the most, or the one where both are the same."""
    given = list(values)
    low, high = (f"{v:.{digits}f}" for v in (min(given), max(given)))
    return low if low == high else f"{low} to {high}"


def conditions(run: dict[str, Any]) -> str:
    """Where and how a run was made."""
    machine, versions = run["machine"], run["versions"]
    place = machine.get("gpu") or (
        f"{machine['threads']} core{'s' * (machine['threads'] > 1)} of an {machine['cpu']} "
        f"({machine['fastnorm_capability'].upper()}, "
        f"{machine['cache_bytes'] >> 20} MiB of last cache)"
    )
    idle = machine["busy_cores"] < BUSY_CORES
    load = "an otherwise idle" if idle else f"a busy ({machine['busy_cores']} cores by other processes)"
    torch_version = versions["torch"].split("+")[0]
    return f"{place}, torch {torch_version}, medians of interleaved runs, on {load} machine, {run['date'][:10]}"


def conditions_and_rows(run: dict[str, Any], file: str) -> str:
    """The same with a link to the run, from a page of docs."""
    return f"{conditions(run)}; every row: {link(file)}."


def link(file: str) -> str:
    """To a run, from a page of docs."""
    return f"[JSON](../benchmarks/results/{file})"
