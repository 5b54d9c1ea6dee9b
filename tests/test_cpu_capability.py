"""FASTNORM_CPU chooses the instruction set at import; each gives the same results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastnorm._C as _C

CAPABILITIES = _C.cpu_capabilities()
RESULTS = """
import sys, torch, fastnorm._C
from tests.common.cases import Case, LAYERS, MAPS, TYPICAL, ACTIVATIONS, PRECISIONS
from tests.common.numerics import build, make_inputs, run
import fastnorm
results = {"": fastnorm._C.cpu_capability()}
cpu = torch.device("cpu")
cases = [Case(l, layout, p, "silu", True) for l in (*LAYERS, *MAPS) for layout in l.layouts for p in PRECISIONS[:3]]
cases += [Case(l, "planar", p, a) for l in (*TYPICAL, MAPS[0]) for a in ACTIVATIONS for p in PRECISIONS]
for case in cases:
    results[case.id] = run(case, build(case, fastnorm, cpu), make_inputs(case, cpu))
torch.save(results, sys.argv[1])
"""


def python(code: str, *args: str, capability: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "FASTNORM_CPU"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    if capability is not None:
        environment["FASTNORM_CPU"] = capability
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Results of every capability of this machine."""
    folder: Path = tmp_path_factory.mktemp("capabilities")
    loaded = {}
    for capability in CAPABILITIES:
        done = python(RESULTS, str(folder / capability), capability=capability)
        assert done.returncode == 0, done.stderr
        loaded[capability] = torch.load(folder / capability)
        assert loaded[capability].pop("") == capability
    return loaded


def test_this_machine_runs_more_than_the_baseline() -> None:
    assert CAPABILITIES and set(CAPABILITIES) <= {"baseline", "avx2", "avx512"}
    assert "baseline" in CAPABILITIES and _C.cpu_capability() in CAPABILITIES
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert "avx2" in CAPABILITIES


def test_results_agree(results: dict[str, dict[str, dict[str, Tensor]]]) -> None:
    """Every capability against the baseline; AVX2 and AVX-512 use the same packs, so the same bits."""
    baseline = results["baseline"]
    for capability, own in results.items():
        for case, quantities in own.items():
            for name, value in quantities.items():
                expected = baseline[case][name]
                scale = max(1.0, float(expected.double().abs().max()))
                eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0
                torch.testing.assert_close(
                    value,
                    expected,
                    rtol=4 * eps,
                    atol=8 * eps * scale,
                    msg=lambda m, w=f"{capability} {case} {name}": f"{w}: {m}",
                )
    if {"avx2", "avx512"} <= results.keys():
        for case, quantities in results["avx512"].items():
            for name, value in quantities.items():
                assert torch.equal(value, results["avx2"][case][name]), f"{case} {name}"


@pytest.mark.parametrize("value", ["sse9", "AVX2 ", "avx-512", "1"])
def test_unknown_capability_is_refused_clearly(value: str) -> None:
    """One sentence: the variable, its value, and what it may be."""
    done = python("import fastnorm", capability=value)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "FASTNORM_CPU" in last and value in last
    assert all(capability in last for capability in CAPABILITIES)


def test_empty_means_automatic() -> None:
    code = "import fastnorm._C as c; print(c.cpu_capability())"
    chosen = {python(code, capability=value).stdout for value in (None, "")}
    assert len(chosen) == 1 and chosen.pop().strip() in CAPABILITIES
