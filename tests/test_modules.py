"""The modules keep torch.nn's contract: constructors, state, errors, modes, and the wrappers around them."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from tests.common.cases import TYPICAL, Case, Layer
from tests.common.numerics import assert_alike, build, call, make_inputs, native_settings

pytestmark = pytest.mark.emulated

NAMES = (
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
)
Outcome = tuple[str, Any]


def outcome(function: Callable[[], Any]) -> Outcome:
    """What a call returns, warns or raises: torch.nn and fastnorm must agree on all of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return "returned", (function(), [str(w.message) for w in caught])
        except Exception as error:
            return "raised", (type(error), str(error))


def assert_same_outcome(ours: Outcome, native: Outcome) -> None:
    assert ours[0] == native[0], (ours, native)
    if ours[0] == "raised":
        assert ours[1] == native[1]
    else:
        assert_alike(ours[1][0], native[1][0])
        assert ours[1][1] == native[1][1]


@pytest.fixture(params=TYPICAL, ids=lambda layer: layer.norm)
def layer(request: pytest.FixtureRequest) -> Layer:
    result: Layer = request.param
    return result


# Construction.


@pytest.mark.parametrize("name", NAMES)
def test_is_a_subclass_with_its_constructor(name: str) -> None:
    ours, native = getattr(fastnorm, name), getattr(nn, name)
    assert issubclass(ours, native) and ours.__name__ == name and name in fastnorm.__all__
    parameters = inspect.signature(ours).parameters
    expected = dict(inspect.signature(native).parameters)
    for key, parameter in expected.items():
        assert parameters[key].default == parameter.default
        assert parameters[key].kind == parameter.kind
    added = {key: p for key, p in parameters.items() if key not in expected}
    assert list(added) == ["activation", "activation_param"]
    assert all(p.kind == p.KEYWORD_ONLY for p in added.values())


def test_repr(layer: Layer) -> None:
    """torch.nn's, and the activation when there is one."""
    plain = layer.build(fastnorm)
    assert repr(plain) == repr(layer.build(nn))
    fused = repr(layer.build(fastnorm, activation="leaky_relu", activation_param=0.3))
    assert "activation='leaky_relu'" in fused and "0.3" in fused
    assert "activation_param" not in repr(layer.build(fastnorm, activation="relu"))


def test_unknown_activation_is_refused_at_construction(layer: Layer) -> None:
    with pytest.raises(ValueError, match=r"activation.*'silu'.*'swish'"):
        layer.build(fastnorm, activation="swish")


