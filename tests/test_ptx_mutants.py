"""Every barrier of the kernels is needed, and the interpreter of tests/ptx finds that it is missing: each is taken out
of nvcc's PTX, in every kernel, and the small calls that reach it are made until one fails or gives other bits."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import pytest

from tests.common.ptx_mutant_calls import runs
from tests.common.ptx_mutants import Module, Mutant, family_of, site_of
from tests.conftest import NO_NVCC
from tests.emulator.build import kernel_files
from tests.ptx import backend
from tests.ptx import build as ptx_build

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(ptx_build.nvcc() is None, reason=NO_NVCC)]

FILES = tuple((name, dtype) for name, dtype in kernel_files() if dtype in ("float", ""))


@dataclasses.dataclass(frozen=True)
class Excuse:
    """What no call notices, or none reaches, and why it cannot matter. Regular expressions, but for count."""

    kernel: str
    """The family, and the arguments of its template, mangled: "fused_forward_rows Li1E"."""
    what: str
    site: str
    """The innermost functions that the instruction lies in."""
    count: int
    """The most of them in one kernel."""
    why: str


ONCE = "a block of these calls takes one item; tests/emulator/drive_kernels.cpp has blocks that take several"
SINGLE = "single elements: a wave's threads meet anyway once its copies have landed"
GATHERED = "cooperative groups meets before it releases, and the block has met since it stored what others read"
UNNOTICED = (
    Excuse("reduce_columns", r"bar\.sync", "reduce_columns <", 1, ONCE),
    Excuse("reduce_backward_columns", r"bar\.sync", "store_sums <", 1, ONCE),
    Excuse("reduce_backward_rows", r"bar\.sync", "sum_team <", 1, ONCE),
    Excuse("reduce_elements", r"bar\.sync", "sum_team <", 1, ONCE),
    Excuse("reduce_elements", r"bar\.sync", "store_sums <", 1, ONCE),
    Excuse("fused_backward_rows Li1E", r"bar\.sync|bar\.warp\.sync", "sync < fused_backward_rows", 2, SINGLE),
    Excuse("fused_backward_rows Li1E", r"bar\.sync", "sum_team <", 1, SINGLE),
    Excuse("fused_backward_columns", r"barrier\.sync", "finish_fused <", 1, GATHERED),
    Excuse("backward_positions", r"barrier\.sync", "backward_positions$", 1, GATHERED),
    Excuse(
        "fused_(forward|backward)_rows Li.E",
        r"barrier\.sync|bar\.sync",
        "sync < exchange <",
        2,
        "the block meets before it releases, and the thread that releases is the one that has published",
    ),
    Excuse(
        "fused_(forward|backward)_(rows|columns)",
        r"barrier\.sync",
        "begin <",
        2,
        "the thread that clears a gang's counter is the one that counts its block's arrivals",
    ),
)
GRIDS = "the planner scatters and rereads in grids alone"
GANGS = "no call has several waves of several gangs of columns; rows meet by the same lines, and reach them"
UNREACHED = (
    Excuse(
        "fused_(forward|backward)_columns Li.ELb.ELb0E", r"barrier\.cluster", "sync < exchange_channels <", 1, GRIDS
    ),
    Excuse(
        "fused_(forward|backward)_columns Li4ELb.ELb1E", r"barrier\.cluster", "sync < exchange_channels <", 2, GRIDS
    ),
    Excuse("fused_(forward|backward)_columns Li4ELb.ELb1E", r"barrier\.cluster", "exit <", 1, GRIDS),
    Excuse("fused_(forward|backward)_columns", r"(atom|ld)\..*\.gpu|bar\.sync", "sync < exchange_channels <", 8, GANGS),
    Excuse("fused_(forward|backward)_columns", r"(atom|ld)\..*\.gpu|barrier\.sync", "begin <", 4, GANGS),
    Excuse(
        "fused_(forward|backward)_columns Li4ELb.ELb1E",
        r"cp\.async\.wait_group [4-7]",
        "",
        24,
        "plans that reread have one stage, after which three groups at most are under way",
    ),
    Excuse(
        "(fused_backward_(rows|columns)|backward_positions) Li4ELb0E",
        r"cp\.async\.wait_group [0-7]",
        "",
        8,
        "the loop for no activation and other than dx alone: a fused backward without activation wants dx alone",
    ),
)
# Forward moves the running statistics; the emulator's drive takes this kernel.
NOT_LAUNCHED = {"update_running"}


def described(module: Module, mutant: Mutant) -> tuple[str, str, str]:
    """As an Excuse names it."""
    arguments = re.search(r"I[fd]((?:L[ib]\d+E)+)", mutant.kernel)
    wait = re.search(r"wait_group\s+\d+", module.lines[mutant.line - 1])
    what = f"cp.async.wait_group {wait[0].split()[1]}" if wait else mutant.what
    return (
        f"{family_of(mutant.kernel)} {arguments[1] if arguments else ''}".strip(),
        what,
        site_of(module.places(mutant.line)),
    )


def not_excused(module: Module, mutants: list[Mutant], excuses: tuple[Excuse, ...]) -> list[str]:
    """An excuse is for so many instructions of a kernel, and for no more."""
    left, used = [], Counter[tuple[str, Excuse]]()
    for mutant in mutants:
        kernel, what, site = described(module, mutant)
        for excuse in excuses:
            fits = (re.match(excuse.kernel, kernel), re.fullmatch(excuse.what, what), re.match(excuse.site, site))
            if all(fits) and used[mutant.kernel, excuse] < excuse.count:
                used[mutant.kernel, excuse] += 1
                break
        else:
            left.append(f"{kernel}: {what} in line {mutant.line}, {site}")
    return left


# tests/test_emulator.py takes out the barriers of backward in every run: one of a line, not one of each of its copies.
@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=[pytest.mark.whole] * file[0].startswith("backward")) for file in FILES],
    ids=[file[0] for file in FILES],
)
def test_barriers_are_missed(file: tuple[str, str]) -> None:
    """Those of every kernel, and of every copy that the compiler has made of a line."""
    ptx, (path,) = backend.load(), ptx_build.build_kernels("sm_90", [file])
    module = Module(path.read_text())
    unnoticed: list[Mutant] = []
    unreached: list[Mutant] = []
    for kernel in module.kernels:
        mutants = list(module.mutants(kernel))
        if not mutants or family_of(kernel) in NOT_LAUNCHED:
            continue
        launched = [run for run in runs(backward="backward" in file[0]) if kernel in run.issued]
        assert launched, f"no call launches {kernel}"
        mine = [(run, module.reached(kernel, run.issued[kernel])) for run in launched]
        for mutant in mutants:
            reaching = [run for run, lines in mine if mutant.line in lines]
            if not reaching:
                unreached.append(mutant)
                continue
            ptx.load_text(mutant.text)
            if not any(run.catches() for run in reaching):
                unnoticed.append(mutant)
        ptx.load_text(module.alone(kernel))
        assert not launched[0].catches()
    assert not_excused(module, unreached, UNREACHED) == [], "reached by no call"
    assert not_excused(module, unnoticed, UNNOTICED) == [], "missed by no call"
