"""Fixtures of every test: backends, seeds, thread count.

pytest tests                        cpu; cuda where it is; emulated: the CUDA kernels without a GPU
pytest tests --backend cuda         what runs on a backend, on that one alone; may be given more than once
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator

import pytest
import torch

import fastnorm._C
from tests.common.cases import Case, parity_cases, thinned
from tests.emulator import backend as emulator

# One, because the tensors are small: with two, waiting for the other core of a busy machine takes most of the time.
# test_threads.py is where the number varies.
THREADS = 1

OPS = ("norm_forward", "norm_backward", "update_running_stats_", "moments")

# Of tests/emulator/device.h. Plans fuse what fits an H200; on the tiny one they split what other tests call small.
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
        """While it lasts, what runs on `device` runs on this backend."""
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
    """fastnorm was built with it, and a device is there."""
    return fastnorm._C.build_info().get("cuda", "none") != "none" and torch.cuda.is_available()


# What runs emulated too: modules, and of some only functions of this name. The others test what all backends share, or
# only more of the same.
EMULATED_TESTS = {
    "test_parity": "",
    "test_activation": "",
    "test_hypothesis": "",
    "test_nonfinite": "",
    "test_autograd": "",
    "test_modules": "",
    "test_functional": "",
    "test_accuracy": "test_error_is_at_most_torchs",
    "test_gradcheck": "test_gradients",
    "test_emulated": "",
}
# The emulator has the tanhf of the C library, which is not CUDA's.
NOT_EMULATED = ("test_as_accurate_as_torch",)


def thinned_cases() -> dict[str, set[Case]]:
    """The part of the parity table that each emulated device runs."""
    return {plays: set(thinned(parity_cases(), start=3 * i)) for i, plays in enumerate(EMULATED_DEVICES)}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: of CUDA alone: skipped where there is no GPU")


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
    module = metafunc.module.__name__.rpartition(".")[2]
    name, only = metafunc.function.__name__, EMULATED_TESTS.get(module)
    emulated = only is not None and name.startswith(only) and name not in NOT_EMULATED
    backends = [b for b in chosen_backends(metafunc.config) if b.name != "emulated" or emulated]
    metafunc.parametrize("backend", backends, ids=[b.id for b in backends], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drops what the emulated devices leave out of the parity table; and for --backend all that runs on another: what
    says nothing else runs on the cpu."""
    chosen = {backend.name for backend in chosen_backends(config)}
    kept = thinned_cases()

    def wanted(item: pytest.Item) -> bool:
        if item.get_closest_marker("cuda") is not None:
            if not has_cuda():
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and fastnorm built for it"))
            return "cuda" in chosen or config.getoption("--backend") is None
        if not isinstance(item, pytest.Function) or "backend" not in item.fixturenames:
            module = item.path.stem
            return "cpu" in chosen or ("emulated" in chosen and module.startswith("test_emulated"))
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
def same_start() -> Iterator[None]:
    """Every test starts from the same seed, thread count and default dtype."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)
    torch.set_default_dtype(torch.float32)
