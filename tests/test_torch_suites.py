"""torch's own data-driven suites: every sample and error input that torch tests its norms with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleInfo, module_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

import fastnorm
from fastnorm import functional
from tests.common.numerics import assert_alike

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CLASSES = {info.module_cls: info for info in module_db if info.module_cls.__name__ in fastnorm.__all__}
NORMS = {name for name in functional.__all__ if name.endswith("_norm")}  # our `normalize` is not torch's
OPERATORS = {
    info.name.removeprefix("nn.functional."): info
    for info in op_db
    if info.name.removeprefix("nn.functional.") in NORMS and not info.variant_test_name
}
# Second derivatives of the first samples only; large ones are checked along random directions.
MAX_GRADGRADCHECKS = 10
LARGE = 40


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def test_suites_are_there() -> None:
    """Should torch rename something, these tests must not quietly become empty."""
    assert {cls.__name__ for cls in CLASSES} == {
        *(f"{kind}Norm{d}d" for kind in ("Batch", "Instance") for d in (1, 2, 3)),
        "GroupNorm",
        "LayerNorm",
    }
    assert set(OPERATORS) == {"batch_norm", "group_norm", "instance_norm", "layer_norm"}


# Modules.


def module_tests() -> Iterator[Any]:
    for info, dtype, training in itertools.product(CLASSES.values(), DTYPES, (True, False)):
        if dtype in info.dtypes or dtype in (torch.bfloat16, torch.float16):
            mode = "train" if training else "eval"
            name = f"{info.module_cls.__name__}-{dtype_name(dtype)}-{mode}"
            yield pytest.param(info, dtype, training, id=name)


def module_outcome(
    cls: type[torch.nn.Module],
    module_input: Any,
    dtype: torch.dtype,
    training: bool,
    device: torch.device,
    exact: bool = False,
) -> list[Any]:
    """Output, gradients and state after two calls. exact: computed in float64, from the same values."""
    constructor, forward = module_input.constructor_input, module_input.forward_input
    torch.manual_seed(0)
    module = cls(*constructor.args, **constructor.kwargs, dtype=dtype, device=device)
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    module.train(training)
    working_dtype = torch.float64 if exact else dtype
    module.to(working_dtype)
    results: list[Any] = []
    for _ in range(2):
        args = [a.detach().to(working_dtype, copy=True).requires_grad_() for a in forward.args]
        y = module(*args, **forward.kwargs)
        leaves = [*args, *module.parameters()]
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(y)
        results += [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    return [*results, *module.state_dict().values()]


@pytest.mark.fallback(r"x is empty|x has shape|groups is")
@pytest.mark.parametrize(("info", "dtype", "training"), list(module_tests()))
def test_module_samples(info: ModuleInfo, dtype: torch.dtype, training: bool, device: torch.device) -> None:
    ours = getattr(fastnorm, info.module_cls.__name__)
    samples = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=False, training=training)
    assert samples
    for sample in samples:
        actual = module_outcome(ours, sample, dtype, training, device)
        expected = module_outcome(info.module_cls, sample, dtype, training, device)
        exact = module_outcome(info.module_cls, sample, dtype, training, device, exact=True)
        assert_alike(actual, expected, exact, sample.desc)


@pytest.mark.parametrize(
    "info",
    [i for i in CLASSES.values() if i.module_error_inputs_func],
    ids=lambda i: i.module_cls.__name__,
)
@pytest.mark.parametrize("training", [True, False])
def test_module_errors(info: ModuleInfo, training: bool, device: torch.device) -> None:
    """The type and text that torch's suite asks for, or in eval mode whatever torch does."""
    ours = getattr(fastnorm, info.module_cls.__name__)
    samples = info.module_error_inputs_func(
        info, device=device, dtype=torch.float32, requires_grad=False, training=training
    )
    assert samples
    for sample in samples:
        constructor = sample.module_error_input.constructor_input
        forward = sample.module_error_input.forward_input
        outcomes = []
        for cls in (ours, info.module_cls):
            try:
                module = cls(*constructor.args, **constructor.kwargs).to(device).train(training)
                outcomes.append(module(*forward.args, **forward.kwargs))
            except Exception as error:
                outcomes.append((type(error), str(error)))
        if training:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                raise outcomes[0][0](outcomes[0][1])
        if isinstance(outcomes[0], Tensor):
            assert_alike(*outcomes)
        else:
            assert outcomes[0] == outcomes[1]


