"""Who answers a call: what the kernels refuse, torch answers, visibly; every other exception reaches the user as it is,
and leaves the running statistics as torch.nn leaves them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm
from fastnorm import dispatch, functional
from fastnorm.dispatch import Unsupported
from tests.common.cases import TYPICAL, Layer

TRACKING = {
    "BatchNorm1d": lambda ns: ns.BatchNorm1d(3),
    "BatchNorm2d": lambda ns: ns.BatchNorm2d(3),
    "cumulative": lambda ns: ns.BatchNorm2d(3, momentum=None),
    "InstanceNorm2d": lambda ns: ns.InstanceNorm2d(3, affine=True, track_running_stats=True),
    "LayerNorm": lambda ns: ns.LayerNorm(5),
    "GroupNorm": lambda ns: ns.GroupNorm(1, 3),
}
each_norm = pytest.mark.parametrize("make", TRACKING.values(), ids=TRACKING.keys())
Make = Callable[[Any], nn.Module]


def input_of(module: nn.Module) -> Tensor:
    shape = (4, 3, 5) if isinstance(module, nn.BatchNorm1d) else (4, 3, 5, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def outcome(module: nn.Module, call: Callable[[], object]) -> tuple[type[Exception] | None, str, dict[str, Tensor]]:
    """The exception of a call, and what it left in the buffers."""
    try:
        call()
        raised: tuple[type[Exception] | None, str] = (None, "")
    except Exception as error:
        raised = type(error), str(error)
    return *raised, {name: b.clone() for name, b in module.named_buffers()}


def assert_same_outcome(make: Make, run: Callable[[nn.Module], object]) -> None:
    native, ours = (make(ns) for ns in (nn, fastnorm))
    expected, actual = (outcome(module, lambda m=module: run(m)) for module in (native, ours))
    assert actual[:2] == expected[:2]
    torch.testing.assert_close(actual[2], expected[2])


class Budget(Exception):
    pass


# What user code raises inside a call.


@each_norm
@pytest.mark.parametrize("error", [RuntimeError, TypeError, AttributeError, LookupError, NotImplementedError, Budget])
def test_what_a_pack_hook_raises_reaches_the_user(make: Make, error: type[Exception]) -> None:
    """On the input: torch.nn has counted the batch by then, and has not moved the statistics."""

    def run(module: nn.Module) -> None:
        def pack(t: Tensor) -> Tensor:
            raise error("activation budget exceeded")

        with saved_tensors_hooks(pack, lambda t: t):
            module(input_of(module).requires_grad_())

    assert_same_outcome(make, run)


@each_norm
def test_a_pack_hook_that_raises_on_a_result_finds_the_statistics_moved(make: Make) -> None:
    def run(module: nn.Module) -> None:
        packed: list[Tensor] = []
        with saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
            make(fastnorm if isinstance(module, fastnorm.modules.Norm) else nn)(input_of(module).requires_grad_())
        last = len(packed)

        def pack(t: Tensor) -> Tensor:
            packed.append(t)
            if len(packed) == 2 * last:
                raise Budget("no room for results")
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            module(input_of(module).requires_grad_())

    assert_same_outcome(make, run)


@each_norm
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_packed_tensors_give_the_same_gradients(make: Make, activation: str | None) -> None:
    """Whatever hooks do to what is saved: here it comes back as a copy, in another layout."""
    module = make(fastnorm)
    if activation is not None:
        module._fuses, module.activation, module.activation_param = True, activation, 0.0
    x, residual = input_of(module).requires_grad_(), torch.randn_like(input_of(module)).requires_grad_()
    leaves = [x, residual, *module.parameters()]
    expected = torch.autograd.grad(module(x, residual).square().sum(), leaves)

    def unpack(t: Tensor) -> Tensor:
        t = t.clone()
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    with saved_tensors_hooks(lambda t: t.clone(), unpack):
        y = module(x, residual)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaves, retain_graph=True), expected)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaves), expected)


@each_norm
def test_an_inference_tensor_cannot_be_saved(make: Make) -> None:
    def run(module: nn.Module) -> None:
        with torch.inference_mode():
            x = input_of(module)
        module(x)

    assert_same_outcome(make, run)


@each_norm
@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyError, Budget])
def test_what_a_dispatch_mode_raises_reaches_the_user(make: Make, error: type[Exception]) -> None:
    class Mode(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "norm" in str(func):
                Mode.calls += 1
                raise error("not on my watch")
            return func(*args, **(kwargs or {}))

    module = make(fastnorm)
    x = input_of(module).requires_grad_()
    with Mode(), pytest.raises(error, match="not on my watch"):
        module(x)
    assert Mode.calls == 1


def test_a_slip_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped attribute must not turn the product off."""
    module = fastnorm.LayerNorm(4)
    monkeypatch.setattr(fastnorm.LayerNorm, "_affine", lambda self: self.wieght)
    with pytest.raises(AttributeError, match="wieght"):
        module(torch.randn(2, 4))


