"""The modules inside training: in-place changes, saved tensors, autocast, inference mode, checkpointing."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastnorm
from tests.common.cases import TYPICAL, Case, Layer
from tests.common.numerics import build, call, make_inputs, run

pytestmark = pytest.mark.emulated


@pytest.fixture(params=TYPICAL, ids=lambda layer: layer.norm)
def layer(request: pytest.FixtureRequest) -> Layer:
    result: Layer = request.param
    return result


def gradients(y: Tensor, module: nn.Module, *leaves: Tensor) -> list[Tensor]:
    wanted = [*leaves, *module.parameters()]
    return list(torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)))


@pytest.mark.parametrize("activation", [None, "relu", "silu", "tanh", "sigmoid", "hardswish"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_output_may_be_changed_in_place(
    layer: Layer, activation: str | None, with_residual: bool, device: torch.device
) -> None:
    """out += x; out.relu_(): backward must not depend on the output."""
    case = Case(layer, activation=activation, residual=with_residual)
    module, inputs = build(case, fastnorm, device), make_inputs(case, device)
    expected, actual = [], []
    for results, in_place in ((expected, False), (actual, True)):
        x = inputs.x.detach().requires_grad_()
        twin = copy.deepcopy(module)
        y = call(case, twin, x, inputs.residual)
        y = y.add_(x).mul_(2).relu_() if in_place else (y + x).mul(2).relu()
        results += gradients(y, twin, x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_input_may_not_be_changed_in_place(layer: Layer, device: torch.device) -> None:
    """As in torch.nn: an input changed after the call is noticed in backward."""
    case = Case(layer)
    for namespace in (nn, fastnorm):
        module = build(case, namespace, device)
        x = make_inputs(case, device).x.requires_grad_().clone()
        y = module(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_weight_and_residual_may_not_be_changed_in_place(device: torch.device) -> None:
    case = Case(TYPICAL[1], activation="silu", residual=True)
    module = build(case, fastnorm, device)
    inputs = make_inputs(case, device)
    y = module(inputs.x.requires_grad_(), inputs.residual)
    with torch.no_grad():
        module.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = module(inputs.x, inputs.residual)
    inputs.residual.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("norm", ["batch_norm", "group_norm"])
def test_a_bias_changed_in_place_keeps_no_graph(norm: str, device: torch.device) -> None:
    """Without an activation the bias's values are not kept, so what the bias becomes must not keep the node."""
    for is_variable in (False, True):
        bias = torch.zeros(6, device=device, requires_grad=is_variable) * 1
        x = torch.randn(4, 6, 3, device=device).requires_grad_()
        arguments = (3,) if norm == "group_norm" else (None, None)
        settings = {"bias": bias} if norm == "group_norm" else {"bias": bias, "training": True}
        y = getattr(fastnorm.functional, norm)(x, *arguments, **settings)
        bias.add_(y.square().sum())
        alive = weakref.ref(x)
        del x, y, bias, settings
        assert alive() is None


def test_running_statistics_may_move_before_backward(device: torch.device) -> None:
    """Two forwards, then two backwards, in training and in frozen mode after training: no error, right values."""
    for namespace_results in zip(*(two_forwards(n, device) for n in (fastnorm, nn)), strict=True):
        torch.testing.assert_close(*namespace_results)


def two_forwards(namespace: object, device: torch.device) -> Iterator[Tensor]:
    case = Case(TYPICAL[0])
    module = build(case, namespace, device)
    x = make_inputs(case, device).x.requires_grad_()
    first, second = module(x), module(x * 2)
    yield from gradients(first, module, x)
    yield from gradients(second, module, x)


def test_frozen_statistics_are_those_of_the_call(device: torch.device) -> None:
    """The statistics of an eval-mode forward, though the buffers change before backward."""
    case = Case(TYPICAL[0], mode="frozen")
    module, inputs = build(case, fastnorm, device), make_inputs(case, device)
    expected = run(case, copy.deepcopy(module), inputs)["dx"]
    x = inputs.x.requires_grad_()
    y = module(x)
    module.running_var.data.fill_(100.0)
    (dx,) = torch.autograd.grad(y, x, inputs.grad)
    torch.testing.assert_close(dx, expected)


def test_backward_twice(layer: Layer, device: torch.device) -> None:
    module = build(Case(layer), fastnorm, device)
    x = make_inputs(Case(layer), device).x.requires_grad_()
    loss = module(x).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, x)[0])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_graph_is_freed(layer: Layer, device: torch.device) -> None:
    """No reference cycle keeps the input alive."""
    case = Case(layer, activation="relu", residual=True)
    module, inputs = build(case, fastnorm, device), make_inputs(case, device)
    gc.collect()
    gc.disable()
    try:
        x = inputs.x.clone().requires_grad_()
        reference = weakref.ref(x)
        y = call(case, module, x, inputs.residual)
        y.sum().backward()
        del x, y
        assert reference() is None
    finally:
        gc.enable()


