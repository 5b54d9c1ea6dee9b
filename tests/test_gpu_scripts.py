"""What tests/gpu does on a machine with a GPU, as far as that can be known without one: the order and the budgets of
run.sh, with stand-ins for Python and compute-sanitizer; the gangs that sanitize.py has watched; the grids of
stress.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnorm import _C
from tests.common.cases import LAYOUTS, Case, Layer, to_layout
from tests.common.plan_model import DEVICES
from tests.emulator import backend as emulator
from tests.gpu import first, sanitize, stress

GPU = Path(__file__).parent / "gpu"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

# Answers run.sh's questions, and plays setup.py, pytest and the scripts: SLOW and BROKEN name what takes long or fails.
PYTHON = """#!/bin/bash
case "$1" in
    -c) case "$2" in *capability*) echo 9.0 ;; *get_device_name*) echo a GPU ;; esac; exit 0 ;;
    -m) what="$2 $*" ;;
    *) what="$*" ;;
esac
echo "ran $what"
[ -n "$SLOW" ] && [[ "$what" =~ $SLOW ]] && sleep 60
[ -n "$BROKEN" ] && [[ "$what" =~ $BROKEN ]] && exit 3
exit 0
"""
# Writes help of a megabyte, with what is looked for at its beginning.
SANITIZER = """#!/bin/bash
if [ "$1" = --help ]; then
    echo "  --kernel-name arg"
    echo "  --check-api-memory-access arg"
    for i in $(seq 20000); do echo "  --option-$i arg   of the tool, which takes some words to explain"; done
    exit 0
fi
echo "sanitizer $*"
echo "========= ERROR SUMMARY: 0 errors"
while [ "$1" != gpu/sanitize.py ]; do python=$1; shift; done
"$python" "$@"
"""


# Takes environment variables; gives the exit status, what was printed, and the log.
Run = Callable[..., tuple[int, str, str]]


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def run_script(tmp_path: Path) -> Run:
    python = executable(tmp_path / "python", PYTHON)
    sanitizer = executable(tmp_path / "sanitizer", SANITIZER)

    def run(**env: str) -> tuple[int, str, str]:
        own = {
            "PYTHON": str(python),
            "SANITIZER": str(sanitizer),
            "OUT": str(tmp_path / "out"),
            "SLOW": "",
            "BROKEN": "",
        }
        cleared = {key: value for key, value in os.environ.items() if key not in ("STAGES", "TOTAL", "BENCH_ARGS")}
        done = subprocess.run(
            [str(GPU / "run.sh")], env={**cleared, **own, **env}, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout + done.stderr, (tmp_path / "out" / "gpu-log.txt").read_text()

    return run


def stages_of(log: str) -> list[str]:
    return re.findall(r"^==== (\w+): ", log, re.MULTILINE)


def verdicts(printed: str) -> dict[str, str]:
    """The table's second column."""
    return dict(re.findall(r"^(\w+) +(passed|failed \(\d+\)|out of time|not started) +\d+ s", printed, re.MULTILINE))


def test_what_is_done_and_in_which_order(run_script: Run) -> None:
    """The build and the first launches alone, then the checks side by side; the benchmarks have a call of their own."""
    status, printed, log = run_script()
    order = ["build", "first", *SANITIZERS, "stress", "cuda", "suite", "compile"]
    assert stages_of(log) == order and verdicts(printed) == dict.fromkeys(order, "passed")
    assert status == 0, printed
    assert "--ignore test_compile.py" in re.findall("==== suite: .*", log)[0]


def test_every_test_of_cuda_alone_runs_and_the_large_ones_in_turn(run_script: Run) -> None:
    _, _, log = run_script(STAGES="cuda")
    (command,) = re.findall("==== cuda: .*", log)
    marked = {path.name for path in GPU.parent.glob("test_*.py") if "pytest.mark.cuda\n" in path.read_text()}
    assert {"test_cuda_large.py", "test_ops.py"} < marked <= set(command.split())
    assert command.endswith("-n 4 --dist loadfile -m cuda") and "--durations 5" in command


def test_only_our_kernels_are_watched(run_script: Run) -> None:
    """However much help the tool writes."""
    _, _, log = run_script(STAGES="memcheck synccheck")
    assert log.count("--kernel-name kns=fastnorm") == 4  # the command, and the stand-in's echo
    assert "check-api-memory-access" not in log


def test_initcheck_leaves_copies_alone(run_script: Run) -> None:
    """Their source may be what a kernel of torch wrote, which nobody watched."""
    _, _, log = run_script(STAGES="initcheck")
    assert log.count("--check-api-memory-access no") == 2


def test_benchmarks_have_a_call_of_their_own(run_script: Run) -> None:
    status, _, log = run_script(STAGES="bench", BENCH_ARGS="--quick --mode eval")
    assert status == 0 and stages_of(log) == ["bench"]
    assert "--quick --mode eval --budget 60" in log


@pytest.mark.parametrize(
    ("broken", "failed"),
    [
        ("gpu/first.py", {"first"}),
        ("gpu/sanitize.py", set(SANITIZERS)),
        ("gpu/stress.py", {"stress"}),
        ("-m cuda", {"cuda"}),
    ],
)
def test_a_failure_is_told_and_the_rest_runs(broken: str, failed: set[str], run_script: Run) -> None:
    status, printed, log = run_script(BROKEN=broken)
    assert {name for name, verdict in verdicts(printed).items() if verdict == "failed (3)"} == failed
    assert status == 1 and stages_of(log)[-1] == "compile"