# Refusals.


BAD_ARGUMENTS: dict[str, tuple[Callable[[Any], nn.Module], Tensor]] = {
    "eps is a string": (lambda ns: ns.BatchNorm2d(3, eps="a"), torch.randn(2, 3, 4, 4)),
    "eps of a layer norm": (lambda ns: ns.LayerNorm(4, eps="a"), torch.randn(2, 4)),
    "momentum is a string": (lambda ns: ns.BatchNorm1d(3, momentum="a"), torch.randn(2, 3)),
    "other channels": (lambda ns: ns.BatchNorm2d(5), torch.randn(2, 3, 4, 4)),
    "integers": (lambda ns: ns.LayerNorm(4), torch.ones(2, 4, dtype=torch.int64)),
    "double": (lambda ns: ns.GroupNorm(1, 3), torch.randn(2, 3, 4, dtype=torch.float64)),
    "one value": (lambda ns: ns.BatchNorm1d(3), torch.randn(1, 3)),
    "dims": (lambda ns: ns.InstanceNorm2d(3), torch.randn(3)),
    "another shape": (lambda ns: ns.LayerNorm(5), torch.randn(2, 4)),
    "not a tensor": (lambda ns: ns.LayerNorm(4), "abc"),
}


@pytest.mark.parametrize(("make", "x"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_what_torch_rejects_it_rejects_in_its_words(make: Make, x: Any) -> None:
    assert_same_outcome(make, lambda module: module(x))


def on_meta(name: str) -> Callable[[nn.Module], None]:
    def run(module: nn.Module) -> None:
        tensor = getattr(module, name).to("meta")
        setattr(module, name, nn.Parameter(tensor) if isinstance(getattr(module, name), nn.Parameter) else tensor)
        module(input_of(module))

    return run


@pytest.mark.fallback
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_tensors_of_another_device(name: str, momentum: float | None) -> None:
    """torch rejects them, having counted the batch; the statistics that it can move, it moves."""
    assert_same_outcome_but_meta(lambda ns: ns.BatchNorm2d(3, momentum=momentum), on_meta(name))


def assert_same_outcome_but_meta(make: Make, run: Callable[[nn.Module], object]) -> None:
    native, ours = (make(ns) for ns in (nn, fastnorm))
    expected, actual = (outcome(module, lambda m=module: run(m)) for module in (native, ours))
    assert actual[:2] == expected[:2]
    for key, value in expected[2].items():
        if value.device.type != "meta":
            torch.testing.assert_close(actual[2][key], value)


@pytest.mark.fallback("NestedTensor")
def test_a_nested_tensor_is_torchs() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)])
    assert fastnorm.LayerNorm(5)(nested).is_nested


@pytest.mark.fallback("eps is 0")
def test_an_instance_norm_of_constants_without_eps() -> None:
    assert torch.equal(fastnorm.InstanceNorm2d(3, eps=0.0)(torch.ones(2, 3, 4, 4)), torch.zeros(2, 3, 4, 4))


FUNCTIONAL: dict[str, tuple[str, tuple[Any, ...]]] = {
    "weight is a list": ("layer_norm", (torch.randn(2, 4), [4], [1.0] * 4)),
    "no groups": ("group_norm", (torch.randn(2, 4, 3), 0)),
    "groups is a float": ("group_norm", (torch.randn(2, 4, 3), 2.0)),
    "normalized_shape is a number": ("layer_norm", (torch.randn(2, 4), 4)),
    "normalized_shape of strings": ("layer_norm", (torch.randn(2, 4), ["4"])),
    "empty normalized_shape": ("layer_norm", (torch.randn(2, 4), [])),
    "one dim": ("instance_norm", (torch.randn(4),)),
    "momentum is None": ("batch_norm", (torch.randn(2, 4), None, None, None, None, True, None)),
    "running_mean alone": ("batch_norm", (torch.randn(4, 4), torch.zeros(4), None, None, None, True)),
}


