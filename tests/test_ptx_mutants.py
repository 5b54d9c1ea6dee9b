"""Every barrier of the kernels is needed, and the interpreter of tests/ptx finds that it is missing: each is taken out of
nvcc's PTX, and small calls are made until one fails or gives other bits."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from tests.common.gang_calls import GangCall, gang_calls
from tests.common.ptx_mutants import Module, family_of
from tests.common.raw_calls import RawCall, mask_bits, same_bits
from tests.conftest import NO_NVCC
from tests.ptx import backend
from tests.ptx import build as ptx_build

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(ptx_build.nvcc() is None, reason=NO_NVCC)]

FILES = (("forward", "float"), ("backward", "float"), ("fold", ""))
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


@functools.cache
def modules() -> list[Module]:
    return [Module(path.read_text()) for path in ptx_build.build_kernels("sm_90", FILES)]


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

FAMILIES = ("fused_forward_rows", "fused_forward_columns", "fused_backward_rows", "fused_backward_columns")
OTHERS = ("reduce_rows", "reduce_columns", "reduce_backward_rows", "reduce_backward_columns", "reduce_elements")


def survivors(family: str) -> tuple[int, list[tuple[str, str, str]]]:
    """The number of mutants of the kernels of a family that any call launches, and those that no call notices."""
    ptx, count, found = backend.load(), 0, []
    for module in modules():
        for kernel in module.kernels:
            mine = [run for run in runs() if kernel in run.kernels]
            if family_of(kernel) != family or not mine:
                continue
            for mutant in module.mutants(kernel):
                count += 1
                ptx.load_text(mutant.text)
                if not any(run.catches() for run in mine):
                    found.append((family, mutant.what, module.site(mutant.line)))
            ptx.load_text(module.alone(kernel))
            assert not mine[0].catches()
    return count, found


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_barriers_are_missed(family: str) -> None:
    count, found = survivors(family)
    assert count > (20 if family in FAMILIES else 0)
    assert sorted({mutant for mutant in found if mutant not in UNNOTICED}) == []
