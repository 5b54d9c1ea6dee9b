"""The operator `norm` as eager calls make it: plain arguments are passed on, all others go torch's way."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastnorm import ops
from fastnorm.dispatch import run_norm

X = torch.linspace(-1, 1, 2 * 6 * 4).view(2, 6, 4)
ARGUMENTS: tuple[Any, ...] = (X, None, None, None, None, None, None, 3, 0, 1e-5, 0, 0.0, True, None)
NAMES = [argument.name for argument in ops.norm._schema.arguments]


def arguments(**changes: Any) -> tuple[Any, ...]:
    return tuple((dict(zip(NAMES, ARGUMENTS, strict=True)) | changes).values())


class Tagged(Tensor):
    """A tensor class that sees every torch function called on it."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


PLAIN: list[dict[str, Any]] = [
    {},
    {"weight": nn.Parameter(torch.full((6,), 2.0)), "bias": torch.ones(6)},
    {"groups": 0, "running_mean": torch.ones(6), "running_var": torch.ones(6), "use_input_stats": False},
    {"groups": 0, "running_mean": torch.ones(6), "running_var": torch.ones(6), "momentum": 0.5},
    {"groups": 0, "num_batches_tracked": torch.tensor(3), "running_mean": torch.ones(6), "running_var": torch.ones(6)},
    {"eps": 1, "activation": 1, "residual": X},
]
OTHER: list[dict[str, Any]] = [
    {"eps": np.float64(1e-5)},
    {"groups": True},
    {"weight": torch.ones(6).as_subclass(Tagged)},
]


@pytest.mark.parametrize("changes", [*PLAIN, *OTHER], ids=lambda changes: "-".join(changes))
def test_it_is_the_operator(changes: dict[str, Any]) -> None:
    copies = [{k: v.clone() if type(v) is Tensor else v for k, v in changes.items()} for _ in range(2)]
    results = [call(*arguments(**each)) for call, each in zip((run_norm, ops.norm), copies, strict=True)]
    assert type(results[0]) is type(results[1])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(*copies, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"x": None},
        {"x": [1.0]},
        {"groups": "3"},
        {"groups": 2**70},
        {"eps": None},
        {"momentum": "0.1"},
        {"use_input_stats": None},
        {"groups": 4},
        {"weight": torch.ones(5)},
    ],
    ids=str,
)
def test_it_refuses_what_the_operator_refuses(changes: dict[str, Any]) -> None:
    errors = []
    for call in (run_norm, ops.norm._op):
        with pytest.raises(Exception) as raised:
            call(*arguments(**changes))
        errors.append((raised.type, str(raised.value).partition("\n")[0]))
    assert errors[0] == errors[1]


def test_too_few_arguments() -> None:
    with pytest.raises(RuntimeError, match="missing value for argument 'momentum'"):
        run_norm(*ARGUMENTS[:-1])


def test_torch_function_sees_it() -> None:
    Tagged.seen.clear()
    run_norm(*arguments(bias=torch.ones(6).as_subclass(Tagged)))
    assert "fastnorm.norm.default" in Tagged.seen

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with Mode():
        run_norm(*ARGUMENTS)
    assert "fastnorm.norm.default" in seen


def test_dispatch_modes_and_the_profiler_see_it() -> None:
    with FlopCounterMode(display=False) as counter, torch.profiler.profile() as profile:
        run_norm(*ARGUMENTS)
    assert counter.get_total_flops() == 0
    assert "fastnorm::norm" in {event.key for event in profile.key_averages()}


def test_threads_may_call_at_once() -> None:
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: run_norm(*ARGUMENTS), range(200)))
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("which", ["x", "weight", "bias", "residual"])
def test_forward_mode_is_refused(which: str) -> None:
    """By itself it has no tangents to give: the modules turn to torch's operators."""
    tensors = {"x": X, "weight": torch.ones(6), "bias": torch.ones(6), "residual": X}
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[which], torch.ones_like(tensors[which]))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            run_norm(*arguments(**(tensors | {which: dual})))