@pytest.mark.parametrize(("name", "args"), FUNCTIONAL.values(), ids=FUNCTIONAL.keys())
def test_functions_reject_what_torch_rejects(name: str, args: tuple[Any, ...]) -> None:
    expected, actual = (
        outcome(nn.Identity(), lambda place=place: getattr(place, name)(*args))[:2]
        for place in (nn.functional, functional)
    )
    assert expected[0] is not None and actual[0] is expected[0]


@pytest.mark.fallback
def test_a_refusal_moves_nothing_twice() -> None:
    """Buffers that overlap are torch's to move: the kernels must not have moved them before."""

    def run(module: nn.Module) -> None:
        shared = torch.zeros(3)
        module.running_mean, module.running_var = shared, shared
        module(input_of(module))

    assert_same_outcome(lambda ns: ns.BatchNorm2d(3), run)


@pytest.mark.parametrize("layer", TYPICAL, ids=lambda layer: layer.norm)
def test_strict_raises_on_a_fallback(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "strict", True)
    module = layer.build(fastnorm)
    x = torch.randn(layer.shape)
    jvp = lambda: torch.func.jvp(module.eval(), (x,), (x,))  # noqa: E731
    with pytest.raises(Unsupported, match=r"left to torch: .*torch\.func"):
        jvp()
    monkeypatch.setattr(dispatch, "strict", False)
    jvp()


def test_unsupported_is_one_type() -> None:
    assert issubclass(Unsupported, NotImplementedError)
    with pytest.raises(NotImplementedError, match="fastnorm: x has dtype"):
        torch.ops.fastnorm.norm_forward(
            torch.ones(2, 3, dtype=torch.int32), None, None, None, None, None, 0, 0, 1e-5, 0, 0.0, False
        )


# What is seen of them.


@pytest.mark.fallback
def test_report_tells_can_be_served_from_was_served() -> None:
    model = fastnorm.convert(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.LayerNorm(48), nn.RMSNorm(48)))
    assert [row.calls for row in fastnorm.report(model)] == ["none", "none", "none"]
    assert "can be served" in str(fastnorm.report(model)) and "calls" in str(fastnorm.report(model))
    model(torch.randn(2, 3, 4, 4))
    model(torch.randn(0, 3, 4, 4))
    model(torch.randn(2, 3, 4, 4))
    batch, layer, rms = fastnorm.report(model)
    assert (batch.status, batch.served_calls, batch.left_calls) == ("served", 2, 1)
    assert (layer.served_calls, layer.left_calls, layer.calls) == (2, 1, "2 served, 1 left")
    assert (rms.status, rms.served_calls, rms.left_calls) == ("left", 0, 0)
    assert "4 of 6 calls so far were" in str(fastnorm.report(model))


@pytest.mark.fallback
def test_counts_are_no_state() -> None:
    """Not of a copy, not of a pickle, not of a reverted module."""
    import copy
    import pickle

    module = fastnorm.LayerNorm(4)
    module(torch.randn(2, 4))
    module(torch.randn(0, 4))
    (row,) = fastnorm.report(module)
    assert (row.served_calls, row.left_calls) == (1, 1)
    for other in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert [row.calls for row in fastnorm.report(other)] == ["none"]
    plain = vars(nn.LayerNorm(4)).keys()
    assert vars(fastnorm.revert(module)).keys() == plain


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("FASTNORM_")}
    return subprocess.run([sys.executable, "-c", code], env=plain | environment, capture_output=True, text=True)


EMPTY_CALLS = """
import torch, fastnorm
layer, batch = fastnorm.LayerNorm(4), fastnorm.BatchNorm1d(4)
for _ in range(3):
    layer(torch.randn(0, 4)), batch(torch.randn(0, 4)), layer(torch.randn(2, 4))
"""


def test_log_prints_a_line_for_every_distinct_reason() -> None:
    done = run_python(EMPTY_CALLS, FASTNORM_LOG="fallback")
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and len(lines) == 2, done.stderr
    assert lines[0].startswith("fastnorm: LayerNorm left to torch: x is empty")
    assert lines[1].startswith("fastnorm: BatchNorm1d left to torch: x has shape [0, 4]")
    assert run_python(EMPTY_CALLS).stderr == ""


def test_strict_is_set_by_the_environment() -> None:
    done = run_python(EMPTY_CALLS, FASTNORM_STRICT="1")
    assert done.returncode == 1 and "Unsupported: LayerNorm was left to torch: x is empty" in done.stderr
    assert run_python(EMPTY_CALLS, FASTNORM_STRICT="0").returncode == 0
