"""LayerNorm2d beside what the tables of cases test of it: layouts, threads, accuracy, compilation, refusals.

tests/models compares it with torchvision's and timm's own classes.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnorm
from fastnorm import _C, ops, plain
from tests.common.cases import DATA, DTYPES, LAYOUTS, MAPS, PRECISIONS, Case, Layer, to_layout
from tests.common.numerics import assert_alike, build, compare, differences, make_inputs, run
from tests.conftest import Backend
from tests.test_accuracy import NOISE, SLACK
from tests.test_parity import strided_views

CPU = torch.device("cpu")
FORMATS = {"planar": torch.contiguous_format, "channels_last": torch.channels_last}


def expected_of(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, eps).movedim(-1, 1)


# Values. (tests/test_parity.py and the suites that take its table have the rest.)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.emulated
@pytest.mark.parametrize("layer", MAPS, ids=lambda layer: layer.id)
def test_keeps_the_memory_format(layer: Layer, layout: str, device: torch.device) -> None:
    case = Case(layer, layout, residual=True, activation="silu")
    inputs = make_inputs(case, device)
    results = run(case, build(case, fastnorm, device), inputs)
    for name in ("y", "dx", "dresidual"):
        assert results[name].is_contiguous(memory_format=FORMATS[layout]), name
        if 1 not in layer.shape:
            assert results[name].stride() == inputs.x.stride(), name


@pytest.mark.emulated
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("layer", MAPS, ids=lambda layer: layer.id)
def test_any_strides(layer: Layer, activation: str, device: torch.device) -> None:
    """Input, residual and incoming gradient may each have a layout of its own."""
    case = Case(layer, activation=activation, residual=True)
    inputs = make_inputs(case, device)
    for field, t in vars(inputs).items():
        views = strided_views(t) | {"channels_last": to_layout(t, "channels_last")}
        for name, view in views.items():
            assert not differences(case, inputs, device, {field: view}), name


@pytest.mark.emulated
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("precision", PRECISIONS, ids="-".join)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_is_at_most_torchs(
    layout: str, precision: tuple[str, str], data: str, device: torch.device, backend: Backend
) -> None:
    """As tests/test_accuracy.py of the other norms. 768 positions have their means far from each other."""
    case = Case(Layer("", "LayerNorm2d", (2, 768, 6, 8), (768,)), layout, precision)
    errors = compare(case, device, data, plain=backend.name == "cpu" and case.dtype != torch.float64)
    slack = 4 if case.dtype == torch.float64 else SLACK[backend.name]
    assert not [str(error) for error in errors if not error.ours <= NOISE * error.native + slack]


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_far_from_their_pivots(dtype: torch.dtype, device: torch.device) -> None:
    """The channels that pivots come from are unlike the others: the sums are taken again about the means."""
    x = torch.randn(2, 64, 9, 9)
    x[:, ::8] += 1000
    x[0, :, 3, 5] += torch.linspace(0, 1e4, 64)
    x = x.to(device, dtype)
    y = fastnorm.functional.layer_norm2d(x)
    exact = expected_of(x.double(), None, None)
    assert_alike(y, exact.to(dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", [(8, 96, 28, 28), (2, 700, 9, 9), (1, 3, 200, 201), (64, 40, 7, 7)])
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    name = next(name for name, value in DTYPES.items() if value == dtype)
    precision = (name, "float64" if name == "float64" else "float32")
    for layout in LAYOUTS:
        for activation in ("relu", "silu"):
            case = Case(Layer("", "LayerNorm2d", shape, shape[1:2]), layout, precision, activation, residual=True)
            inputs = make_inputs(case, CPU)
            expected: dict[str, Tensor] = {}
            for threads in (1, 2, 3, 7, 1):
                torch.set_num_threads(threads)
                results = run(case, build(case, fastnorm, CPU), inputs)
                expected = expected or results
                for key, value in expected.items():
                    assert torch.equal(results[key], value), f"{key}, {layout}, {activation}, {threads} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large(dtype: torch.dtype) -> None:
    """Beyond the caches: outputs that are stored past them."""
    torch.set_num_threads(2)
    precision = ("bfloat16", "float32") if dtype == torch.bfloat16 else ("float32", "float32")
    for layout in LAYOUTS:
        case = Case(Layer("", "LayerNorm2d", (8, 192, 64, 64), (192,)), layout, precision, "relu", residual=True)
        assert not [str(e) for e in compare(case, CPU) if not e.ours <= NOISE * e.native + SLACK["cpu"]]


@pytest.mark.emulated
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_spoil_their_position_alone(value: float, layout: str, device: torch.device) -> None:
    x = to_layout(torch.randn(2, 40, 5, 9, device=device), layout)
    x[1, 7, 2, 3] = value
    norm = fastnorm.LayerNorm2d(40, activation="silu").to(device)
    y = norm(x.requires_grad_())
    (dx,) = torch.autograd.grad(y.sum(), x)
    spoiled = torch.zeros(2, 5, 9, dtype=torch.bool, device=device)
    spoiled[1, 2, 3] = True
    for t in (y, dx):
        assert torch.equal(t.isnan().all(1), spoiled) and torch.equal(t.isfinite().all(1), ~spoiled)


# Derivatives and transforms.


@pytest.mark.emulated
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_gradcheck(layout: str, activation: str | None, device: torch.device) -> None:
    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fastnorm.functional.layer_norm2d(x, weight, bias, activation=activation, residual=residual)

    numbers = functools.partial(torch.randn, dtype=torch.float64, device=device)
    x, residual = (to_layout(numbers(2, 3, 2, 2), layout).requires_grad_() for _ in range(2))
    weight, bias = (numbers(3).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(call, (x, residual, weight, bias))
    assert torch.autograd.gradgradcheck(call, (x, residual, weight, bias))


@pytest.mark.fallback
def test_torch_func_and_forward_mode() -> None:
    norm = fastnorm.LayerNorm2d(6, dtype=torch.float64)
    x, t = (torch.randn(2, 6, 3, 4, dtype=torch.float64) for _ in range(2))
    actual = torch.func.jvp(norm, (x,), (t,))
    assert_alike(actual, torch.func.jvp(lambda x: expected_of(x, norm.weight, norm.bias), (x,), (t,)))
    assert_alike(torch.vmap(norm)(torch.stack([x, t])), torch.stack([norm(x), norm(t)]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 6, 1, 1), (2, 1, 5, 4), (2, 6, 40, 1)])
def test_operators(shape: tuple[int, ...], layout: str) -> None:
    """torch.library.opcheck, and fake tensors with the real ones' sizes and strides."""
    x, residual = (to_layout(torch.randn(shape), layout) for _ in range(2))
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    settings = (0, ops.NORMALIZED_CHANNELS, 1e-6, 1, 0.01)
    args = (x, weight, bias, residual, None, None, *settings, True)
    torch.library.opcheck(ops.norm_forward, args)
    y, stats, mask = ops.norm_forward(*args)
    assert stats.shape == (ops.STATS_ROWS, shape[0] * shape[2] * shape[3])
    backward = (y, x, weight, bias, None, stats, mask, *settings, False, [True, True, True])
    torch.library.opcheck(ops.norm_backward, backward)
    for op, values in ((ops.norm_forward, args), (ops.norm_backward, backward)):
        real = op(*values)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in values))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_whole(layout: str) -> None:
    norm = fastnorm.LayerNorm2d(6, activation="gelu")
    x, residual = (to_layout(torch.randn(2, 6, 5, 4), layout).requires_grad_() for _ in range(2))
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    y = compiled(x, residual)
    assert y.stride() == x.stride()
    assert_alike(y, norm(x, residual))
    leaves = [x, residual, *norm.parameters()]
    actual, expected = (torch.autograd.grad(f(x, residual).square().sum(), leaves) for f in (compiled, norm))
    assert_alike(actual, expected)


