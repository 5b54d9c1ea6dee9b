"""What the sections of README and docs say of the committed runs: a function for each, of which report.py writes the
text into its page. No figure of a saved run is typed by hand: the sentences are templates here.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import compile_modes, cpu_limits, end_to_end, host_time, report_text
from benchmarks.contestants import MODES
from benchmarks.cpu_limits import LEAST, PORT_LIMITS
from benchmarks.report_text import ReportError, between, conditions, conditions_and_rows, link, listed, load, paragraph
from benchmarks.results import Result, geometric_mean, means, without_tiny
from benchmarks.tables import make_markdown, markdown_table

RUN = "cpu-epyc-2core.json"  # of bench.py, with memory kept
SYSTEM_MALLOC_RUN = "cpu-epyc-2core-system-malloc.json"  # the same with --malloc system
AVX2_RUN = "cpu-epyc-avx2-2core.json"  # the same on a processor without AVX-512
GPU_RUN = "h200.json"  # of bench.py --device cuda
MODELS_RUN = "models-cpu-epyc-2core.json"  # of end_to_end.py; it may be absent
HOST_TIME_RUN = "host-time-cpu-epyc.json"  # of host_time.py
IMAGES_RUN = "images-cpu-epyc-2core.json"  # of images.py
COMPILE_RUN = "compile-modes.json"  # of compile_modes.py
INSTRUCTIONS = "instructions.json"  # of count_instructions.py
CPU_INSTRUCTIONS = "cpu_instructions.json"  # of count_cpu_instructions.py
PICTURES = {RUN: "cpu-epyc-2core.png", GPU_RUN: "h200.png"}

MODE_PHRASES = {"forward": "forward", "step": "forward + backward", "eval": "in evaluation"}
GOALS = {"forward": 2.6, "step": 2.4, "eval": 2.2}  # times torch.nn, over all rows
LARGE = (32, 64, 112, 112)  # the layer that tells what --malloc does: its outputs are large
SMALL_BYTES = 8e6  # a GPU takes less time for so many than for the launch and what blocks wait for
COUNTED = ("float32", "bfloat16")  # dtypes of the table of instructions
REGISTER_ROW = 8192  # elements of a LayerNorm's row that fit a GPU's registers in backward


def by_mode(values: dict[str, float], unit: str = "", digits: int = 1) -> str:
    """2.1 times torch.nn forward, 1.9 forward + backward and 1.9 in evaluation."""
    parts = [f"{v:.{digits}f}{unit if i == 0 else ''} {MODE_PHRASES[m]}" for i, (m, v) in enumerate(values.items())]
    return listed(parts)


def speedups(results: Sequence[Result], modes: Sequence[str]) -> str:
    """4.2 times torch.nn forward, and so on: geometric means over all layers."""
    return by_mode({mode: means(list(results), mode)["times_torch"] for mode in modes}, " times torch.nn")


def results_of(run: dict[str, Any]) -> tuple[list[Result], tuple[str, ...]]:
    """A run's rows and modes."""
    device = "cuda" if run["machine"].get("gpu") else "cpu"
    return [Result.from_json(row, device) for row in run["rows"]], tuple(
        m for m in MODES if m in run["options"]["modes"]
    )


def members(shapes: Sequence[Result]) -> str:
    """What a cell of a table is of."""
    dtypes, layouts = (listed(dict.fromkeys(getattr(r.row, what) for r in shapes)) for what in ("dtype", "layout"))
    return (
        f"Each cell is the geometric mean over {dtypes}, {layouts}, plain, +activation and +add+ReLU, and in "
        "brackets the worst and the best of these."
    )


def cells(shapes: Sequence[Result]) -> str:
    """What a cell of the whole table is."""
    return (
        f'{members(shapes)} "torch.nn": how many times longer torch.nn takes (with its activation and add in place); '
        '"copies": our time, where copying the least bytes that must move takes 1.'
    )


def speed_in_short() -> str:
    """README's table: times torch.nn by layer, and over all rows."""
    run = load(RUN)
    results, modes = results_of(run)
    shapes = without_tiny(results)
    return "\n\n".join(
        (
            paragraph(
                f"How many times longer torch.nn takes, with its activation and add in place: {conditions(run)}. "
                f"{members(shapes)}"
            ),
            make_markdown(results, modes, copies=False).rstrip(),
            paragraph(
                f"Over all {len(shapes)} rows ([JSON](benchmarks/results/{RUN})): {speedups(results, modes)}.",
                torch_is_faster(shapes, modes),
            ),
        )
    )


