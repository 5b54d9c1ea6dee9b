"""The parts of bench.py for a GPU that can be tested without one: buffers in turn, a clock that waits, rows, lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from benchmarks import bench, timing
from benchmarks.contestants import (
    CUDA_LAYERS,
    MAX_COPIES,
    MODES,
    Arena,
    Row,
    cases,
    copies_for,
    in_turn,
    passes,
    quick_table,
    table,
)
from benchmarks.results import Result, means, summary_lines
from benchmarks.tables import make_table, print_summary
from benchmarks.timing import CudaClock, Timing, repeats_for

MIB = 1 << 20
LAYER = cases.Layer("ResNet-50", "BatchNorm2d", (32, 64, 56, 56), (64,))


def result(ours: float, device: str = "cuda", **others: float) -> Result:
    """The same milliseconds in all modes, of fastnorm and `others`."""
    times = {name: Timing(ms * 1e-3, ms * 1e-3, ms * 1e-3, 5) for name, ms in {"fastnorm": ours, **others}.items()}
    return Result(Row(LAYER, "bfloat16", "planar", "act"), dict.fromkeys(MODES, times), 0.0, True, device)


@pytest.mark.parametrize("nbytes", [1, 1000, MIB, 7 * MIB, 60 * MIB, 61 * MIB, 900 * MIB])
def test_copies_keep_a_tensor_out_of_the_cache(nbytes: int) -> None:
    cache = 60 * MIB
    copies = copies_for(nbytes, cache)
    others = (copies - 1) * nbytes  # read before the same tensor's turn comes again
    assert others >= cache or copies == MAX_COPIES
    assert copies <= 2 or (copies - 2) * nbytes < cache


def test_calls_take_turns_and_keep_their_results() -> None:
    made: list[int] = []

    class Output:
        alive = 0

        def __init__(self) -> None:
            Output.alive += 1

        def __del__(self) -> None:
            Output.alive -= 1

    def make(i: int) -> Output:
        made.append(i)
        return Output()

    call = in_turn([lambda i=i: make(i) for i in range(3)])
    for _ in range(7):
        call()
    assert made == [0, 1, 2, 0, 1, 2, 0]
    assert Output.alive == 3
    alone = [lambda: None]
    assert in_turn(alone) is alone[0]


def test_an_arena_of_several_copies_runs_each_contestant_on_all() -> None:
    row = Row(cases.TINY, "float32", "planar", "add_act")
    arena = Arena(row, copies=3)
    assert len({x.data_ptr() for pair in arena.inputs for x in pair}) == 6
    assert not torch.equal(arena.inputs[0][0], arena.inputs[1][0])
    for mode in MODES:
        for call in arena.calls(mode).values():
            for _ in range(4):
                call()
    assert arena.disagreement() < 16


class FakeEvent:
    """An event of a device whose time is the amount of work that it was given."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.at - self.at) * 1e3


def test_the_clock_holds_the_device_until_the_host_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[float] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: held.append(cycles / timing.SPIN_HZ))
    host = iter([1e-3, 1e-3, 1e-3, 9.0, 9.0])  # seconds in which the calls of a sample are enqueued
    monkeypatch.setattr(timing, "cpu_clock", lambda call, repeats: (call(), next(host))[1])

    def call() -> None:
        FakeEvent.now += 3e-6

    clock = CudaClock()
    assert clock(call, 10) == pytest.approx(3e-6)  # of the second try, which was long enough
    assert held == pytest.approx([timing.HOLD_S, timing.HOLD_S + 1.5e-3])
    clock(call, 10)
    assert len(held) == 3
    clock(call, 10)  # too slow for any hold: measured anyway
    assert held[-1] == timing.MAX_HOLD_S and len(held) == 5


def test_a_sample_does_not_overrun_the_queue() -> None:
    assert repeats_for(lambda: None, lambda call, n: n * 1e-6, most=64) == 64
    assert repeats_for(lambda: None, lambda call, n: n * 1e-3, most=64) == 2


def test_a_gpu_has_more_rows() -> None:
    everywhere, there = ([row.name for row in table(device=device)] for device in ("cpu", "cuda"))
    layouts = sum(len(layer.layouts) for layer in CUDA_LAYERS)
    assert set(everywhere) < set(there) and len(set(there)) == len(there) == len(everywhere) + 3 * 2 * layouts
    quick = [row.name for row in quick_table(device="cuda")]
    assert {row.name for row in quick_table()} < set(quick) and len(quick) <= 22
    assert all("VAE" in row.name for row in quick_table("VAE", "cuda")) and len(list(quick_table("VAE", "cuda"))) == 2