CONSTRUCTIONS = [
    ("BatchNorm2d", (4,), {"affine": False}),
    ("BatchNorm2d", (4,), {"track_running_stats": False}),
    ("BatchNorm2d", (4, 1e-3, None), {}),
    ("BatchNorm2d", (4, 1e-3, 0.2, True, True), {"dtype": torch.float64}),
    ("BatchNorm2d", (4,), {"device": "meta"}),
    ("BatchNorm2d", (4,), {"no_such": 1}),
    ("BatchNorm1d", (), {}),
    ("GroupNorm", (2, 4, 1e-3, False), {}),
    ("GroupNorm", (3, 4), {}),
    ("GroupNorm", (0, 4), {}),
    ("InstanceNorm1d", (4,), {"affine": True, "track_running_stats": True}),
    ("LayerNorm", (4,), {}),
    ("LayerNorm", ([2, 3],), {"bias": False}),
    ("LayerNorm", ((2, 3), 1e-3, False), {}),
    ("LayerNorm", (torch.Size([2, 3]),), {"dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTIONS)
def test_construction(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def described(namespace: Any) -> dict[str, Any]:
        module = getattr(namespace, name)(*args, **kwargs)
        state = {
            key: (t.dtype, t.shape, t.device.type, type(t), t.requires_grad)
            for key, t in (*module.named_parameters(), *module.named_buffers())
        }
        public = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        return {"state": state, "public": public}

    ours, native = (outcome(lambda n=n: described(n)) for n in (fastnorm, nn))
    if ours[0] == "returned" and native[0] == "returned":
        for key, value in native[1][0]["public"].items():
            assert ours[1][0]["public"].pop(key) == value
        assert set(ours[1][0]["public"]) <= {"activation", "activation_param"}
        assert ours[1][0]["state"] == native[1][0]["state"]
    else:
        assert ours == native


# State.


def test_state_dict_goes_both_ways(layer: Layer, device: torch.device) -> None:
    case = Case(layer)
    ours, native = build(case, fastnorm, device, seed=1), build(case, nn, device, seed=2)
    native.load_state_dict(ours.state_dict())
    x = make_inputs(case, device).x
    torch.testing.assert_close(ours.eval()(x), native.eval()(x))
    fresh = build(case, fastnorm, device, seed=4)
    fresh.load_state_dict(native.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(x), ours(x))
    assert list(ours.state_dict()) == list(native.state_dict())
    assert ours.state_dict()._metadata == native.state_dict()._metadata


def test_old_checkpoints_load_as_in_torch() -> None:
    """Version 1 of the format had no num_batches_tracked."""
    state = nn.BatchNorm2d(3).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    module = fastnorm.BatchNorm2d(3)
    module.load_state_dict(state)
    assert module.num_batches_tracked.item() == 0
    state = nn.InstanceNorm2d(3, track_running_stats=True).state_dict()
    state._metadata.clear()
    with pytest.raises(RuntimeError, match="running stats buffer"):
        fastnorm.InstanceNorm2d(3).load_state_dict(state)


def copies(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "deepcopy", copy.deepcopy(module)
    yield "pickle", pickle.loads(pickle.dumps(module))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    yield "torch.save", torch.load(buffer, weights_only=False)


def test_copies(layer: Layer, device: torch.device) -> None:
    case = Case(layer, activation="leaky_relu", residual=True)
    module = build(case, fastnorm, device)
    inputs = make_inputs(case, device)
    expected = call(case, copy.deepcopy(module), inputs.x, inputs.residual)
    for how, copied in copies(module):
        assert type(copied) is type(module), how
        assert repr(copied) == repr(module), how
        assert torch.equal(call(case, copied, inputs.x, inputs.residual), expected), how
        assert not any(a is b for a, b in zip(copied.parameters(), module.parameters(), strict=True))


def test_initialisers_and_casts(layer: Layer) -> None:
    module = layer.build(fastnorm)

    def by_type(m: nn.Module) -> None:
        if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            nn.init.constant_(m.weight, 0.25)

    nn.Sequential(module).apply(by_type)
    if not layer.norm.startswith("Instance"):
        assert (module.weight == 0.25).all()
    module.reset_parameters()
    assert module.weight is None or (module.weight == 1).all()
    assert module.double().weight.dtype == torch.float64
    assert module.bfloat16()(torch.randn(layer.shape).bfloat16()).dtype == torch.bfloat16
    assert module.to("meta").weight.device.type == "meta"


def test_sync_batchnorm_conversion() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), fastnorm.BatchNorm2d(4), nn.ReLU())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[1], nn.SyncBatchNorm)


# Modes of the statistics.


@pytest.mark.parametrize("norm", ["BatchNorm2d", "InstanceNorm2d"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_statistics_step_by_step(
    norm: str, affine: bool, track: bool, momentum: float | None, device: torch.device
) -> None:
    """A life of training and evaluation, with track_running_stats switched on the way."""
    kwargs = {"affine": affine, "track_running_stats": track, "momentum": momentum}
    modules = [getattr(n, norm)(5, **kwargs, device=device) for n in (fastnorm, nn)]
    for step in range(8):
        x = torch.randn(3, 5, 4, 2, device=device) * (step + 1) + step
        for module in modules:
            module.train(step not in (2, 3, 6))
            module.track_running_stats = track and step not in (4, 6)
        ours, native = (outcome(lambda m=m, x=x: m(x)) for m in modules)
        assert_same_outcome(ours, native)
        torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict())


def test_momentum_changes_are_followed(device: torch.device) -> None:
    modules = [n.BatchNorm1d(4, device=device) for n in (fastnorm, nn)]
    for momentum in (0.5, None, 0.1, 0.9, None):
        x = torch.randn(6, 4, device=device)
        for module in modules:
            module.momentum = momentum
            module(x)
        torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict())


def test_reset_running_stats(device: torch.device) -> None:
    module = fastnorm.BatchNorm2d(4, device=device)
    module(torch.randn(2, 4, 3, 3, device=device))
    module.reset_running_stats()
    torch.testing.assert_close(module.state_dict(), nn.BatchNorm2d(4, device=device).state_dict())


def test_buffers_keep_their_identity(device: torch.device) -> None:
    """Running statistics are updated in place, so that references to them (EMA, DDP) stay good."""
    module = fastnorm.BatchNorm2d(4, device=device)
    before = dict(module.named_buffers())
    pointers = {name: b.data_ptr() for name, b in before.items()}
    module(torch.randn(2, 4, 3, 3, device=device))
    after = dict(module.named_buffers())
    assert all(after[name] is before[name] for name in before)
    assert {name: b.data_ptr() for name, b in after.items()} == pointers


def test_no_gradient_reaches_the_statistics(device: torch.device) -> None:
    module = fastnorm.BatchNorm2d(4, device=device)
    module(torch.randn(2, 4, 3, 3, device=device, requires_grad=True)).sum().backward()
    assert not any(b.requires_grad for b in module.buffers())


def random_calls() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any], Tensor, bool]]:
    """Calls that torch.nn refuses or warns about: name, args, kwargs, input, training."""
    r = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))  # eps of -1 may blow rounding up
    for train in (True, False):
        yield "BatchNorm1d", (3,), {}, r(2, 3, 4, 4), train
        yield "BatchNorm1d", (3,), {}, r(3), train
        yield "BatchNorm2d", (3,), {}, r(2, 3), train
        yield "BatchNorm2d", (3,), {}, r(2, 3, 4), train
        yield "BatchNorm3d", (3,), {}, r(2, 3, 4, 4), train
        yield "BatchNorm2d", (5,), {}, r(2, 3, 4, 4), train
        yield "BatchNorm2d", (5,), {"track_running_stats": False}, r(2, 3, 4, 4), train
        yield "BatchNorm2d", (5,), {"affine": False}, r(2, 3, 4, 4), train
        yield "BatchNorm2d", (3,), {}, r(1, 3, 1, 1), train
        yield "BatchNorm1d", (3,), {}, r(1, 3), train
        yield "BatchNorm2d", (3,), {"track_running_stats": False}, r(1, 3, 1, 1), train
        for eps in (0.0, -1.0):
            yield "BatchNorm2d", (3,), {"eps": eps}, r(2, 3, 4, 4), train
            yield "GroupNorm", (3, 3), {"eps": eps}, r(2, 3, 4, 4), train
            yield "InstanceNorm2d", (3,), {"eps": eps}, r(2, 3, 4, 4), train
            yield "LayerNorm", (4,), {"eps": eps}, r(2, 3, 4, 4), train
        yield "GroupNorm", (2, 4), {}, r(2, 6, 3), train
        yield "GroupNorm", (2, 4), {}, r(4), train
        yield "GroupNorm", (2, 4), {}, r(2, 5, 3), train
        yield "GroupNorm", (10, 10), {}, r(1, 10, 1), train
        yield "GroupNorm", (10, 10), {}, r(2, 10, 1), train
        yield "GroupNorm", (2, 4), {"affine": False}, r(2, 6, 3), train
        yield "GroupNorm", (4, 4), {"affine": False}, r(2, 6, 3), train
        for kwargs in ({}, {"affine": True}, {"track_running_stats": True}):
            yield "InstanceNorm2d", (3,), kwargs, r(2, 3, 1, 1), train
            yield "InstanceNorm2d", (5,), kwargs, r(2, 3, 4, 4), train
            yield "InstanceNorm2d", (3,), kwargs, r(3, 4), train
            yield "InstanceNorm2d", (3,), kwargs, r(3, 4, 4), train
            yield "InstanceNorm1d", (3,), kwargs, r(2, 3, 4, 4), train
            yield "InstanceNorm1d", (3,), kwargs, r(2, 3, 1), train
            yield "InstanceNorm3d", (3,), kwargs, r(2, 3, 4), train
        yield "LayerNorm", (4,), {}, r(2, 5), train
        yield "LayerNorm", ((2, 4),), {}, r(4), train
        yield "LayerNorm", ((2, 4),), {}, r(4, 2), train
        yield "LayerNorm", ((),), {}, r(4, 2), train
        for name, args, shape in (
            ("BatchNorm2d", (3,), (2, 3, 4, 4)),
            ("GroupNorm", (3, 3), (2, 3, 4, 4)),
            ("InstanceNorm2d", (3, 1e-5, 0.1, True), (2, 3, 4, 4)),
            ("LayerNorm", (4,), (2, 3, 4, 4)),
        ):
            for x_dtype, dtype in (
                (torch.float64, torch.float32),
                (torch.float32, torch.float64),
                (torch.float32, torch.bfloat16),
                (torch.bfloat16, torch.float16),
                (torch.bfloat16, torch.float64),
                (torch.int64, torch.float32),
                (torch.complex64, torch.float32),
            ):
                yield name, args, {"dtype": dtype}, (r(shape) * 4).to(x_dtype), train


