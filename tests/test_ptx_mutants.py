"""Every barrier of the kernels is needed, and the interpreter of tests/ptx finds that it is missing: each is taken out
of nvcc's PTX, and small calls are made until one fails or gives other bits."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from tests.common.gang_calls import GangCall, gang_calls
from tests.common.ptx_mutants import Module, family_of, site_of
from tests.common.raw_calls import RawCall, mask_bits, same_bits
from tests.conftest import NO_NVCC
from tests.emulator.build import kernel_files
from tests.ptx import backend
from tests.ptx import build as ptx_build

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(ptx_build.nvcc() is None, reason=NO_NVCC)]

FILES = tuple((name, dtype) for name, dtype in kernel_files() if dtype in ("float", ""))
FLOAT32 = (("float32", "float32"),)
# One epilogue whose kernels are smooth, and one whose are not.
EPILOGUES = (("relu", True), ("silu", True))


@dataclasses.dataclass
class Run:
    """One direction of a call, and what it gives."""

    call: GangCall
    raw: RawCall
    saved: tuple[torch.Tensor, torch.Tensor] | None
    """Stats and mask, which backward takes."""
    expected: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    kernels: set[str] = dataclasses.field(default_factory=set)

    def again(self) -> dict[str, torch.Tensor]:
        with backend.load().configured("random", 1, self.call.device, forced=self.call.forced):
            results = self.raw.forward() if self.saved is None else self.raw.backward(*self.saved)
        if "mask" in results:
            results["mask"] = mask_bits(results["mask"], self.raw.shape)
        return results

    def catches(self) -> bool:
        try:
            return bool(same_bits(self.again(), self.expected))
        except torch.AcceleratorError:
            return True


@functools.cache
def runs() -> list[Run]:
    ptx, found = backend.load(), []

    def add(run: Run) -> dict[str, torch.Tensor]:
        ptx.reset_counters()
        run.expected = run.again()
        run.kernels = set(ptx.launched())
        found.append(run)
        return run.expected

    for epilogue in EPILOGUES:
        for call in gang_calls(FLOAT32, (epilogue,)):
            raw = call.raw()
            add(Run(call, raw, None))
            with ptx.configured(device=call.device, forced=call.forced):
                saved = raw.forward()
            add(Run(call, raw, (saved["stats"], saved["mask"])))
    return found


# What no call notices, and why it cannot matter: the kernel, the instruction, the functions that it lies in.
ONCE = "a block of these calls takes one item; tests/emulator/drive_kernels.cpp has blocks that take several"
UNNOTICED = {
    ("reduce_columns", "bar.sync", "reduce_columns < for_columns < reduce_columns"): ONCE,
    (
        "reduce_backward_columns",
        "bar.sync",
        "store_sums < reduce_backward_columns < for_columns < reduce_backward_columns",
    ): ONCE,
    ("reduce_backward_rows", "bar.sync", "sum_team < sum_rows < for_rows < sum_rows < reduce_backward_rows"): ONCE,
    ("reduce_elements", "bar.sync", "sum_team < sum_rows < for_rows < sum_rows < reduce_elements"): ONCE,
    ("reduce_elements", "bar.sync", "store_sums < sum_params < for_columns < sum_params < reduce_elements"): ONCE,
}
NOT_LAUNCHED = {"update_running"}  # forward moves the running statistics; the emulator's drive takes this kernel


def check(module: Module) -> tuple[set[str], set[tuple[str, str, str]]]:
    """The families of kernels with barriers that no call launches, and the barriers that no call misses: in no kernel
    of the family, where kernels are its instantiations, and in no copy."""
    ptx, launched, missed = backend.load(), {}, {}
    for turn, kernel in enumerate(module.kernels):
        copies, mine = module.copies(kernel), [run for run in runs() if kernel in run.kernels]
        family = family_of(kernel)
        if copies:
            launched[family] = launched.get(family, False) or bool(mine)
        for (what, places), alike in copies.items() if mine else ():
            barrier = (family, what, site_of(places), places[:1])
            for mutant in alike[turn % len(alike) :] + alike[: turn % len(alike)]:
                if missed.get(barrier):
                    break
                ptx.load_text(mutant.text)
                missed[barrier] = any(run.catches() for run in mine)
        ptx.load_text(module.alone(kernel))
        assert not mine or not mine[0].catches()
    found = {(family, what, site) for (family, what, site, _), was in missed.items() if not was}
    return {family for family, was in launched.items() if not was}, found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file[0])
def test_barriers_are_missed(file: tuple[str, str]) -> None:
    (path,) = ptx_build.build_kernels("sm_90", [file])
    never_launched, found = check(Module(path.read_text()))
    assert sorted(never_launched - NOT_LAUNCHED) == []
    assert sorted(barrier for barrier in found if barrier not in UNNOTICED) == []
