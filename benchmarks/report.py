"""README's figures, from committed runs: the text between `<!-- report: NAME -->` and `<!-- end -->`, and the pictures.

    python benchmarks/report.py            # after a new run of bench.py or end_to_end.py was saved
    python benchmarks/report.py --check    # fails where README or a picture is not what the runs say

No figure of speed in README is typed by hand: its sentences are templates here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from benchmarks import end_to_end
from benchmarks.contestants import MODES
from benchmarks.figures import save_figure
from benchmarks.machine import ROOT, where
from benchmarks.results import Result, geometric_mean, means
from benchmarks.tables import make_markdown

README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
RUN = "cpu-epyc-2core.json"  # of bench.py, with memory kept
SYSTEM_MALLOC_RUN = "cpu-epyc-2core-system-malloc.json"  # the same with --malloc system
AVX2_RUN = "cpu-epyc-avx2-2core.json"  # the same on a processor without AVX-512
GPU_RUN = "h200.json"  # of bench.py --device cuda
MODELS_RUN = "models-cpu-epyc-2core.json"  # of end_to_end.py
PICTURES = {RUN: "cpu-epyc-2core.png", GPU_RUN: "h200.png"}
SOURCE = "Source"  # the text of a PNG that has the digest of its run

WIDTH = 120
MODE_PHRASES = {"forward": "forward", "step": "forward + backward", "eval": "in evaluation"}
GOALS = {"forward": 2.6, "step": 2.4, "eval": 2.2}  # times torch.nn, over all rows
LEAST = 1.05  # times torch.nn, of every figure
LARGE = (32, 64, 112, 112)  # the layer that tells what --malloc does: its outputs are large
BUSY_CORES = 0.1  # from here on a machine is not idle

MARKED = re.compile(r"(?P<start><!-- report: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)


class ReportError(Exception):
    """README has markers that cannot be filled."""


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


def by_mode(values: dict[str, float], unit: str = "", digits: int = 1) -> str:
    """2.1 times torch.nn forward, 1.9 forward + backward and 1.9 in evaluation."""
    parts = [f"{v:.{digits}f}{unit if i == 0 else ''} {MODE_PHRASES[m]}" for i, (m, v) in enumerate(values.items())]
    return listed(parts)


def conditions(run: dict[str, Any], file: str) -> str:
    """Where and how a run was made."""
    machine, versions = run["machine"], run["versions"]
    place = machine.get("gpu") or (
        f"{machine['threads']} cores of an {machine['cpu']} ({machine['fastnorm_capability'].upper()}, "
        f"{machine['cache_bytes'] >> 20} MiB of last cache)"
    )
    idle = machine["busy_cores"] < BUSY_CORES
    load = "an otherwise idle" if idle else f"a busy ({machine['busy_cores']} cores by other processes)"
    torch_version = versions["torch"].split("+")[0]
    picture = f", [picture](benchmarks/results/{PICTURES[file]})" if file in PICTURES else ""
    return (
        f"{place}, torch {torch_version}, medians of interleaved runs, on {load} machine, {run['date'][:10]}; "
        f"every row: [JSON](benchmarks/results/{file}){picture}."
    )


def results_of(run: dict[str, Any]) -> tuple[list[Result], tuple[str, ...]]:
    """A run's rows and modes."""
    device = "cuda" if run["machine"].get("gpu") else "cpu"
    return [Result.from_json(row, device) for row in run["rows"]], tuple(
        m for m in MODES if m in run["options"]["modes"]
    )


def cells(shapes: Sequence[Result]) -> str:
    """What a cell of the table is."""
    dtypes, layouts = (listed(dict.fromkeys(getattr(r.row, what) for r in shapes)) for what in ("dtype", "layout"))
    return (
        f"Each cell is the geometric mean over {dtypes}, {layouts}, plain, +activation and +add+ReLU, and in "
        'brackets the worst and the best of these. "torch.nn": how many times longer torch.nn takes (with its '
        'activation and add in place); "copies": our time, where copying the least bytes that must move takes 1.'
    )


def speed() -> str:
    """The table of layers, what it says over all rows, and how far it is from the goals."""
    run = load(RUN)
    results, modes = results_of(run)
    shapes, tiny = [r for r in results if not r.is_tiny], [r for r in results if r.is_tiny]
    mean = {mode: means(results, mode) for mode in modes}
    figures = [(r.speedup(mode), r, mode) for r in shapes for mode in modes]
    parts = [
        paragraph(conditions(run, RUN), cells(shapes)),
        make_markdown(results, modes).rstrip(),
        paragraph(
            f"Over all {len(shapes)} rows: "
            f"{by_mode({m: v['times_torch'] for m, v in mean.items()}, ' times torch.nn')}; above the size of the "
            f"cache {by_mode({m: v['copies_above_cache'] for m, v in mean.items()}, ' copies')}.",
            against_onednn(shapes, modes),
            host_time(tiny, modes),
        ),
        kept_memory(),
        goals({mode: v["times_torch"] for mode, v in mean.items()}, figures),
    ]
    return "\n\n".join(filter(None, parts))