CALLS = list(random_calls())


@pytest.mark.fallback(r"has .* channels|eps is 0")
@pytest.mark.parametrize(
    ("name", "args", "kwargs", "x", "train"),
    CALLS,
    ids=[
        f"{name}-{args}-{kwargs}-{tuple(x.shape)}-{x.dtype}-{'train' if train else 'eval'}"
        for name, args, kwargs, x, train in CALLS
    ],
)
def test_odd_calls_end_as_in_torch(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    x: Tensor,
    train: bool,
    device: torch.device,
) -> None:
    """The same exception type and message, the same warnings, or the same values."""
    results = []
    for namespace, settings in ((fastnorm, kwargs), (nn, native_settings(name, kwargs, train))):
        module = outcome(lambda n=namespace, s=settings: getattr(n, name)(*args, **s).to(device).train(train))
        if module[0] == "returned":
            results.append(outcome(lambda m=module[1][0]: m(x.to(device)).detach()))
        else:
            results.append(module)
    assert_same_outcome(*results)


@pytest.mark.parametrize("param", [None, "0.1", [0.1]])
def test_activation_param_is_a_number(param: object) -> None:
    with pytest.raises(TypeError, match="activation_param must be a number"):
        fastnorm.BatchNorm2d(3, activation="leaky_relu", activation_param=param)
