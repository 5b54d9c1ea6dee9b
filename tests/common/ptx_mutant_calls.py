"""Calls that reach the barriers of the CUDA kernels, and what each gives and executes: for the mutants of their PTX.

The compiler copies a loop with its waits for every activation, and for calls that want dx alone."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator

import torch

from tests.common.cases import ACTIVATIONS, Case, Layer
from tests.common.gang_calls import FEW, FUSED, LAYERS, LONG, GangCall, Table, gang_calls
from tests.common.raw_calls import RawCall, mask_bits, same_bits
from tests.ptx import backend

FLOAT32 = (("float32", "float32"),)
ALL = tuple((activation, False) for activation in ACTIVATIONS)
# One epilogue whose kernels are smooth, and one whose are not.
TWO = (("relu", True), ("silu", True))

# No device has so much: pieces are so long that with 512 threads every group of copies has something.
HUGE = dataclasses.replace(FEW, shared_per_sm=1 << 20, shared_per_block=1020 << 10)
LONG_PIECES: Table = (
    (
        Layer("", "LayerNorm", (3, 25000), (25000,)),
        Layer("", "InstanceNorm2d", (1, 2, 125, 200), (2,)),
        Layer("", "GroupNorm", (1, 50, 20, 25), (1, 50)),
        Layer("", "BatchNorm1d", (3300, 8), (8,)),
        Layer("", "BatchNorm1d", (400, 21), (21,)),
        Layer("", "LayerNorm2d", (1, 3300, 1, 8), (3300,)),
        Layer("", "LayerNorm2d", (1, 900, 1, 7), (900,)),
    ),
    FUSED[:2],
    HUGE,
)
# Rows of every number of packs to a thread.
REGISTERS = ({"strategy": "fused", "place": "registers"},)
ROWS: Table = (
    (
        *(
            Layer("", "LayerNorm", (count, size), (size,))
            for count, size in ((90, 40), (40, 256), (20, 600), (9, 2048))
        ),
        *(Layer("", "LayerNorm", (count, size), (size,)) for count, size in ((5, 4096), (3, 8192))),
        *(layer for layer in LAYERS if not layer.norm.startswith("Batch")),
    ),
    REGISTERS,
    FEW,
)
LONG_ROWS: Table = (tuple(Layer("", "LayerNorm", (5, size), (size,)) for size in (8000, 13000)), FUSED[:2], HUGE)
# Several teams to a block.
MANY_ROWS: Table = (tuple(Layer("", "LayerNorm", (90, size), (size,)) for size in (40, 41)), FUSED, FEW)
# Pieces of which a part is staged and the rest read twice. Backward has none of a smooth activation.
REREAD = Layer("", "BatchNorm1d", (9000, 8), (8,))
REREADS = tuple(
    {"strategy": "fused", "gang": "grid", "exchange": exchange, "staged_length": 3300, "pieces": 2}
    for exchange in ("gather", "scatter")
)


@dataclasses.dataclass
class Run:
    """One direction of a call, and what it gives."""

    call: GangCall
    raw: RawCall
    saved: tuple[torch.Tensor, torch.Tensor] | None
    """Stats and mask, which backward takes; None: forward."""
    dresidual: bool = True
    expected: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    issued: dict[str, list[tuple[str, int]]] = dataclasses.field(default_factory=dict)
    """By kernel."""
    seconds: float = 0

    def again(self) -> dict[str, torch.Tensor]:
        with backend.load().configured("random", 1, self.call.device, forced=self.call.forced):
            if self.saved is not None:
                return self.raw.backward(*self.saved, output_mask=(True, True, self.dresidual))
            results = self.raw.forward()
        return results | {"mask": mask_bits(results["mask"], self.raw.shape)}

    def catches(self) -> bool:
        try:
            return bool(same_bits(self.again(), self.expected))
        except torch.AcceleratorError:
            return True


def calls() -> Iterator[GangCall]:
    """With a plan in both directions."""
    for epilogue in TWO:
        yield from gang_calls(FLOAT32, (epilogue,))
        yield from gang_calls(FLOAT32, (epilogue,), (MANY_ROWS,))
        yield from gang_calls(FLOAT32, ((epilogue[0], False),), (LONG,))
    for epilogue in ALL:
        yield from gang_calls(FLOAT32, (epilogue,), (LONG_PIECES, LONG_ROWS, ROWS, ((REREAD,), REREADS, HUGE)))


def forward_alone() -> Iterator[GangCall]:
    for activation in ACTIVATIONS:
        for forced in REREADS:
            call = GangCall(Case(REREAD, "planar", FLOAT32[0], activation), forced, HUGE)
            if not call.is_served():
                yield call


@functools.cache
def runs(backward: bool) -> list[Run]:
    """The quick ones first."""
    ptx, found = backend.load(), []

    def add(run: Run) -> None:
        ptx.reset_counters()
        start = time.process_time()
        run.expected = run.again()
        run.seconds = time.process_time() - start
        run.issued = {kernel: ptx.issued(kernel) for kernel in set(ptx.launched())}
        found.append(run)

    for call in calls():
        raw = call.raw()
        if not backward:
            add(Run(call, raw, None))
            continue
        with ptx.configured(device=call.device, forced=call.forced):
            forward = raw.forward()
        saved = forward["stats"], forward["mask"]
        add(Run(call, raw, saved))
        if not call.case.residual and call.case.activation is not None:
            add(Run(call, raw, saved, dresidual=False))
    for call in () if backward else forward_alone():
        add(Run(call, call.raw(), None))
    return sorted(found, key=lambda run: run.seconds)
