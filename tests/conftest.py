"""Fixtures of every test: backends, seeds, thread count."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import fastnorm._C

# One, because the tensors are small: with two, waiting for the other core of a busy machine takes most of the time.
# test_threads.py is where the number varies.
THREADS = 1


@dataclasses.dataclass(frozen=True)
class Backend:
    """Where the kernels of a test run. name: "cpu", "cuda" or "emulated"."""

    name: str
    device: torch.device


def available_backends() -> list[Backend]:
    """cpu always; cuda when fastnorm was built with it and a device is there."""
    backends = [Backend("cpu", torch.device("cpu"))]
    if fastnorm._C.build_info().get("cuda", "none") != "none" and torch.cuda.is_available():
        backends.append(Backend("cuda", torch.device("cuda")))
    return backends


@pytest.fixture(scope="session", params=available_backends(), ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.param
    return backend


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