@pytest.mark.parametrize("mode", ["torch", "keep"])
def test_autocast(mode: Any) -> None:
    """As torch's layer norm where torch's widens, so that a conversion changes no dtype."""
    norm, x = fastnorm.LayerNorm2d(6), torch.randn(2, 6, 5, 4).bfloat16()
    fastnorm.set_autocast_mode(mode)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            y, native = norm(x), fastnorm.functional.layer_norm(x.movedim(1, -1), (6,), norm.weight, norm.bias)
    finally:
        fastnorm.set_autocast_mode("torch")
    assert y.dtype == native.dtype


def test_scripts_and_traces() -> None:
    norm, x = fastnorm.LayerNorm2d(6, activation="relu"), torch.randn(2, 6, 5, 4)
    assert_alike(torch.jit.script(norm)(x), norm(x))
    assert_alike(torch.fx.symbolic_trace(nn.Sequential(norm))(x), norm(x))


# The module and the function.


def test_construction() -> None:
    norm = fastnorm.LayerNorm2d(6)
    assert repr(norm) == repr(nn.LayerNorm(6, eps=1e-6)).replace("LayerNorm", "LayerNorm2d")
    assert [(name, p.shape) for name, p in norm.named_parameters()] == [("weight", (6,)), ("bias", (6,))]
    assert fastnorm.LayerNorm2d(6, bias=False).bias is None
    assert fastnorm.LayerNorm2d(6, elementwise_affine=False).weight is None
    assert fastnorm.LayerNorm2d(6, 1e-3, device="meta", dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    assert isinstance(norm, nn.LayerNorm)
    with pytest.raises(ValueError, match="swish"):
        fastnorm.LayerNorm2d(6, activation="swish")
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(copied) is fastnorm.LayerNorm2d


def test_function_is_the_module() -> None:
    norm, x, residual = (
        fastnorm.LayerNorm2d(6, activation="leaky_relu", activation_param=0.3),
        *torch.randn(2, 2, 6, 5, 4),
    )
    nn.init.normal_(norm.weight)
    y = fastnorm.functional.layer_norm2d(
        x, norm.weight, norm.bias, activation="leaky_relu", activation_param=0.3, residual=residual
    )
    assert torch.equal(y, norm(x, residual))


@pytest.mark.fallback("x is empty or not")
@pytest.mark.parametrize("shape", [(6,), (2, 6), (6, 5, 4), (2, 6, 5, 4, 3), (2, 5, 6, 4)])
def test_other_shapes_are_refused_as_torch_refuses_them(shape: tuple[int, ...]) -> None:
    norm, x = fastnorm.LayerNorm2d(6), torch.randn(shape)
    with pytest.raises(RuntimeError) as native:
        plain.LayerNorm2d(6)(x)
    with pytest.raises(RuntimeError) as ours:
        norm(x)
    assert str(ours.value) == str(native.value)


@pytest.mark.fallback("x is empty")
@pytest.mark.parametrize("shape", [(0, 6, 5, 4), (2, 6, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert fastnorm.LayerNorm2d(6)(torch.randn(shape)).shape == shape


def test_plans() -> None:
    sizes = ("layer", 8, 96, 3136, 1, False)
    assert "columns, chunks of 320 positions" in _C.plan(*sizes, "float32", 1, 1 << 20, 1 << 25, 2, 1)


def test_reverts_to_torchs_operators() -> None:
    x = torch.randn(2, 6, 5, 4)
    for activation in (None, "silu"):
        net = nn.Sequential(fastnorm.LayerNorm2d(6, activation=activation))
        y, parameters = net(x), list(net.parameters())
        fastnorm.revert(net)
        assert isinstance(net[0], plain.LayerNorm2d) and not isinstance(net[0], fastnorm.LayerNorm2d)
        assert_alike(net(x), y)
        fastnorm.convert(net)
        assert type(net[0]) is fastnorm.LayerNorm2d and torch.equal(net(x), y)
        assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert [(row.layer, row.status) for row in fastnorm.report(net)] == [("LayerNorm2d", "served")]
