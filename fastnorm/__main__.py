"""`python -m fastnorm`: what is installed, and whether it computes what torch.nn computes. Text for a bug report.

The exit status is 1 when the self-test fails or fastnorm was built for another torch than the one that runs.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastnorm
from fastnorm import _C, plain
from fastnorm.activations import ACTIVATIONS

#: Input dtype -> how far a result may be from torch.nn in float64, as a share of its largest value: a few roundings.
LIMITS: dict[torch.dtype, float] = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 1.5e-3,
}


class Trial(NamedTuple):
    """One layer of the self-test. norm: its class in fastnorm and in torch.nn or fastnorm.plain; shape: the input's."""

    norm: str
    shape: tuple[int, ...]
    arguments: tuple[int, ...]
    options: dict[str, bool] = {}  # noqa: RUF012 (never changed)
    channels_last: bool = False
    activation: str | None = None
    residual: bool = False

    def __str__(self) -> str:
        fused = " + add" * self.residual + (f" + {self.activation}" if self.activation else "")
        layout = " channels_last" * self.channels_last
        return f"{self.norm}{fused} {'x'.join(map(str, self.shape))}{layout}"


class Outcome(NamedTuple):
    """Largest differences from torch.nn, as shares of the largest value; `why` is not empty when the trial failed."""

    forward: float
    backward: float
    why: str


def trials() -> Iterator[Trial]:
    """Every norm in every layout, then two fused ones."""
    affine = {"affine": True}
    yield Trial("BatchNorm1d", (33, 19), (19,))
    yield Trial("InstanceNorm1d", (3, 19, 21), (19,), affine)
    for norm, sizes in (("2d", (9, 7)), ("3d", (3, 5, 7))):
        for last in (False, True):
            yield Trial(f"BatchNorm{norm}", (3, 24, *sizes), (24,), channels_last=last)
            yield Trial(f"InstanceNorm{norm}", (3, 24, *sizes), (24,), affine, channels_last=last)
            yield Trial("GroupNorm", (3, 24, *sizes), (6, 24), channels_last=last)
    yield Trial("LayerNorm", (21, 70), (70,))
    for last in (False, True):
        yield Trial("FrozenBatchNorm2d", (3, 24, 9, 7), (24,), channels_last=last)
        yield Trial("LayerNorm2d", (3, 24, 9, 7), (24,), channels_last=last)
    for last in (False, True):
        yield Trial("BatchNorm2d", (3, 24, 9, 7), (24,), channels_last=last, activation="relu", residual=True)
        yield Trial("GroupNorm", (3, 24, 9, 7), (6, 24), channels_last=last, activation="silu")


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value; infinite where there is a NaN."""
    scale = theirs.abs().max().item() or 1.0
    worst = (ours.double().cpu() - theirs).abs().max().item() / scale
    return worst if worst == worst else float("inf")


def run_trial(trial: Trial, dtype: torch.dtype, device: str = "cpu") -> Outcome:
    """Training step and evaluation of one layer, by fastnorm in `dtype` on `device` and by torch.nn in float64 on the
    CPU, on equal values."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: torch.Size | tuple[int, ...], round_to: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if trial.channels_last:
            values = values.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
        return values.to(round_to)

    theirs = (getattr(nn, trial.norm, None) or getattr(plain, trial.norm))(*trial.arguments, **trial.options).double()
    ours = getattr(fastnorm, trial.norm)(*trial.arguments, **trial.options, activation=trial.activation)
    ours.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(torch.randn(mine.shape, generator=generator))
            reference.copy_(mine)

    inputs = [draw(trial.shape, dtype).to(device).requires_grad_() for _ in range(1 + trial.residual)]
    doubles = [x.detach().double().cpu().requires_grad_() for x in inputs]
    dy = draw(trial.shape, dtype)

    def reference_output() -> Any:
        z = theirs(doubles[0])
        z = z + doubles[1] if trial.residual else z
        return ACTIVATIONS[trial.activation].value(z, 0.0) if trial.activation else z

    y, expected = ours(*inputs), reference_output()
    grads = torch.autograd.grad(y, [*inputs, *ours.parameters()], dy.to(device))
    expected_grads = torch.autograd.grad(expected, [*doubles, *theirs.parameters()], dy.double())
    forward = [(y, expected), *zip(ours.buffers(), theirs.buffers(), strict=True)]
    ours.eval(), theirs.eval()
    with torch.no_grad():
        forward.append((ours(*inputs), reference_output()))
    errors = max(difference(*pair) for pair in forward), max(map(difference, grads, expected_grads))

    why = "" if max(errors) <= LIMITS[dtype] else f"differs by more than {LIMITS[dtype]:.0e}"
    served = fastnorm.explain(inputs[0], ours, *inputs[1:])
    return Outcome(*errors, why or ("" if served.startswith("fastnorm") else served))


