"""fastnorm.cuda: the settings of the CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastnorm
from fastnorm import _C
from fastnorm.cuda import leave_multiprocessors_free
from tests.common.plan_model import BATCH, DEVICES, Shape


@pytest.fixture(autouse=True)
def none_left_free() -> Iterator[None]:
    yield
    leave_multiprocessors_free(0)


@pytest.mark.parametrize(("count", "error"), [(-1, ValueError), (1.5, TypeError), ("2", TypeError), (None, TypeError)])
def test_what_is_no_count_is_refused(count: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        leave_multiprocessors_free(count)  # type: ignore[arg-type]


def test_the_error_names_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"count is -3, expected 0 or more"):
        leave_multiprocessors_free(-3)


@pytest.mark.parametrize("free", [1, 20, 131, 1000])
def test_grids_keep_off_them(free: int) -> None:
    """A grid whose blocks wait for each other takes the SMs that are left, and one at least."""
    geometry = Shape(BATCH, 256, 64, 112 * 112, 64, False).geometry
    facts = DEVICES["H200"]
    whole = _C.plan_forward(geometry, "bfloat16", facts, forced={"gang": "grid", "blocks_per_sm": 1})
    assert facts.num_sms - 4 <= whole.grid.blocks <= facts.num_sms
    left = max(1, facts.num_sms - free)
    try:
        plan = _C.plan_forward(geometry, "bfloat16", facts, forced={"gang": "grid", "blocks_per_sm": 1}, free_sms=free)
    except ValueError:  # a set of 6.4 MB does not fit what is left, and is split
        assert left * 227 * 1024 < 256 * 112 * 112 * 2
        assert _C.plan_forward(geometry, "bfloat16", facts, free_sms=free).strategy == "split"
    else:
        assert 0 < plan.grid.blocks <= left


@pytest.mark.cuda
def test_values_stay() -> None:
    x = torch.randn(8, 32, 56, 56, device="cuda")
    norm = fastnorm.BatchNorm2d(32).to("cuda")
    expected = norm(x)
    leave_multiprocessors_free(8)
    torch.testing.assert_close(norm(x), expected)
