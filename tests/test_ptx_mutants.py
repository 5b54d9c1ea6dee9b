"""Every barrier of the kernels is needed, and the interpreter of tests/ptx finds that it is missing: each is taken out
of nvcc's PTX, and small calls are made until one fails or gives other bits."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from tests.common.gang_calls import GangCall, gang_calls
from tests.common.ptx_mutants import Module, family_of
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
NEVER = "no wait leaves so many groups under way"
ALONE = "the thread that arrives for the block is the one that wrote the partial"
SINGLE = "where elements are copied one by one, the barrier that follows the copies orders these writes too"
UNNOTICED = {
    ("fused_forward_rows", "barrier.sync", "sync < exchange < fused_forward_rows"): ALONE,
    ("fused_backward_rows", "barrier.sync", "sync < exchange < fused_backward_rows"): ALONE,
    ("fused_backward_rows", "bar.sync", "sync < fused_backward_rows"): SINGLE,
    ("fused_backward_rows", "bar.warp.sync", "sync < fused_backward_rows"): SINGLE,
    ("fused_backward_columns", "barrier.sync", "finish_fused < fused_backward_columns"): (
        "the last wave has a barrier of the block behind its stores of sums"
    ),
}


def survivors(module: Module) -> tuple[set[str], set[tuple[str, str, str]]]:
    """The families of kernels with barriers that no call launches, and the mutants that no call notices."""
    ptx, launched, found = backend.load(), {}, set()
    for kernel in module.kernels:
        mutants, mine = list(module.mutants(kernel)), [run for run in runs() if kernel in run.kernels]
        if mutants:
            launched[family_of(kernel)] = launched.get(family_of(kernel), False) or bool(mine)
        for mutant in mutants if mine else ():
            ptx.load_text(mutant.text)
            if not any(run.catches() for run in mine):
                found.add((family_of(kernel), mutant.what, module.site(mutant.line)))
        ptx.load_text(module.alone(kernel))
        assert not mine or not mine[0].catches()
    return {family for family, was in launched.items() if not was}, found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file[0])
def test_barriers_are_missed(file: tuple[str, str]) -> None:
    (path,) = ptx_build.build_kernels("sm_90", [file])
    never_launched, found = survivors(Module(path.read_text()))
    assert sorted(never_launched) == []
    assert sorted(mutant for mutant in found if mutant not in UNNOTICED) == []