def test_every_row_has_its_passes_and_torchs_activation() -> None:
    for layer in CUDA_LAYERS:
        row = Row(layer, "bfloat16", "planar", "act")
        assert passes("step", row.activation, row.residual) == 5
        small = cases.Layer("small", "BatchNorm1d", (3, 4), (4,), (), layer.activations)
        assert Arena(Row(small, "float32", "planar", "act")).disagreement() < 16
    assert F.leaky_relu(torch.tensor(-1.0)).item() == pytest.approx(-0.01)  # fastnorm's default slope


def test_shares_of_all_contestants_are_saved() -> None:
    found = json.loads(json.dumps(result(2, torch=8, cudnn=4, clone=1).to_json()))
    forward = found["modes"]["forward"]
    assert forward["floor_share"] == 0.5
    assert forward["floor_share_of"] == {"torch": 0.125, "cudnn": 0.25}
    nbytes = 32 * 64 * 56 * 56 * 2
    assert forward["copy_gb_per_s"] == round(2 * nbytes / 1e-3 * 1e-9, 1)
    assert "floor_share_of" not in result(2, "cpu", torch=8, clone=1).to_json()["modes"]["forward"]


def test_the_lines_of_a_gpu_are_its_own() -> None:
    slow, good = result(2, torch=1.9, clone=1), result(1.6, torch=1.7, clone=1)
    lines = {line.what: line for line in summary_lines([slow, good], ("forward",))}
    assert {what: len(line.misses) for what, line in lines.items()} == {
        "at least 1.0 x torch.nn": 1,
        "forward within 1.67 x the corresponding copies (above cache size)": 1,
    }
    cpu = [line.what for line in summary_lines([result(1, "cpu", torch=2, clone=1)], ("forward",))]
    assert cpu[0] == "at least 1.1 x torch.nn" and "1.3" in cpu[1]


def test_cudnn_has_a_column_where_it_ran() -> None:
    with_cudnn, without = result(2, torch=6, cudnn=3, clone=1), result(2, torch=6, clone=1)
    text = make_table([with_cudnn, without], 200).plain
    assert "cudnn" in text and "1.50x" in text
    assert "cudnn" not in make_table([without], 200).plain
    assert means([with_cudnn, without], "eval")["times_cudnn"] == pytest.approx(1.5)
    assert math.isclose(means([with_cudnn, without], "eval")["times_torch"], 3)
    console = Console(record=True, width=150)
    print_summary(console, [with_cudnn], ("eval",))
    text = console.export_text()
    assert "1.50x cuDNN" in text and "26 GB/s" in text  # 12.8 MB read and written in 1 ms


def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.parse(["--device", "cuda", "--quick", "--compile"]).device == "cuda"
    bench.main(["--device", "cuda", "--quick", "--list"])
    assert "VAE GroupNorm 1x128x20x256x256 bfloat16 planar +silu" in capsys.readouterr().out
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU"):
            bench.main(["--device", "cuda", "--quick"])


def test_compiling_has_a_budget_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes nothing from the time for measuring; after its budget, rows run without it."""
    now, compiled = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench, "race", lambda calls, part, device: dict.fromkeys(calls, Timing(part, part, part, 1)))
    monkeypatch.setattr(bench.torch._dynamo, "reset", lambda: compiled.append(now[0]))

    def compile_slowly(function: object, **options: object) -> object:
        def first_call(*args: object) -> object:
            now[0] += 5
            return function(*args)  # type: ignore[operator]

        return first_call

    monkeypatch.setattr(torch, "compile", compile_slowly)
    rows = [Row(cases.TINY, "float32", "planar", epilogue) for epilogue in cases.EPILOGUES]
    results = list(bench.measure(rows, 30.0, "cpu", ("eval",), True, 8.0))
    assert ["compile" in r.times["eval"] for r in results] == [True, True, False]
    assert compiled == [5.0, 10.0]
    assert [r.seconds("eval") for r in results] == pytest.approx([10.0, 15.0, 30.0])  # no time passes in a race here


def test_an_interruption_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As when a machine that is lent is taken back: the rows before it are printed and saved."""
    race, raced = bench.race, []

    def interrupted(*arguments: Any) -> Any:
        raced.append(arguments)
        if len(raced) == 3:
            raise KeyboardInterrupt
        return race(*arguments)

    monkeypatch.setattr(bench, "race", interrupted)
    path = tmp_path / "bench.json"
    bench.main(["--filter", "tiny.*float32 planar", "--mode", "eval", "--budget", "0.1", "--json", str(path)])
    saved = json.loads(path.read_text())["rows"]
    assert [row["epilogue"] for row in saved] == ["plain", "+relu"]