TORCH_PARAMETERS = (
    "torch.nn's group and layer norms of bfloat16 have bfloat16 parameters, because on a GPU they take no others; ours "
    "have float32 ones."
)


def left_out(shapes: Sequence[Result]) -> str:
    """The dtypes that were measured with some epilogues alone."""
    measured: dict[str, set[str]] = {}
    for r in shapes:
        measured.setdefault(r.row.dtype, set()).add(r.row.epilogue)
    every = set().union(*measured.values())
    phrases = {"plain": "plain", "act": "+activation", "add_act": "+add+ReLU"}
    return " ".join(
        f"Of {dtype}: {listed(phrases[e] for e in phrases if e in epilogues)} alone."
        for dtype, epilogues in measured.items()
        if epilogues != every
    )


def torch_is_faster(shapes: Sequence[Result], modes: Sequence[str]) -> str:
    """The layers in which it is, the worst first."""
    slower: dict[str, list[float]] = {}
    for r in shapes:
        for mode in modes:
            if r.speedup(mode) < 1:
                slower.setdefault(r.row.title, []).append(r.speedup(mode))
    figures = sum(map(len, slower.values()))
    layers = [f"{title} ({between(v, 2)})" for title, v in sorted(slower.items(), key=lambda item: min(item[1]))]
    if not figures:
        return ""
    return f"torch.nn is the faster one in {figures} of {len(shapes) * len(modes)} figures: {listed(layers)}."


def avx2() -> str:
    """What a run without AVX-512 says over all rows."""
    run = load(AVX2_RUN)
    results, modes = results_of(run)
    shapes = [r for r in results if not r.is_tiny]
    mean = {mode: means(results, mode)["times_torch"] for mode in modes}
    return paragraph(
        f"The same rows on {conditions(run, AVX2_RUN)}",
        f"{by_mode(mean, ' times torch.nn')}.",
        against_onednn(shapes, modes),
        torch_is_faster(shapes, modes),
    )


def gpu() -> str:
    """The table of layers on a GPU, what it says over all rows, and where torch.nn is faster."""
    run = load(GPU_RUN)
    results, modes = results_of(run)
    shapes = [r for r in results if not r.is_tiny]
    mean = {mode: means(results, mode) for mode in modes}
    return "\n\n".join(
        (
            paragraph(conditions(run, GPU_RUN), cells(shapes), left_out(shapes), TORCH_PARAMETERS),
            make_markdown(results, modes).rstrip(),
            paragraph(
                f"Over all {len(shapes)} rows: "
                f"{by_mode({m: v['times_torch'] for m, v in mean.items()}, ' times torch.nn')}; "
                f"{by_mode({m: geometric_mean(r.copies(m) for r in shapes) for m in modes}, ' copies')}.",
                torch_is_faster(shapes, modes),
            ),
        )
    )


def against_onednn(shapes: Sequence[Result], modes: Sequence[str]) -> str:
    """Over the rows that oneDNN serves, and the layers in which it is the faster one."""
    served = [r for r in shapes if all("onednn" in r.times[m] for m in modes)]
    if not served:
        return ""
    ratios = {mode: geometric_mean(r.speedup(mode, "onednn") for r in served) for mode in modes}
    text = f"Against oneDNN alone, without autograd, in the {len(served)} rows that it serves: "
    text += by_mode(ratios, " times")
    by_title: dict[str, list[float]] = {}
    for r in served:
        by_title.setdefault(r.row.title, []).extend(r.speedup(mode, "onednn") for mode in modes)
    slower = [f"{title} ({between(v)})" for title, v in by_title.items() if geometric_mean(v) < 1]
    return f"{text}; it is the faster one in {listed(slower)}." if slower else f"{text}."


def host_time(tiny: Sequence[Result], modes: Sequence[str]) -> str:
    if not tiny:
        return ""
    ratios = [r.speedup(mode) for r in tiny for mode in modes]
    layers = listed(dict.fromkeys(r.row.title.removeprefix("tiny ") for r in tiny))
    within = sum(ratio >= 1 for ratio in ratios)
    return (
        f"A call on a tiny tensor ({layers}) takes no longer than torch.nn's in {within} of {len(ratios)} figures "
        f"({between(ratios)} times)."
    )