# Functions.


def call(function: Callable[..., Tensor], sample: SampleInput) -> Tensor:
    return function(sample.input, *sample.args, **sample.kwargs)


def copied(sample: SampleInput, dtype: torch.dtype) -> SampleInput:
    """A sample with leaves and buffers of its own, in another dtype."""

    def copy(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        return a.detach().to(dtype, copy=True).requires_grad_(a.requires_grad)

    return SampleInput(
        copy(sample.input),
        args=tuple(copy(a) for a in sample.args),
        kwargs={k: copy(v) for k, v in sample.kwargs.items()},
    )


def tensors_of(sample: SampleInput) -> list[Tensor]:
    every = (sample.input, *sample.args, *sample.kwargs.values())
    return [t for t in every if isinstance(t, Tensor)]


def function_outcome(function: Callable[..., Tensor], sample: SampleInput, exact: bool = False) -> list[Tensor | None]:
    """Output, gradients, and the arguments afterwards, for running statistics."""
    dtype = sample.input.dtype
    sample = copied(sample, torch.float64 if exact else dtype)
    y = call(function, sample)
    leaves = [t for t in tensors_of(sample) if t.requires_grad]
    gradients: tuple[Tensor | None, ...] = ()
    if y.requires_grad:
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(y)
        gradients = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    return [y.detach(), *gradients, *(t.detach() for t in tensors_of(sample))]


def samples_of(name: str, device: torch.device, dtype: torch.dtype, grad: bool) -> list[SampleInput]:
    info: OpInfo = OPERATORS[name]
    samples = list(info.sample_inputs(device, dtype, requires_grad=grad))
    return samples + list(info.reference_inputs(device, dtype, requires_grad=grad))


@pytest.mark.fallback(r"x is empty|x has shape|groups is")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", OPERATORS)
def test_function_samples(name: str, dtype: torch.dtype, grad: bool, device: torch.device) -> None:
    ours, native = getattr(functional, name), getattr(torch.nn.functional, name)
    samples = samples_of(name, device, dtype, grad)
    assert len(samples) > 5
    for sample in samples:
        expected = function_outcome(native, sample)
        actual = function_outcome(ours, sample)
        assert_alike(actual, expected, function_outcome(native, sample, exact=True), str(sample))


# torch lists errors for group_norm only; those of the others are in test_modules.py and test_functional.py.
@pytest.mark.parametrize("name", [n for n, i in OPERATORS.items() if i.error_inputs_func])
def test_function_errors(name: str, device: torch.device) -> None:
    errors = list(OPERATORS[name].error_inputs(device))
    assert errors
    for error in errors:
        with pytest.raises(error.error_type, match=error.error_regex):
            call(getattr(functional, name), error.sample_input)


def differentiable(function: Callable[..., Tensor], sample: SampleInput, leaves: list[Tensor]) -> Callable[..., Tensor]:
    """A call of the sample as a function of its leaves. Running statistics are copied, lest they move in between."""
    names = [id(leaf) for leaf in leaves]

    def f(*values: Tensor) -> Tensor:
        swap = dict(zip(names, values, strict=True))

        def replaced(a: Any) -> Any:
            return swap.get(id(a), a.clone() if isinstance(a, Tensor) else a)

        args = [replaced(a) for a in (sample.input, *sample.args)]
        return function(*args, **{k: replaced(v) for k, v in sample.kwargs.items()})

    return f


@pytest.mark.fallback(r"forward-mode")
@pytest.mark.parametrize("name", OPERATORS)
def test_function_derivatives(name: str, device: torch.device) -> None:
    """gradcheck on every float64 sample, gradgradcheck on the first few."""
    info: OpInfo = OPERATORS[name]
    function = getattr(functional, name)
    checked = 0
    for sample in info.sample_inputs(device, torch.float64, requires_grad=True):
        leaves = [t for t in tensors_of(sample) if t.requires_grad]
        if sample.input.numel() == 0:  # nothing to differentiate
            continue

        f = differentiable(function, sample, leaves)
        large = sample.input.numel() > LARGE
        assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, fast_mode=large)
        if checked < MAX_GRADGRADCHECKS:
            assert torch.autograd.gradgradcheck(f, leaves, fast_mode=large)
        checked += 1
    assert checked > 3