def test_saved_tensor_hooks(layer: Layer, device: torch.device) -> None:
    """What backward needs goes through save_for_backward, so that offloading sees it."""
    case = Case(layer, activation="silu", residual=True)
    module, inputs = build(case, fastnorm, device), make_inputs(case, device)
    expected = run(case, copy.deepcopy(module), inputs)
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = run(case, module, inputs)
    assert inputs.x.shape in packed
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
    """The dtypes of torch.nn's output: autocast leaves the norms alone on the CPU, and widens some of them on a GPU."""
    outputs = []
    for namespace in (nn, fastnorm):
        module = build(Case(layer), namespace, device)
        x = make_inputs(Case(layer), device).x.to(dtype).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            y = module(x)
        outputs.append((y, *gradients(y.float(), module, x)[:1]))
    for theirs, ours in zip(*outputs, strict=True):
        # dx is a difference of terms of the gradient's size, which a GPU's torch.nn rounds on the way. There both have
        # rounded in the end.
        roundings = 2 if device.type == "cuda" else 1
        rounding = roundings * torch.finfo(theirs.dtype).eps * float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=max(rounding, 1e-5))


@pytest.mark.fallback(r"residual has dtype")
def test_autocast_with_a_residual_of_another_dtype(layer: Layer, device: torch.device) -> None:
    """Under autocast a branch may come in bfloat16 and the skip in float32: torch would promote."""
    case = Case(layer, activation="relu", residual=True)
    inputs = make_inputs(case, device)
    for x, residual in (
        (inputs.x.bfloat16(), inputs.residual),
        (inputs.x, inputs.residual.bfloat16()),
    ):
        try:
            native = call(case, build(case, nn, device), x, residual)
        except RuntimeError as error:  # a group or layer norm on a GPU: its parameters are float32, and x is not
            with pytest.raises(RuntimeError, match=f"^{re.escape(str(error))}$"):
                call(case, build(case, fastnorm, device), x, residual)
        else:
            torch.testing.assert_close(call(case, build(case, fastnorm, device), x, residual), native)


@pytest.mark.fallback(r"residual has shape")
def test_broadcast_residual(layer: Layer, device: torch.device) -> None:
    """A residual that torch would broadcast gets its gradient summed."""
    case = Case(layer, activation="silu", residual=True)
    results = []
    for namespace in (fastnorm, nn):
        inputs = make_inputs(case, device)
        residual = inputs.residual[:1].clone().requires_grad_()
        y = call(case, build(case, namespace, device), inputs.x, residual)
        results.append((y, *torch.autograd.grad(y, residual, inputs.grad)))
    torch.testing.assert_close(*results)


def test_residual_is_the_input(layer: Layer, device: torch.device) -> None:
    """x + norm(x): one tensor in both roles."""
    case = Case(layer, activation="relu", residual=True)
    results = []
    for namespace in (fastnorm, nn):
        x = make_inputs(case, device).x.requires_grad_()
        y = call(case, build(case, namespace, device), x, x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(*results)


def test_inference_mode(layer: Layer, device: torch.device) -> None:
    for mode in ("train", "eval"):
        case = Case(layer, mode=mode, activation="relu", residual=True)
        inputs = make_inputs(case, device)
        expected = call(case, build(case, fastnorm, device), inputs.x, inputs.residual)
        with torch.inference_mode():
            y = call(case, build(case, fastnorm, device), inputs.x, inputs.residual)
        assert y.is_inference() and not y.requires_grad
        assert torch.equal(y.clone(), expected)


def test_no_grad_builds_no_graph(layer: Layer, device: torch.device) -> None:
    module = build(Case(layer), fastnorm, device)
    x = make_inputs(Case(layer), device).x
    with torch.no_grad():
        assert module(x).grad_fn is None
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert module(x).grad_fn is None
    assert module(x.requires_grad_()).grad_fn is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(layer: Layer, reentrant: bool, device: torch.device) -> None:
    """Values and, as in torch.nn, running statistics that move twice."""
    case = Case(layer, activation="silu")
    states = []
    for namespace in (fastnorm, nn):
        module, inputs = build(case, namespace, device), make_inputs(case, device)
        x = inputs.x.requires_grad_()

        def block(x: Tensor, m: nn.Module = module) -> Tensor:
            return call(case, m, x, None)

        y = checkpoint(block, x, use_reentrant=reentrant)
        y.square().sum().backward()
        states.append((y, x.grad, [p.grad for p in module.parameters()], module.state_dict()))
    torch.testing.assert_close(*states)
