"""fastnorm.enable, disable and enabled: each norm's switch, blocks, threads, what the report says, nothing printed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnorm
from tests.common.aten_calls import row_of
from tests.test_enable import switched_off  # noqa: F401

NORMS = ("batch_norm", "group_norm", "layer_norm")


def is_on(norm: str) -> bool:
    return any(row.name == norm and row.status == "served" for row in fastnorm.report())


def test_each_norm_has_its_switch() -> None:
    fastnorm.enable("layer_norm", "group_norm")
    fastnorm.enable("layer_norm")
    assert [is_on(norm) for norm in NORMS] == [False, True, True]
    fastnorm.disable("layer_norm", device="cpu")
    assert [is_on(norm) for norm in NORMS] == [False, True, False]
    fastnorm.disable()
    assert not any(map(is_on, NORMS))


def test_blocks_nest_and_overlap() -> None:
    first, second = fastnorm.enabled(), fastnorm.enabled("batch_norm")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert [is_on(norm) for norm in NORMS] == [True, False, False]
    fastnorm.disable()
    assert is_on("batch_norm"), "the second block is open"
    second.__exit__(None, None, None)
    assert not any(map(is_on, NORMS))
    with pytest.raises(RuntimeError, match="mine"), fastnorm.enabled():
        raise RuntimeError("mine")
    assert not any(map(is_on, NORMS))


@pytest.mark.parametrize(
    "function", [fastnorm.enable, fastnorm.disable, lambda *a, **k: fastnorm.enabled(*a, **k).__enter__()]
)
def test_bad_arguments(function: Callable[..., None]) -> None:
    with pytest.raises(ValueError, match="norm is 'rms_norm', expected one of batch_norm, group_norm, layer_norm"):
        function("layer_norm", "rms_norm")
    with pytest.raises(ValueError, match="torch computes instance_norm by batch_norm"):
        function("instance_norm")
    with pytest.raises(ValueError, match="device is 'xpu', expected 'cpu'"):
        function(device="xpu")
    assert not any(map(is_on, NORMS))


def test_the_report_says_why_a_call_was_left() -> None:
    with fastnorm.enabled("layer_norm"):
        F.layer_norm(torch.randn(2, 0, 3), (3,))
        row = row_of("layer_norm")
    assert "x has no elements" in row.why
    assert row.left_calls >= 1


def test_switching_while_others_compute() -> None:
    """Whatever the switch is at the time, a call gives what one of the two kernels gives."""
    torch.manual_seed(0)
    layer, x = nn.LayerNorm(33), torch.randn(7, 33)
    expected, wrong, stop = layer(x).detach(), [], threading.Event()

    def compute() -> None:
        while not stop.is_set():
            y = layer(x)
            y.sum().backward()
            if not torch.allclose(y, expected, atol=1e-5):
                wrong.append(y)

    def switch() -> None:
        for _ in range(300):
            with fastnorm.enabled():
                pass
            fastnorm.enable()
            fastnorm.disable()

    workers = [threading.Thread(target=compute) for _ in range(2)]
    switchers = [threading.Thread(target=switch) for _ in range(2)]
    for thread in workers + switchers:
        thread.start()
    for thread in switchers:
        thread.join()
    stop.set()
    for thread in workers:
        thread.join()
    assert not wrong
    assert not any(map(is_on, NORMS))


def test_nothing_is_printed() -> None:
    program = """
import torch, fastnorm
fastnorm.enable()
torch.nn.BatchNorm2d(3)(torch.randn(2, 3, 4, 4)).sum().backward()
fastnorm.disable()
assert fastnorm.report().rows[0].served_calls == 2
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, env=os.environ, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
