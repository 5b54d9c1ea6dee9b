"""Fixtures of every test: backends, strictness, seeds, thread count.

pytest tests                        cpu; cuda where it is; and the CUDA kernels without a GPU: emulated, which compiles
                                    them for the CPU; ptx, which executes what nvcc makes of them, for a part of the
                                    parity table
pytest tests --backend cuda         the tests that take a backend, on that one alone; may be given more than once

A test with the fixture `backend` or `device` runs on the CPU and on CUDA; with the mark `emulated` (MARKERS), on the
devices of `emulated` and `ptx` too. The suite is strict: where torch's operators answer in place of the kernels, the
call raises, except in tests marked `fallback`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import warnings
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import torch

# fastnorm reads this on import; so do the programs that tests start.
os.environ["FASTNORM_STRICT"] = "1"

from fastnorm import _C, dispatch
from tests.common.cases import Case, parity_cases, thinned
from tests.emulator import backend as emulator
from tests.ptx import backend as ptx
from tests.ptx import build as ptx_build

# One, because the tensors are small: with two, waiting for the other core of a busy machine takes most of the time.
# test_threads.py varies the number.
THREADS = 1

OPS = (
    "norm_forward",
    "batch_norm_forward_",
    "norm_backward",
    "update_running_stats_",
    "moments",
    "normalize_images",
    "batch_norm_partial",
    "batch_norm_fold_",
    "batch_norm_apply",
    "batch_norm_backward_sums",
    "batch_norm_backward_apply",
)

NO_NVCC = "needs nvcc, which compiles the kernels to the PTX that it executes: install a CUDA toolkit, or set CUDA_HOME"

# Names in tests/emulator/device.h. On an H200 plans fuse these small sets; on the tiny device they split them.
EMULATED_DEVICES = ("h200", "tiny")


@dataclasses.dataclass(frozen=True)
class Backend:
    """Where the kernels of a test run. name: "cpu", "cuda", "emulated" or "ptx"; plays: the device that the last two
    pretend to be."""

    name: str
    device: torch.device
    plays: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}_{self.plays}" if self.plays else self.name

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside the context, calls on `device` run on this backend."""
        if not self.plays:
            yield
            return
        settings = emulator.load() if self.name == "emulated" else ptx.load()
        with settings.configured(device=self.plays), kernels_of(f"fastnorm_{self.name}"):
            yield


@contextlib.contextmanager
def kernels_of(namespace: str) -> Iterator[None]:
    """torch.ops.fastnorm calls torch.ops.NAMESPACE for tensors on the CPU."""
    with torch.library._scoped_library("fastnorm", "IMPL") as library:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name in OPS:
                kernel = getattr(getattr(torch.ops, namespace), name).default
                library.impl(name, kernel, "CPU", allow_override=True)
        yield


CPU = Backend("cpu", torch.device("cpu"))
CUDA = Backend("cuda", torch.device("cuda"))
EMULATED = tuple(Backend("emulated", torch.device("cpu"), plays) for plays in EMULATED_DEVICES)
PTX = tuple(Backend("ptx", torch.device("cpu"), plays) for plays in EMULATED_DEVICES)


def has_cuda() -> bool:
    """Whether fastnorm was built with CUDA and there is a device."""
    return _C.build_info().get("cuda", "none") != "none" and torch.cuda.is_available()


def thinned_cases() -> dict[str, set[Case]]:
    """The part of the parity table that each emulated device runs, emulated and on ptx."""
    cases = list(parity_cases())
    return {plays: set(thinned(cases, start=3 * i + 1)) for i, plays in enumerate(EMULATED_DEVICES)}


MARKERS = {
    "cuda": "runs on CUDA alone; skipped where there is no GPU",
    "emulated": "runs on the devices of emulated and ptx too",
    "not_emulated(reason)": "does not run emulated, though its module is marked so",
    "emulator": "drives the emulated kernels itself; --backend emulated runs it too",
    "interpreter": "drives the interpreter of PTX itself; --backend ptx runs it too",
    "fallback": "expects torch's operators to answer: FASTNORM_STRICT is off",
    "whole": "takes minutes: without --backend it is left to `make test-ptx`",
}


DRIVERS = {"emulated": "emulator", "ptx": "interpreter"}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend", action="append", choices=("cpu", "cuda", "emulated", "ptx"), help="default: all there are"
    )


def chosen_backends(config: pytest.Config) -> list[Backend]:
    names = config.getoption("--backend")
    if names is None:
        return [CPU, *([CUDA] if has_cuda() else []), *EMULATED, *PTX]
    if "cuda" in names and not has_cuda():
        raise pytest.UsageError("--backend cuda: fastnorm was built without CUDA, or torch sees no GPU")
    if "ptx" in names and ptx_build.nvcc() is None:
        raise pytest.UsageError(f"--backend ptx: {NO_NVCC}")
    return [b for b in (CPU, CUDA, *EMULATED, *PTX) if b.name in names]


def is_of_half(case: Case) -> bool:
    """Half of all cases, of every kind alike."""
    return zlib.crc32(case.id.encode()) % 2 == 0


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """A test module that builds the emulated kernels when it is imported would do so whatever backend is asked for."""

    def refuse(name: str, *_: Any) -> None:
        raise RuntimeError(f"{name} is built while tests are collected: load it in a test")

    with pytest.MonkeyPatch.context() as patch:
        for build in (emulator.build, ptx_build):
            patch.setattr(build, "run_ninja", refuse)
        return (yield)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    kept = {"cpu", "cuda"} | ({"emulated", "ptx"} if "emulated" in marks else set())
    kept -= {"emulated"} if "not_emulated" in marks else set()
    backends = [b for b in chosen_backends(metafunc.config) if b.name in kept]
    metafunc.parametrize("backend", backends, ids=[b.id for b in backends], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drops of the parity table the cases that the emulated devices leave out; without --backend, half of those that
    ptx would run, and all that it would run beside that table; with --backend, the tests that run on another backend.
    A test that names no backend counts as one of the cpu."""
    named = config.getoption("--backend")
    chosen = {backend.name for backend in chosen_backends(config)}
    kept = thinned_cases()

    def wanted(item: pytest.Item) -> bool:
        if named is None and item.get_closest_marker("whole") is not None:
            return False
        if item.get_closest_marker("cuda") is not None:
            if not has_cuda():
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and fastnorm built for it"))
            return "cuda" in chosen or named is None
        if not isinstance(item, pytest.Function) or "backend" not in item.fixturenames:
            return "cpu" in chosen or any(item.get_closest_marker(DRIVERS[name]) for name in chosen & set(DRIVERS))
        params = item.callspec.params
        backend = params["backend"]
        if not isinstance(backend, Backend):  # an empty set of them
            return False
        in_table = item.originalname == "test_values" and "case" in params
        if backend.name == "ptx" and ptx_build.nvcc() is None:
            item.add_marker(pytest.mark.skip(reason=NO_NVCC))
        if backend.name == "ptx" and named is None and not (in_table and is_of_half(params["case"])):
            return False
        return not backend.plays or not in_table or params["case"] in kept[backend.plays]

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

        for module in ("dispatch", "statistics"):
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
