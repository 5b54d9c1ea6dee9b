"""fastnorm.functional: torch.nn.functional's signatures, exceptions and side effects."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import BatchNorm2d, dispatch, functional, modules
from tests.common.cases import DTYPES, make_data
from tests.common.numerics import assert_alike, native_settings

pytestmark = pytest.mark.emulated

NAMES = ("batch_norm", "group_norm", "instance_norm", "layer_norm")


def outcome(function: Callable[[], Any]) -> tuple[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return "returned", function()
        except Exception as error:
            return "raised", (type(error), str(error))


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    """torch's, then three keyword-only arguments."""
    ours = inspect.signature(getattr(functional, name)).parameters
    native = inspect.signature(getattr(F, name)).parameters
    assert [(p.name, p.default, p.kind) for p in list(ours.values())[: len(native)]] == [
        (p.name, p.default, p.kind) for p in native.values()
    ]
    added = {p.name: p.default for p in list(ours.values())[len(native) :]}
    assert added == {"activation": None, "activation_param": 0.01, "residual": None}
    assert all(ours[key].kind == inspect.Parameter.KEYWORD_ONLY for key in added)


def r(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def odd_calls() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Calls at and over the edge of what torch accepts."""
    x, one, double = r(2, 3, 4), torch.ones(3), torch.ones(3).double()
    half, long = torch.ones(3).bfloat16(), torch.ones(5)
    for training in (True, False):
        mode = {"training": training}
        yield "batch_norm", (x, None, None), mode
        yield "batch_norm", (x, one, None), mode
        yield "batch_norm", (x, None, one), mode
        yield "batch_norm", (x, one, one.clone()), mode
        yield "batch_norm", (x, one, one.clone(), one), mode
        yield "batch_norm", (x, one, one.clone(), None, one), mode
        yield "batch_norm", (x, long, long.clone()), mode
        yield "batch_norm", (x, one, long), mode
        yield "batch_norm", (x, one, one.clone(), long), mode
        yield "batch_norm", (x, one, one.clone(), one, long), mode
        yield "batch_norm", (x, one, one.clone()), {**mode, "momentum": None}
        yield "batch_norm", (x, one, one.clone()), {**mode, "momentum": 1}
        yield "batch_norm", (x, one, one.clone()), {**mode, "eps": 0.0}
        yield "batch_norm", (x, one, one.clone()), {**mode, "eps": -0.5}
        yield "batch_norm", (x, double, double.clone()), mode
        yield "batch_norm", (x, half, half.clone()), mode
        yield "batch_norm", (x, one, one.clone(), double, double), mode
        yield "batch_norm", (x, one, one.clone(), half, half), mode
        yield "batch_norm", (x, one, one.clone(), one, half), mode
        yield "batch_norm", (x.bfloat16(), one, one.clone(), half, half), mode
        yield "batch_norm", (x.bfloat16(), half, half.clone(), one, one), mode
        yield "batch_norm", (x.bfloat16(), half, half.clone(), half, half), mode
        yield "batch_norm", (x.bfloat16(), one, one.clone(), None, half), mode
        yield "batch_norm", (x.bfloat16(), one, one.clone(), one, half), mode
        yield "batch_norm", (x.half(), half, half.clone(), half, half), mode
        yield "batch_norm", (x.half(), one, one.clone(), one, one), mode
        yield "batch_norm", (r(3), one, one.clone()), mode
        yield "batch_norm", (r(2, 3), one, one.clone()), mode
        yield "batch_norm", (r(1, 3), one, one.clone()), mode
        yield "batch_norm", (r(1, 3, 1), one, one.clone()), mode
        yield "batch_norm", (r(2, 3, 1, 1, 1, 2), one, one.clone()), mode
        yield "batch_norm", (torch.zeros(0), None, None), mode
        yield "batch_norm", (r(0, 3), one, one.clone()), mode
        yield "batch_norm", (r(2, 3, 0), one, one.clone()), mode
        yield "batch_norm", (x.long(), one, one.clone()), mode
        yield "batch_norm", (x.tolist(), one, one.clone()), mode
        stats = {"use_input_stats": training}
        yield "instance_norm", (x,), stats
        yield "instance_norm", (x, one, one.clone()), stats
        yield "instance_norm", (x, one, None), stats
        yield "instance_norm", (x, one, one.clone(), one, one), stats
        yield "instance_norm", (x, long, long.clone()), stats
        yield "instance_norm", (x, None, None, long, long), stats
        yield "instance_norm", (x, half, half.clone()), stats
        yield "instance_norm", (x.bfloat16(), one, one.clone(), one, one), stats
        yield "instance_norm", (x.bfloat16(), half, half.clone(), half, half), stats
        yield "instance_norm", (r(2, 3, 1),), stats
        yield "instance_norm", (r(2, 3),), stats
        yield "instance_norm", (r(3),), stats
        yield "instance_norm", (x,), {**stats, "eps": -0.5}
        yield "instance_norm", (x,), {**stats, "momentum": None}
        yield "instance_norm", (x.long(),), stats
    for groups in (1, 3, 2, 0, -1, 5):
        yield "group_norm", (x, groups), {}
        yield "group_norm", (r(0, 3, 2), groups), {}
    yield "group_norm", (x, 3, one, one), {}
    yield "group_norm", (x, 3, one), {}
    yield "group_norm", (x, 3, None, one), {}
    yield "group_norm", (x, 3, long, long), {}
    yield "group_norm", (x, 3, one, long), {}
    yield "group_norm", (x, 3, double, double), {}
    yield "group_norm", (x, 3, half, half), {}
    yield "group_norm", (x.bfloat16(), 3, one, one), {}
    yield "group_norm", (x.bfloat16(), 3, one, half), {}
    yield "group_norm", (x.bfloat16(), 3, half, half), {}
    yield "group_norm", (x.half(), 3, half, half), {}
    yield "group_norm", (x, 3), {"eps": 0.0}
    yield "group_norm", (x, 3), {"eps": -0.5}
    yield "group_norm", (x, 1.5), {}
    yield "group_norm", (r(3), 3), {}
    yield "group_norm", (r(2, 3), 3), {}
    yield "group_norm", (r(1, 3), 3), {}
    yield "group_norm", (x.long(), 3), {}
    four, wide = torch.ones(4), torch.ones(3, 4)
    for shape in ((4,), [4], (3, 4), (2, 3, 4), (3,), (), (4, 4), 4, torch.Size([4])):
        yield "layer_norm", (x, shape), {}
        yield "layer_norm", (r(0, 3, 4), shape), {}
    yield "layer_norm", (x, (4,), four, four), {}
    yield "layer_norm", (x, (4,), four), {}
    yield "layer_norm", (x, (4,), None, four), {}
    yield "layer_norm", (x, (3, 4), wide, wide), {}
    yield "layer_norm", (x, (3, 4), four, four), {}
    yield "layer_norm", (x, (3, 4), wide.view(-1), wide.view(-1)), {}
    yield "layer_norm", (x, (4,), four.double(), four.double()), {}
    yield "layer_norm", (x, (4,), four.bfloat16(), four.bfloat16()), {}
    yield "layer_norm", (x.bfloat16(), (4,), four, four), {}
    yield "layer_norm", (x.bfloat16(), (4,), four, four.bfloat16()), {}
    yield "layer_norm", (x.bfloat16(), (4,), four.bfloat16(), four.bfloat16()), {}
    yield "layer_norm", (x, (4,)), {"eps": 0.0}
    yield "layer_norm", (x, (4,)), {"eps": -0.5}
    yield "layer_norm", (r(), ()), {}
    yield "layer_norm", (x.long(), (4,)), {}


def describe(a: Any) -> str:
    if isinstance(a, Tensor):
        return f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}"
    return str(a)


def copied(a: Any) -> Any:
    return a.clone() if isinstance(a, Tensor) else a


ODD_CALLS = list(odd_calls())


@pytest.mark.fallback(r"x is empty|x has shape|groups is|has dtype|eps is 0")
@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    ODD_CALLS,
    ids=[
        f"{name}-{','.join(map(describe, args))}-{','.join(f'{k}={v}' for k, v in kwargs.items())}"
        for name, args, kwargs in ODD_CALLS
    ],
)
def test_ends_as_in_torch(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The same exception with the same text, or the same values and the same change of the arguments."""
    results = []
    for namespace, settings in ((functional, kwargs), (F, native_settings(name, kwargs, kwargs.get("training")))):
        mine = tuple(copied(a) for a in args)
        result = outcome(lambda a=mine, n=namespace, s=settings: getattr(n, name)(*a, **s))
        results.append((result, [a for a in mine if isinstance(a, Tensor)]))
    (ours, our_args), (native, native_args) = results
    assert ours[0] == native[0], f"fastnorm {ours}, torch {native}"
    if ours[0] == "raised":
        assert ours[1] == native[1]
    else:
        assert_alike(ours[1], native[1])
    assert_alike(our_args, native_args)


@pytest.mark.parametrize("name", NAMES)
def test_residual_of_a_wrong_shape(name: str) -> None:
    """What `y + residual` says."""
    x = r(2, 3, 4)
    argument: dict[str, tuple[Any, ...]] = {"group_norm": (3,), "layer_norm": ((4,),)}
    args = argument.get(name, (None, None) if name == "batch_norm" else ())
    kwargs = {"training": True} if name == "batch_norm" else {}
    with pytest.raises(RuntimeError, match="must match the size"):
        getattr(functional, name)(x, *args, residual=r(2, 3, 5), **kwargs)


@pytest.mark.parametrize("data", ["normal", "offset"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_moments(dtype: torch.dtype, data: str, device: torch.device) -> None:
    """Per-channel mean and biased variance, in float32 or better."""
    for shape in ((4, 3), (2, 5, 17), (2, 70, 5, 3)):
        x = make_data(data, shape, dtype).to(device)
        mean, var = functional.moments(x)
        sets = x.double().transpose(0, 1).reshape(shape[1], -1)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert mean.dtype == var.dtype == expected and mean.shape == var.shape == shape[1:2]
        torch.testing.assert_close(mean, sets.mean(1).to(expected))
        torch.testing.assert_close(var, sets.var(1, correction=0).to(expected))


def test_torch_function_override_is_honoured() -> None:
    """A tensor-like argument gets the call, as with torch.nn.functional."""

    class Recorder(Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(getattr(func, "__name__", str(func)))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = r(2, 3, 4).as_subclass(Recorder)
    y = functional.group_norm(x, 3)
    assert isinstance(y, Recorder)
    torch.testing.assert_close(y.as_subclass(Tensor), F.group_norm(r(2, 3, 4), 3))


@pytest.mark.parametrize("failure", [torch.AcceleratorError, torch.OutOfMemoryError, RuntimeError, KeyError])
def test_a_failure_is_not_hidden(failure: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's operators answer what the kernels refuse, and do not cover up a kernel or an allocation that failed, or
    a slip in fastnorm's own Python."""

    def fail(*args: object) -> Tensor:
        raise failure("CUDA error: unspecified launch failure")

    x, module = torch.randn(2, 3, 4, 4), BatchNorm2d(3)
    for place in (dispatch, modules):
        monkeypatch.setattr(place, "entry_for", lambda x: fail)
    for call in (
        lambda: functional.batch_norm(x, None, None, training=True),
        lambda: functional.layer_norm(x, (4,)),
        lambda: module(x),
    ):
        with pytest.raises(failure, match="unspecified launch failure"):
            call()