def test_no_stage_takes_more_than_its_time(run_script: Run) -> None:
    status, printed, _ = run_script(SLOW="gpu/first.py", TOTAL="12", STAGES="first memcheck suite")
    found = verdicts(printed)
    assert status == 1 and found["first"] == "out of time" and found["memcheck"] == found["suite"] == "not started"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_shellcheck() -> None:
    done = subprocess.run(["shellcheck", "-e", "SC2012", str(GPU / "run.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---- first.py, sanitize.py and stress.py ----


def kinds(grid: _C.Grid) -> tuple[str, str, int, str]:
    items = -(-grid.items // (grid.threads_y if grid.traversal == "rows" else 1))
    return grid.traversal, grid.gang, grid.stages, "waves" if items > grid.blocks else "a wave"


@pytest.mark.parametrize("name", ["H100", "H200", "A100"])
def test_the_sanitizers_watch_gangs_first(name: str) -> None:
    """A third of the cases, and both directions of every kind of gang in several waves."""
    facts = DEVICES[name]
    cases = sanitize.all_cases(facts)
    forced = [case for case in cases if case.forced]
    assert cases[: len(forced)] == forced and 0.25 < len(forced) / len(cases) < 0.4
    assert cases == sanitize.all_cases(facts)  # in the same order every time
    seen, sizes = (set(), set()), set()
    for case in forced:
        plans = case.plans(facts)
        assert plans is not None
        for which, grid in zip(seen, (plans[0].grid, plans[1].reduce), strict=True):
            which.add(kinds(grid))
            sizes.add((grid.gang, grid.pieces))
    traversals, clusters = ("rows", "columns"), facts.largest_cluster > 1
    wanted = {(t, "grid", stages, "waves") for t in traversals for stages in (1, 2)}
    wanted |= {(t, "cluster", 2, "waves") for t in traversals} | {(t, "cluster", 1, "a wave") for t in traversals}
    for which in seen:
        assert {kind for kind in wanted if clusters or kind[1] == "grid"} <= which
    assert not clusters or {("cluster", pieces) for pieces in (2, 5, 16)} <= sizes


@pytest.mark.emulator
@pytest.mark.parametrize("precision", [("bfloat16", "float32"), ("float32", "float32")], ids=str)
def test_masks_are_compared_by_what_they_mean(precision: tuple[str, str]) -> None:
    """The CPU's bits have another order here. Bits of the wrong side are told, and so are wrong gradients."""
    layer = Layer("", "BatchNorm2d", (9, 4, 7, 7), (4,))
    case, cpu = Case(layer, "planar", precision, "relu", residual=True), torch.device("cpu")
    emulator.load()
    kernels = torch.ops.fastnorm_emulated

    def wrong_forward(*args: Any) -> tuple[Tensor, ...]:
        y, stats, mask = kernels.norm_forward(*args)
        mask[0] ^= 0xFF
        return y, stats, mask

    def wrong(forward: Any = kernels.norm_forward, backward: Any = kernels.norm_backward) -> str:
        operators = SimpleNamespace(norm_forward=forward, norm_backward=backward)
        return " ".join(sanitize.check(case, cpu, operators))

    assert wrong() == ""
    assert "mask: 8 elements on the wrong side" in wrong(forward=wrong_forward)
    assert "dx: " in wrong(backward=lambda dy, *args: kernels.norm_backward(2 * dy, *args))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_no_kernel_of_torch_copies_what_the_sanitizers_see_read(activation: str | None, layout: str) -> None:
    """What has x's layout goes to our kernels as it is."""
    case = Case(Layer("", "BatchNorm2d", (3, 5, 4, 3), (5,)), layout, activation=activation, residual=True)
    kernels, strides = torch.ops.fastnorm, []

    def watched(name: str) -> Any:
        def call(*args: Any) -> Any:
            strides.extend(a.stride() for a in args if isinstance(a, Tensor) and a.dim() == 4)
            return getattr(kernels, name)(*args)

        return call

    operators = SimpleNamespace(norm_forward=watched("norm_forward"), norm_backward=watched("norm_backward"))
    assert sanitize.check(case, torch.device("cpu"), operators) == []
    assert set(strides) == {to_layout(torch.empty(3, 5, 4, 3), layout).stride()}


@pytest.mark.parametrize("name", ["T4", "A100", "H100", "H200", "B200"])
def test_grids_of_the_stress_differ_and_want_the_whole_device(name: str) -> None:
    facts = DEVICES[name]
    found = [blocks for case in stress.CASES if (blocks := stress.blocks_of(case, facts))]
    assert len(set(found)) > 2
    assert all(2 * blocks > facts.num_sms for both in found for blocks in both)


@pytest.mark.parametrize("printed", [b"grids: (1, 2)\niteration 300\n", b""])
def test_a_hang_is_told(printed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **options: float) -> None:
        raise subprocess.TimeoutExpired("stress.py", options["timeout"], printed)

    monkeypatch.setattr(subprocess, "run", hang)
    monkeypatch.setattr("sys.argv", ["stress.py", "--seconds", "7"])
    expected = "HANG: 7 s are over, and nothing came after: " + ("iteration 300" if printed else "the start")
    with pytest.raises(SystemExit, match=expected):
        stress.main()


def test_the_first_launches_are_of_every_kind() -> None:
    """Clusters of the largest size too, and clusters that sync as a cooperative grid."""
    found = {}
    for name, pieces in first.GANGS.items():
        plans = first.gang_case(name, pieces).plans(DEVICES["H200"])
        assert plans is not None and plans[1].grid_sync
        found[name] = {(grid.gang, grid.pieces) for grid in (plans[0].grid, plans[1].reduce)}
    assert found == {
        "block": {("block", 1)},
        "cluster": {("cluster", 2)},
        "large cluster": {("cluster", 16)},
        "grid": {("grid", 2)},
    }
