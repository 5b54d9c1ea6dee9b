"""Fixtures of every test: backends, strictness, seeds, thread count.

pytest tests                        cpu; cuda where it is; emulated: the CUDA kernels without a GPU
pytest tests --backend cuda         the tests that take a backend, on that one alone; may be given more than once

A test with the fixture `backend` or `device` runs on the CPU and on CUDA; with the mark `emulated` (MARKERS), on the
emulated devices too. The suite is strict: where torch's operators answer in place of the kernels, the call raises,
except in tests marked `fallback`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

# fastnorm reads this on import; so do the programs that tests start.
os.environ["FASTNORM_STRICT"] = "1"

from fastnorm import _C, dispatch
from tests.common.cases import Case, parity_cases, thinned
from tests.emulator import backend as emulator

# One, because the tensors are small: with two, waiting for the other core of a busy machine takes most of the time.
# test_threads.py varies the number.
THREADS = 1

OPS = ("norm_forward", "batch_norm_forward_", "norm_backward", "update_running_stats_", "moments")

# Names in tests/emulator/device.h. On an H200 plans fuse these small sets; on the tiny device they split them.
EMULATED_DEVICES = ("h200", "tiny")


@dataclasses.dataclass(frozen=True)
class Backend:
    """Where the kernels of a test run. name: "cpu", "cuda" or "emulated"; plays: the device that an emulated one is."""

    name: str
    device: torch.device
    plays: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}_{self.plays}" if self.plays else self.name

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside the context, calls on `device` run on this backend."""
        if self.name != "emulated":
            yield
            return
        with emulator.load().configured(device=self.plays), emulated_kernels():
            yield


@contextlib.contextmanager
def emulated_kernels() -> Iterator[None]:
    """torch.ops.fastnorm calls torch.ops.fastnorm_emulated for tensors on the CPU."""
    with torch.library._scoped_library("fastnorm", "IMPL") as library:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name in OPS:
                kernel = getattr(torch.ops.fastnorm_emulated, name).default
                library.impl(name, kernel, "CPU", allow_override=True)
        yield


CPU = Backend("cpu", torch.device("cpu"))
CUDA = Backend("cuda", torch.device("cuda"))
EMULATED = tuple(Backend("emulated", torch.device("cpu"), plays) for plays in EMULATED_DEVICES)


def has_cuda() -> bool:
    """Whether fastnorm was built with CUDA and there is a device."""
    return _C.build_info().get("cuda", "none") != "none" and torch.cuda.is_available()


def thinned_cases() -> dict[str, set[Case]]:
    """The part of the parity table that each emulated device runs."""
    return {plays: set(thinned(parity_cases(), start=3 * i)) for i, plays in enumerate(EMULATED_DEVICES)}


MARKERS = {
    "cuda": "runs on CUDA alone; skipped where there is no GPU",
    "emulated": "runs on the emulated devices too",
    "not_emulated(reason)": "does not, though its module is marked emulated",
    "emulator": "drives the emulated kernels itself; --backend emulated runs it too",
    "fallback": "expects torch's operators to answer: FASTNORM_STRICT is off",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", action="append", choices=("cpu", "cuda", "emulated"), help="default: all there are")


def chosen_backends(config: pytest.Config) -> list[Backend]:
    names = config.getoption("--backend")
    if names is None:
        return [CPU, *([CUDA] if has_cuda() else []), *EMULATED]
    if "cuda" in names and not has_cuda():
        raise pytest.UsageError("--backend cuda: fastnorm was built without CUDA, or torch sees no GPU")
    return [b for b in (CPU, CUDA, *EMULATED) if b.name in names]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    emulated = "emulated" in marks and "not_emulated" not in marks
    backends = [b for b in chosen_backends(metafunc.config) if b.name != "emulated" or emulated]
    metafunc.parametrize("backend", backends, ids=[b.id for b in backends], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drops the cases of the parity table that the emulated devices leave out; with --backend, also the tests that run
    on another backend. A test that names no backend counts as one of the cpu."""
    chosen = {backend.name for backend in chosen_backends(config)}
    kept = thinned_cases()

    def wanted(item: pytest.Item) -> bool:
        if item.get_closest_marker("cuda") is not None:
            if not has_cuda():
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and fastnorm built for it"))
            return "cuda" in chosen or config.getoption("--backend") is None
        if not isinstance(item, pytest.Function) or "backend" not in item.fixturenames:
            return "cpu" in chosen or ("emulated" in chosen and item.get_closest_marker("emulator") is not None)
        params = item.callspec.params
        backend = params["backend"]
        if not isinstance(backend, Backend):  # an empty set of them
            return False
        in_table = item.originalname == "test_values" and "case" in params
        return backend.name != "emulated" or not in_table or params["case"] in kept[backend.plays]

    items[:] = [item for item in items if wanted(item)]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend: Backend = request.param
    with backend.active():
        yield backend


@pytest.fixture
def device(backend: Backend) -> torch.device:
    return backend.device


@pytest.fixture(autouse=True)
def strictness(request: pytest.FixtureRequest) -> None:
    """Switches strict mode off in a test marked `fallback`, and in the programs that it starts. With fallback(reason),
    a regular expression, a call that is left to torch for another reason fails the test."""
    marker = request.node.get_closest_marker("fallback")
    if marker is None:
        return
    monkeypatch = request.getfixturevalue("monkeypatch")
    monkeypatch.setattr("fastnorm.dispatch.strict", False)
    monkeypatch.delenv("FASTNORM_STRICT")
    if marker.args:
        (reason,) = marker.args

        def fall_back(name: str, error: Exception, unfused: Callable[[], Any], real: Any = dispatch.fall_back) -> Any:
            result = real(name, error, unfused)  # what torch rejects, too, is no fallback
            if not re.search(reason, str(error)):
                pytest.fail(f"{name} was left to torch: {error}; this test expects {reason!r}")
            return result

        for module in ("dispatch", "functional"):
            monkeypatch.setattr(f"fastnorm.{module}.fall_back", fall_back)


@pytest.fixture(autouse=True)
def no_launch_refused() -> Iterator[None]:
    """On a GPU, the plans that tests were written for are those that ran. (The emulator counts its own refusals.)"""
    before = _C.refused_gangs()
    yield
    assert _C.refused_gangs() == before, "the GPU refused launches, and slower plans ran in their place"


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from the same seed, thread count and default dtype."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)
    torch.set_default_dtype(torch.float32)
