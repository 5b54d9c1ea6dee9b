"""Kernels read no byte outside their inputs: inputs end, or begin, at a page that may not be touched."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastnorm
from fastnorm import _C
from tests.common.cases import LAYERS, MAPS, PRECISIONS, Case, modes
from tests.common.numerics import build, make_inputs, run

PAGE = mmap.PAGESIZE
# relu keeps a mask for backward, silu the residual.
EPILOGUES = [*((precision, "relu") for precision in (*PRECISIONS[:3], PRECISIONS[5])), (PRECISIONS[1], "silu")]


def guarded(t: Tensor, at_end: bool) -> Tensor:
    """t, dense, with the same strides, in memory of its own between two pages without access.

    at_end: its last byte is next to the upper page; else its first to the lower.
    """
    size = t.numel() * t.element_size()
    room = (size + PAGE - 1) // PAGE * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    start = PAGE + (room - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=start)
    first = flat.data_ptr() - start
    for page in (first, first + room + PAGE):
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(page), PAGE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    return flat.as_strided(t.shape, t.stride()).copy_(t)


def run_all(at_end: bool) -> None:
    """Every small layer, layout and mode with a residual. Prints each before it runs."""
    cpu = torch.device("cpu")
    torch.set_num_threads(1)
    cases = [
        Case(layer, layout, precision, activation, True, mode)
        for layer in (*LAYERS, *MAPS)
        if torch.Size(layer.shape).numel() < 2**15
        for layout in layer.layouts
        for precision, activation in EPILOGUES
        for mode in modes(layer)
    ]
    for case in cases:
        print(case.id, flush=True)
        inputs = make_inputs(case, cpu)
        module = build(case, fastnorm, cpu)
        expected = run(case, build(case, fastnorm, cpu), inputs)
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None and t.is_floating_point():
                held = guarded(t.detach(), at_end)
                setattr(module, name, torch.nn.Parameter(held) if name in module._parameters else held)
        inputs.x, inputs.residual, inputs.grad = (guarded(t, at_end) for t in (inputs.x, inputs.residual, inputs.grad))
        for name, value in run(case, module, inputs).items():
            assert torch.equal(value, expected[name]), name
    print("all", len(cases))


@pytest.mark.parametrize("where", ["end", "begin"])
@pytest.mark.parametrize("capability", _C.cpu_capabilities())
def test_no_access_outside_the_inputs(capability: str, where: str) -> None:
    environment = dict(os.environ, FASTNORM_CPU=capability, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, __file__, where]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, f"exit {done.returncode} in {last}: {done.stderr[-2000:]}"
    assert last and last[0].startswith("all ")


def test_the_guard_bites() -> None:
    """A read one element too far kills the process."""
    code = (
        "import ctypes, torch; from tests import test_bounds; t = test_bounds.guarded(torch.arange(5.), True);"
        "print(t.sum().item(), flush=True); ctypes.string_at(t.data_ptr() + 5 * 4, 1)"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "10.0" and done.returncode < 0


if __name__ == "__main__":
    run_all(sys.argv[1] == "end")
