"""fastnorm.enable under torch's own data-driven suites: all samples, errors and derivatives of its norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleInfo
from torch.testing._internal.opinfo.core import OpInfo

import fastnorm
from tests.common.numerics import assert_alike
from tests.test_torch_suites import (
    CLASSES,
    OPERATORS,
    call,
    differentiable,
    dtype_name,
    function_outcome,
    module_outcome,
    module_tests,
    tensors_of,
)

NATIVE = {info.name: info for info in op_db if info.name in ("native_batch_norm", "native_group_norm")}
NATIVE |= {info.name: info for info in op_db if info.name in ("native_layer_norm", "_native_batch_norm_legit")}
FUNCTIONS: dict[str, OpInfo] = {**OPERATORS, **NATIVE}


def test_suites_are_there() -> None:
    assert len(NATIVE) == 4
    assert len(FUNCTIONS) == 8
    assert len(CLASSES) == 8


@pytest.mark.parametrize(("info", "dtype", "training"), list(module_tests()))
def test_module_samples(info: ModuleInfo, dtype: torch.dtype, training: bool) -> None:
    cpu = torch.device("cpu")
    for sample in info.module_inputs_func(info, device=cpu, dtype=dtype, requires_grad=False, training=training):
        expected = module_outcome(info.module_cls, sample, dtype, training, cpu)
        exact = module_outcome(info.module_cls, sample, dtype, training, cpu, exact=True)
        with fastnorm.enabled():
            actual = module_outcome(info.module_cls, sample, dtype, training, cpu)
        assert_alike(actual, expected, exact, sample.desc)


def first(function: Callable[..., Any]) -> Callable[..., Any]:
    """The first output of those that return several."""

    def f(*args: Any, **kwargs: Any) -> Any:
        y = function(*args, **kwargs)
        return y if isinstance(y, Tensor) else y[0]

    return f


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_samples(name: str, dtype: torch.dtype) -> None:
    info = FUNCTIONS[name]
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= 4
    function = first(info.op)
    for sample in samples:
        expected = function_outcome(function, sample)
        exact = function_outcome(function, sample, exact=True)
        with fastnorm.enabled():
            actual = function_outcome(function, sample)
        assert_alike(actual, expected, exact, str(sample))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_errors(name: str) -> None:
    info = FUNCTIONS[name]
    for error in info.error_inputs("cpu") if info.error_inputs_func else ():
        with fastnorm.enabled(), pytest.raises(error.error_type, match=error.error_regex):
            call(info.op, error.sample_input)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_derivatives(name: str) -> None:
    """gradcheck, backward and forward mode, and gradgradcheck of float64 samples."""
    info, checked = FUNCTIONS[name], 0
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        leaves = [t for t in tensors_of(sample) if t.requires_grad]
        if 0 < sample.input.numel() < 100 and checked < 6:
            f = differentiable(first(info.op), sample, leaves)
            twice = torch.autograd.gradgradcheck(f, leaves, raise_exception=False)  # torch fails with a bias alone
            with fastnorm.enabled():
                assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)
                assert torch.autograd.gradgradcheck(f, leaves, raise_exception=False) == twice
            checked += 1
    assert checked > 1