def gpu_in_short() -> str:
    """README's sentences about a GPU."""
    run = load(GPU_RUN)
    results, modes = results_of(run)
    shapes = without_tiny(results)
    return paragraph(
        f"On an {conditions(run)}: {speedups(results, modes)}, over {len(shapes)} rows "
        f"([JSON](benchmarks/results/{GPU_RUN}), [picture](benchmarks/results/{PICTURES[GPU_RUN]})).",
        torch_is_faster(shapes, modes),
    )


def speed() -> str:
    """The table of layers, what it says over all rows, and how far it is from the goals."""
    run = load(RUN)
    results, modes = results_of(run)
    shapes, tiny = without_tiny(results), [r for r in results if r.is_tiny]
    mean = {mode: means(results, mode) for mode in modes}
    figures = [(r.speedup(mode), r, mode) for r in shapes for mode in modes]
    parts = [
        paragraph(conditions_and_rows(run, RUN), cells(shapes)),
        make_markdown(results, modes).rstrip(),
        paragraph(
            f"Over all {len(shapes)} rows: "
            f"{speedups(results, modes)}; above the size of the "
            f"cache {by_mode({m: v['copies_above_cache'] for m, v in mean.items()}, ' copies')}.",
            against_onednn(shapes, modes),
            tiny_calls(tiny, modes),
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


def host_time_of_calls() -> str:
    """The table of layers on tensors so small that only the host's time counts."""
    run = load(HOST_TIME_RUN)
    rows = run["rows"]

    def ratios(name: str) -> str:
        return between((row["torch_us"] / us for row in rows if (us := row.get(f"{name}_us"))), 2)

    return "\n\n".join(
        (
            paragraph(
                "How many times longer torch.nn takes on tensors so small that a call is all host time, on one thread: "
                f"{ratios('convert')} beside converted layers, {ratios('fuse')} beside fused ones, {ratios('enabled')} "
                f"beside its own with `enable`. {conditions_and_rows(run, HOST_TIME_RUN)}"
            ),
            markdown_table(host_time.HEADS, map(host_time.cells, rows)).rstrip(),
        )
    )


def images() -> str:
    """What ImageNormalize takes beside three passes."""
    run = load(IMAGES_RUN)
    rows = run["rows"]

    def times(contestant: str) -> str:
        pairs = (row["modes"]["forward"]["us"] for row in rows)
        return between(us[contestant]["median"] / us["fastnorm"]["median"] for us in pairs)

    return paragraph(
        f"ImageNormalize of {'x'.join(map(str, rows[0]['shape']))} uint8 images, planar and channels_last, to float32 "
        f"and bfloat16: plain torch's three passes take {times('torch')} times as long, torchvision's `ToDtype` and "
        f"`Normalize` {times('torchvision')} times. {conditions_and_rows(run, IMAGES_RUN)}"
    )


def avx2() -> str:
    """What a run without AVX-512 says over all rows."""
    run = load(AVX2_RUN)
    results, modes = results_of(run)
    shapes = without_tiny(results)
    earlier = ", of earlier kernels," if run["commit"] != load(RUN)["commit"] else ""
    return paragraph(
        f"The same rows{earlier} on {conditions_and_rows(run, AVX2_RUN)}",
        f"{speedups(results, modes)}.",
        against_onednn(shapes, modes),
        torch_is_faster(shapes, modes),
    )


def gpu() -> str:
    """The table of layers on a GPU, what it says over all rows, and where torch.nn is faster."""
    run = load(GPU_RUN)
    results, modes = results_of(run)
    shapes = without_tiny(results)
    return "\n\n".join(
        (
            paragraph(conditions_and_rows(run, GPU_RUN), cells(shapes), left_out(shapes), TORCH_PARAMETERS),
            make_markdown(results, modes).rstrip(),
            paragraph(
                f"Over all {len(shapes)} rows: "
                f"{speedups(results, modes)}; "
                f"{by_mode({m: geometric_mean(r.copies(m) for r in shapes) for m in modes}, ' copies')}.",
                torch_is_faster(shapes, modes),
            ),
        )
    )


def gpu_limits() -> str:
    """What the CUDA kernels are farthest from a copy in, as an entry of a list."""
    run = load(GPU_RUN)
    shapes = without_tiny(results_of(run)[0])
    counted = {(r["family"], r["layout"], r["dtype"], r["direction"]): r for r in load(INSTRUCTIONS)["rows"]}

    def copies(rows: Iterable[Result], *modes: str) -> str:
        return f"{between(r.copies(mode) for r in rows for mode in modes)} times"

    def executed(family: str, layout: str, dtype: str) -> str:
        both = (counted[family, layout, dtype, way]["instructions"] for way in ("forward", "backward"))
        return "{:.0f} forward and {:.0f} backward".format(*both)

    odd = [r for r in shapes if r.row.layer.shape[-1] == 7 and r.row.layout == "planar" and r.row.epilogue == "add_act"]
    small = [r for r in shapes if r.row.nbytes < SMALL_BYTES and r not in odd]
    rows = [r for r in shapes if r.row.layer.norm == "LayerNorm" and r.row.layer.shape[-1] > REGISTER_ROW]
    mean = {mode: geometric_mean(r.copies(mode) for r in shapes) for mode in ("forward", "step")}
    text = paragraph(
        f"On an {run['machine']['gpu']} the kernels take {mean['forward']:.1f} times what a copy of the least bytes "
        f"takes in forward, and {mean['step']:.1f} with backward (geometric means, {link(GPU_RUN)}). Farthest from it:",
        "planar 7x7 maps with add and ReLU, which go by single elements because masks have a row for each run",
        f"({copies(odd, 'forward', 'step')});",
        f"tensors of less than {SMALL_BYTES / 1e6:.0f} MB, whose time is launch, latency and the meeting of blocks",
        f"({copies(small, 'forward', 'step')});",
        f"LayerNorm over {listed(dict.fromkeys(str(r.row.layer.shape[-1]) for r in rows))} with backward, whose rows "
        f"exceed the registers ({copies(rows, 'step')}, and",
        f"{between((r.speedup('step') for r in rows), 2)} times torch.nn's speed);",
        "GELU in backward, SiLU and GELU of float32, tanh and sigmoid, which execute more instructions than memory "
        f"leaves room for. Instructions an element ({link(INSTRUCTIONS)}) of what goes by single elements:",
        "channels_last with an odd number of channels",
        f"{executed('BatchNorm, odd channels', 'channels_last', 'bfloat16')} in bfloat16,",
        f"{executed('BatchNorm, odd channels', 'channels_last', 'float32')} in float32;",
        f"LayerNorm2d of planar 7x7 maps {executed('LayerNorm2d 7x7', 'planar', 'bfloat16')} in bfloat16,",
        f"of 14x14 ones {executed('LayerNorm2d 14x14', 'planar', 'bfloat16')}.",
        "[LOG.md](../benchmarks/results/LOG.md) has the parts of every row's time.",
    )
    return textwrap.indent(text, "  ").replace("  ", "- ", 1)


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


def tiny_calls(tiny: Sequence[Result], modes: Sequence[str]) -> str:
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
        f"({link(SYSTEM_MALLOC_RUN)}{earlier}) forward + backward of "
        f"{large[0].row.layer.norm} {'x'.join(map(str, LARGE))} float32 takes "
        f"{between(r.speedup('step') for r in large)} times less than torch.nn's, and "
        f"{between((r.copies('step') for r in large), 2)} times what `x.clone()` of the same bytes takes."
    )


def goals(reached: dict[str, float], figures: Sequence[tuple[float, Result, str]]) -> str:
    """What is aimed for, and the figures that miss it by kind."""
    below = sorted(((ratio, r) for ratio, r, _ in figures if ratio < LEAST), key=lambda pair: pair[0])
    aims = {mode: goal for mode, goal in GOALS.items() if mode in reached}
    least = f"no figure below {LEAST}"
    missed = {mode: goal for mode, goal in aims.items() if reached[mode] < goal}
    if not missed and not below:
        return paragraph(f"What we aimed for is reached: {by_mode(aims, ' times torch.nn')}, and {least}.")
    met = {mode: goal for mode, goal in aims.items() if mode not in missed}
    wanted = ([by_mode(missed, " times torch.nn")] if missed else []) + ([least] if below else [])
    got = ([by_mode(met, " times torch.nn")] if met else []) + ([] if below else [least])
    text = f"What we aim for and do not reach yet: {', and '.join(wanted)}."
    if got:
        text += f" Reached: {', and '.join(got)}."
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
    if not (report_text.RESULTS / MODELS_RUN).exists():
        return paragraph("No run of whole models is saved yet. `make bench-models` measures them on your machine.")
    run = load(MODELS_RUN)
    outcomes = [end_to_end.Outcome.from_json(row) for row in run["rows"]]
    return "\n\n".join(
        (
            paragraph(
                conditions_and_rows(run, MODELS_RUN),
                "Each cell: how many times as fast as torch.nn, and the share of its peak memory.",
            ),
            end_to_end.make_markdown(outcomes).rstrip(),
        )
    )


def under_compile() -> str:
    """The table of torch.compile, and who is ahead in it."""
    run = load(COMPILE_RUN)
    rows = run["rows"]
    behind = [r for r in rows if r["kernel_us"] > r["torch compiled_us"]]
    eager = sum(r["fastnorm_us"] < r["kernel_us"] for r in rows)
    text = f"The kernels are ahead of inductor's code in {len(rows) - len(behind)} of the {len(rows)} rows"
    if behind:
        percent = between((100 * (r["kernel_us"] / r["torch compiled_us"] - 1) for r in behind), 0)
        text += f"; in the others, of {listed(dict.fromkeys(r['dtype'] for r in behind))}, they take {percent}% longer"
    return "\n\n".join(
        (
            paragraph(
                f"How many times longer torch.nn takes without torch.compile: {conditions_and_rows(run, COMPILE_RUN)}",
                '"torch compiled" is torch.nn under torch.compile, "fastnorm" is eager, "kernel" and "decompose" are '
                "fastnorm under torch.compile.",
            ),
            markdown_table(compile_modes.HEADS, map(compile_modes.cells, rows)).rstrip(),
            paragraph(f"{text}. Eager calls of the kernels are faster still in {eager} rows."),
        )
    )


def cpu_instructions() -> str:
    """The table of what the CPU kernels execute for a pack, without an activation, by AVX-512."""
    shown = [r for r in load(CPU_INSTRUCTIONS)["rows"] if r["epilogue"] == "plain" and r["capability"] == "avx512"]
    counted: dict[str, dict[tuple[str, str], float]] = {}
    for row in shown:
        counted.setdefault(row["walk"], {})[row["direction"], row["dtype"]] = row["instructions"]
    columns = [(direction, dtype) for direction in PORT_LIMITS for dtype in COUNTED]
    heads = [f"{direction}, {dtype}" for direction, dtype in columns]
    rows = [[walk, *(f"{of[c]:.0f}" if c in of else "" for c in columns)] for walk, of in counted.items()]
    limits = ["limit, cycles", *(str(limit) for pair in PORT_LIMITS.values() for limit in pair)]
    stale = sum(row.get("stale", False) for row in shown)
    text = (
        f"AVX-512 without an activation; {stale} of the {len(shown)} counts were made before the kernels last changed:"
    )
    return f"{paragraph(text)}\n\n{markdown_table(('walk', *heads), [*rows, limits]).rstrip()}"


def cpu_limits_of_rows() -> str:
    """The figures of the run that miss a line, with what holds them back."""
    run = load(RUN)
    if not run["machine"].get("clock_ghz"):
        raise ReportError(f"{RUN} does not say the processor's clock: run bench.py where a C compiler is")
    results, modes = results_of(run)
    counts = {
        (r["walk"], r["epilogue"], r["direction"], r["dtype"]): r["instructions"]
        for r in load(CPU_INSTRUCTIONS)["rows"]
        if r["capability"] == run["machine"]["fastnorm_capability"]
    }
    shapes = without_tiny(results)
    rows = list(cpu_limits.rows(shapes, run, counts))
    text = (
        f"{len(rows)} of {len(shapes) * len(modes)} figures miss a line. Cycles a pack at "
        f"{run['machine']['clock_ghz']:.1f} GHz, of a step for forward and backward; instructions a pack (at least: an "
        "epilogue that is not counted is left out), of which a core issues two in a cycle of 64-byte vectors; what the "
        "ports allow; and what copying as many bytes as a pass reads and "
        "writes takes in the same run."
    )
    return f"{paragraph(text)}\n\n{markdown_table(cpu_limits.HEADS, rows).rstrip()}"