def self_test(device: str = "cpu") -> bool:
    """Runs and prints all trials. True if all agree with torch.nn and all were computed by fastnorm's kernels."""
    names = [str(dtype).removeprefix("torch.") for dtype in LIMITS]
    rows = [(str(trial), [run_trial(trial, dtype, device) for dtype in LIMITS]) for trial in trials()]
    width = max(len(label) for label, _ in rows) + 2

    print(
        f"\nSelf-test on {device}: largest difference from torch.nn in float64, forward backward, as a share of the "
        "largest value\n"
    )
    print(" " * width + "".join(f"{name:18}" for name in names).rstrip())
    for label, outcomes in rows:
        cells = [f"{o.forward:.0e} {o.backward:.0e}{' FAIL' * bool(o.why)}" for o in outcomes]
        print(f"{label:{width}}" + "".join(f"{cell:18}" for cell in cells).rstrip())
    print()
    failures = [
        f"FAIL {label} {name}: {outcome.why}"
        for label, outcomes in rows
        for name, outcome in zip(names, outcomes, strict=True)
        if outcome.why
    ]
    print(*failures, f"Self-test on {device}: {'FAILED' if failures else 'all agree'}.", sep="\n")
    return not failures


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def cuda(built: str) -> str:
    """What there is of CUDA, in words. built: build_info's."""
    version, *codes = built.split()
    kernels = f"kernels for {' '.join(codes)} by CUDA {version}" if codes else "no CUDA kernels in this build"
    if not torch.version.cuda:
        return f"{kernels}; torch has no CUDA"
    devices = [
        "{} (sm_{}{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]
    return f"{kernels}; torch has CUDA {torch.version.cuda}, devices: {', '.join(devices) or 'none'}"


def facts(build: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What is installed and what it runs on, line by line."""

    def setting(name: str) -> str:
        return f"{name}={os.environ[name]}" if name in os.environ else f"{name} not set"

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "fastnorm", f"{fastnorm.__version__}, {Path(fastnorm.__file__).parent}"
    yield "built with", f"{build['compiler']}, torch {build['torch']}, for {build['cpu_capabilities']}"
    yield "torch", f"{torch.__version__}, {Path(torch.__file__).parent}"
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()}), {platform.platform()}"
    yield "processor", f"{cpu_model()}, {cores} cores to use"
    available = ", ".join(_C.cpu_capabilities())
    yield "kernels", f"{_C.cpu_capability()} in use of {available}; {setting('FASTNORM_CPU')}"
    yield "threads", f"{torch.get_num_threads()}; {setting('OMP_NUM_THREADS')}"
    yield "CUDA", cuda(build["cuda"])
    yield "fallbacks", f"{setting('FASTNORM_STRICT')}; {setting('FASTNORM_LOG')}"


def main() -> int:
    build: dict[str, Any] = _C.build_info()
    for name, text in facts(build):
        print(f"{name:12}{text}")
    matches = build["torch"] == torch.__version__
    if not matches:
        print(
            f"\nWARNING: fastnorm was built for torch {build['torch']}, and {torch.__version__} runs: "
            "install it again (`pip install --no-build-isolation --force-reinstall --no-deps .`)."
        )
    devices = ["cpu"] + ["cuda"] * (build["cuda"] != "none" and torch.cuda.is_available())
    agree = [self_test(device) for device in devices]
    if refused := _C.refused_gangs():
        print(f"The GPU refused {refused} fused launches (it is shared or partitioned): others served their calls.")
    return 0 if all(agree) and matches else 1


if __name__ == "__main__":
    sys.exit(main())