def kept_memory() -> str:
    """What malloc has to do with it."""
    run = load(SYSTEM_MALLOC_RUN)
    large = [r for r in results_of(run)[0] if r.row.layer.shape == LARGE and r.row.dtype == "float32"]
    earlier = f", of earlier kernels, {run['date'][:10]}" if run["commit"] != load(RUN)["commit"] else ""
    return paragraph(
        "The table keeps freed memory in the process (`--malloc keep`), which shows the kernels. With malloc as it "
        "comes, large outputs are fresh pages each time; ours ask for huge ones. There "
        f"([JSON](benchmarks/results/{SYSTEM_MALLOC_RUN}){earlier}) forward + backward of "
        f"{large[0].row.layer.norm} {'x'.join(map(str, LARGE))} float32 takes "
        f"{between(r.speedup('step') for r in large)} times less than torch.nn's, and "
        f"{between((r.copies('step') for r in large), 2)} times what `x.clone()` of the same bytes takes."
    )


def goals(reached: dict[str, float], figures: Sequence[tuple[float, Result, str]]) -> str:
    """What is aimed for, and the figures that miss it by kind."""
    below = sorted(((ratio, r) for ratio, r, _ in figures if ratio < LEAST), key=lambda pair: pair[0])
    missed = below or any(reached[mode] < goal for mode, goal in GOALS.items() if mode in reached)
    wanted = (
        f"{by_mode({m: g for m, g in GOALS.items() if m in reached}, ' times torch.nn')}, and no figure below {LEAST}"
    )
    if not missed:
        return paragraph(f"What we aimed for is reached: {wanted}.")
    text = f"What we aim for and do not reach yet: {wanted}."
    if below:
        kinds = Counter(r.row.layer.norm for _, r in below)
        plain = sum(r.row.epilogue == "plain" for _, r in below)
        text += (
            f" {len(below)} of {len(figures)} figures are below, the worst at {below[0][0]:.2f}: "
            f"{listed(f'{n} of {norm}' for norm, n in kinds.most_common())}; {plain} of them are plain "
            "norms, with nothing fused."
        )
    return paragraph(text)


def models() -> str:
    """The table of whole models."""
    run = load(MODELS_RUN)
    outcomes = [end_to_end.Outcome.from_json(row) for row in run["rows"]]
    return "\n\n".join(
        (
            paragraph(
                conditions(run, MODELS_RUN),
                "Each cell: how many times as fast as torch.nn, and the share of its peak memory.",
            ),
            end_to_end.make_markdown(outcomes).rstrip(),
        )
    )


SECTIONS: dict[str, Callable[[], str]] = {"speed": speed, "avx2": avx2, "gpu": gpu, "models": models}


def rewritten(text: str) -> str:
    """The text with every marked part made anew."""
    found = list(MARKED.finditer(text))
    if len(found) != len(re.findall("<!-- report:", text)):
        raise ReportError("a `<!-- report: NAME -->` has no `<!-- end -->` behind it")
    for match in found:
        if match["name"] not in SECTIONS:
            raise ReportError(f"<!-- report: {match['name']} -->: expected one of {', '.join(SECTIONS)}")
    return MARKED.sub(lambda m: f"{m['start']}\n{SECTIONS[m['name']]()}\n\n{m['end']}", text)


def digest(run: str) -> str:
    return hashlib.sha256((RESULTS / run).read_bytes()).hexdigest()


def is_drawn(run: str, picture: Path) -> bool:
    """Whether the picture was made of this run as it is now."""
    return picture.exists() and Image.open(picture).info.get(SOURCE) == digest(run)


def draw(name: str, picture: Path) -> None:
    run = load(name)
    results, _ = results_of(run)
    title = f"{where(run['machine'])}, torch {run['versions']['torch']}"
    save_figure(results, picture, title, {SOURCE: digest(name)})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something would change")
    options = parser.parse_args(arguments)
    try:
        old, stale = README.read_text(), []
        new = rewritten(old)
        if new != old:
            stale.append(README)
        pictures = {RESULTS / picture: run for run, picture in PICTURES.items()}
        stale += [picture for picture, run in pictures.items() if not is_drawn(run, picture)]
    except ReportError as error:
        sys.exit(str(error))
    if options.check:
        for path in stale:
            print(f"{path.name} is not what the committed runs say: run python benchmarks/report.py")
        return int(bool(stale))
    for path in stale:
        if path == README:
            README.write_text(new)
        else:
            draw(pictures[path], path)
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
