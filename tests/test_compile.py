"""torch.library.opcheck, torch.compile(fullgraph=True) and torch.export. Few inductor cases: each compiles C++.

test_compile_frames.py counts the graphs; test_fuse_life.py compiles a fused model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from tests.common.cases import PRECISIONS, TYPICAL, Case, Layer, modes
from tests.common.numerics import as_fastnorm_lays_out, assert_alike, build, make_inputs, run

ops = torch.ops.fastnorm


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fastnorm.set_compile_mode("kernel")  # on a GPU too, where "auto" decomposes evaluation: see test_settings.py
    yield
    fastnorm.set_compile_mode("auto")
    torch._dynamo.reset()


# opcheck: schema, autograd registration, fake tensors, and AOT dispatch.


def forward_args(layer: Layer, **changes: Any) -> tuple[Any, ...]:
    x = torch.randn(layer.shape)
    groups, normalized_dims = {"B": (0, 0), "G": (3, 0), "I": (5, 0), "L": (0, 1)}[layer.norm[0]]
    channels = layer.shape[-1] if normalized_dims else layer.shape[1]
    args: dict[str, Any] = {
        "x": x,
        "weight": torch.rand(channels),
        "bias": torch.rand(channels),
        "residual": torch.randn_like(x),
        "mean": None,
        "var": None,
        "groups": groups,
        "normalized_dims": normalized_dims,
        "eps": 1e-5,
        "activation": 1,
        "activation_param": 0.01,
        "save_mask": True,
    }
    return tuple((args | changes).values())


@pytest.mark.parametrize("layer", TYPICAL, ids=lambda layer: layer.norm)
@pytest.mark.parametrize("layout", ["planar", "channels_last", "strided", "bfloat16"])
def test_opcheck_forward_and_backward(layer: Layer, layout: str) -> None:
    x = torch.randn(layer.shape)
    if layout == "channels_last" and len(layer.shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        x = torch.randn(*layer.shape[:-1], 2 * layer.shape[-1])[..., ::2]
    residual = torch.randn_like(x)
    if layout == "bfloat16":
        x, residual = x.bfloat16(), residual.bfloat16()
    args = forward_args(layer, x=x, residual=residual)
    torch.library.opcheck(ops.norm_forward.default, args)
    y, stats, mask = ops.norm_forward(*args)
    _, weight, bias, _, _, _, *settings, _ = args
    for output_mask in ([True, True, True], [True, False, False], [False, True, False]):
        common = (y, x, weight, bias, None, stats, mask, *settings, False)
        torch.library.opcheck(ops.norm_backward.default, (*common, output_mask))


def test_opcheck_variants() -> None:
    layer = TYPICAL[0]
    statistics = {"mean": torch.rand(6), "var": torch.rand(6)}
    for changes in (
        statistics,
        {"weight": None, "bias": None},
        {"weight": None},
        {"residual": None, "activation": 3},
        {"save_mask": False},
        {"x": torch.randn(0, 6, 5, 4), "residual": None},
        {"x": torch.randn(3, 6, 5, 4).double(), "residual": None, "weight": None, "bias": None},
    ):
        torch.library.opcheck(ops.norm_forward.default, forward_args(layer, **changes))


def test_opcheck_statistics() -> None:
    buffers = (torch.rand(6), torch.rand(6), torch.tensor(2))
    torch.library.opcheck(ops.update_running_stats_.default, (*buffers, torch.rand(4, 6), 9, 0.1))
    torch.library.opcheck(ops.update_running_stats_.default, (*buffers, torch.rand(4, 12), 9, None))
    torch.library.opcheck(ops.update_running_stats_.default, (*buffers[:2], None, torch.rand(4, 6), 9, 0.5))
    x, weight, bias = torch.randn(2, 6, 4), torch.rand(6), torch.rand(6)
    torch.library.opcheck(ops.batch_norm_forward_.default, (x, weight, bias, None, *buffers, 1e-5, 1, 0.0, False, 0.1))
    torch.library.opcheck(ops.moments.default, (torch.randn(2, 3, 4),))
    torch.library.opcheck(ops.moments.default, (torch.randn(2, 3, 4, 5).bfloat16(),))


@pytest.mark.parametrize("layer", TYPICAL, ids=lambda layer: layer.norm)
def test_fake_strides_are_the_real_ones(layer: Layer) -> None:
    """Memory formats that opcheck's own inputs do not reach."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    base = torch.randn(layer.shape)
    variants = [
        base,
        base.transpose(0, -1).contiguous().transpose(0, -1),
        base[:1].expand(layer.shape),
    ]
    if base.dim() == 4:
        variants.append(base.contiguous(memory_format=torch.channels_last))
        variants.append(base[..., :1])
        variants.append(base.contiguous(memory_format=torch.channels_last)[..., :1])
        # Channels last, though view_as gives the batch of one a stride of C.
        variants.append(variants[3][:1].clone().view_as(base[:1]))
    for x in variants:
        args = forward_args(layer, x=x, residual=None, activation=0)
        if layer.norm == "LayerNorm":
            args = forward_args(layer, x=x, residual=None, weight=None, bias=None)
        real = ops.norm_forward(*args)
        with FakeTensorMode() as mode:
            fake_args = (mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
            fake = ops.norm_forward(*fake_args)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


# torch.compile.

CUMULATIVE = Layer("cumulative", "BatchNorm2d", (3, 6, 5, 4), (6,), (("momentum", None),))


def strides(results: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: t.stride() for name, t in results.items()}


def assert_compiles(case: Case, backend: str, device: torch.device, **options: Any) -> None:
    """Values, gradients and running statistics of three steps equal those without compilation, strides torch.nn's."""
    eager, inputs = build(case, fastnorm, device), make_inputs(case, device)
    native = run(case, build(case, torch.nn, device), inputs)
    expected_strides = strides(as_fastnorm_lays_out(case, native, inputs))
    compiled = copy.deepcopy(eager)
    compiled.forward = torch.compile(compiled.forward, backend=backend, fullgraph=True, **options)
    for _ in range(3):
        expected, actual = run(case, eager, inputs), run(case, compiled, inputs)
        torch.testing.assert_close(actual, expected)
        assert strides(actual) == strides(expected) == expected_strides


AOT_CASES = [
    Case(layer, layout, precision, "relu" if residual else "silu", residual, mode)
    for layer in TYPICAL
    for mode in modes(layer)
    for layout in layer.layouts
    for precision, residual in ((PRECISIONS[1], True), (PRECISIONS[2], False))
]


@pytest.mark.parametrize("case", AOT_CASES, ids=lambda case: case.id)
def test_compiles_ahead_of_time(case: Case, device: torch.device) -> None:
    assert_compiles(case, "aot_eager", device)


@pytest.mark.parametrize(
    "layer",
    [
        CUMULATIVE,
        Layer("untracked", "BatchNorm2d", (3, 6, 5, 4), (6,), (("track_running_stats", False),)),
        Layer("not affine", "BatchNorm1d", (3, 6, 5), (6,), (("affine", False),)),
        Layer("tracked", "InstanceNorm2d", (3, 6, 5, 4), (6,), (("track_running_stats", True),)),
        Layer("no batch", "InstanceNorm2d", (6, 5, 4), (6,), (("affine", True),)),
        Layer("two dims", "LayerNorm", (3, 5, 6), ((5, 6),)),
    ],
    ids=lambda layer: layer.id,
)
def test_variants_compile(layer: Layer, device: torch.device) -> None:
    assert_compiles(Case(layer), "aot_eager", device)


@pytest.mark.parametrize(
    "case",
    [
        Case(TYPICAL[0], "channels_last", activation="relu", residual=True),
        Case(TYPICAL[1], "planar", PRECISIONS[2], "silu"),
        Case(TYPICAL[2], "channels_last", activation="leaky_relu"),
        Case(TYPICAL[3], "planar", activation="gelu"),
        Case(CUMULATIVE),
        Case(CUMULATIVE, "channels_last", mode="eval"),
    ],
    ids=lambda case: case.id,
)
def test_compiles_with_inductor(case: Case, device: torch.device) -> None:
    assert_compiles(case, "inductor", device)


def test_dynamic_shapes_with_inductor(device: torch.device) -> None:
    """A graph whose sizes are symbols, run at several: it calls the kernels between operators that inductor makes."""
    batch, instance = fastnorm.BatchNorm2d(4, momentum=None, activation="relu"), fastnorm.InstanceNorm2d(4, affine=True)
    model = nn.Sequential(batch, nn.Softsign(), instance).to(device)
    compiled = torch.compile(copy.deepcopy(model), backend="inductor", fullgraph=True, dynamic=True)
    for samples, size in ((2, 6), (3, 5), (5, 9)):
        x = torch.randn(samples, 4, size, size, device=device, requires_grad=True)
        results = []
        for m in (compiled, model):
            y = m(x)
            gradients = torch.autograd.grad(y.pow(3).sum(), [x, *m.parameters()])
            results.append([y, *gradients, *m.buffers()])
        assert_alike(*results)
        assert [t.stride() for t in results[0]] == [t.stride() for t in results[1]]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_dynamic_shapes_compile_once(device: torch.device) -> None:
    model = nn.Sequential(fastnorm.BatchNorm2d(4, activation="relu"), fastnorm.GroupNorm(2, 4), nn.Flatten(1, 2)).to(
        device
    )
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, size in ((2, 6), (3, 5), (4, 9)):
        x = torch.randn(batch, 4, size, size, device=device)
        torch.testing.assert_close(compiled(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_dynamic_channels(device: torch.device) -> None:
    """After `+ x` every size is symbolic, the number of channels too: InstanceNorm's groups must not be. And an
    autograd.Function in dynamo's own trace failed from the third norm in a row on."""
    norms = nn.Sequential(*(fastnorm.InstanceNorm2d(4) for _ in range(4)), fastnorm.BatchNorm2d(4)).to(device)
    norms.append(fastnorm.GroupNorm(2, 4).to(device))

    def block(x: torch.Tensor) -> torch.Tensor:
        for norm in norms:
            x = norm(norm(norm(x + 1))) + x
        return x

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, size in ((2, 6), (3, 5)):
        x = torch.randn(batch, 4, size, size, device=device, requires_grad=True)
        (expected,) = torch.autograd.grad(block(x).square().sum(), x)
        (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
        torch.testing.assert_close(actual, expected)


def test_a_whole_model_compiles_without_a_break(device: torch.device) -> None:
    """Between convolutions, converted, with the input of an unserved dtype combination too."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8)
    ).to(device)
    model = fastnorm.convert(model)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 6, 6, device=device)
    for m in (model, compiled):
        m(x).square().mean().backward()
    torch.testing.assert_close(compiled.state_dict(), {f"_orig_mod.{k}": v for k, v in model.state_dict().items()})
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.fallback(r"exported program")
@pytest.mark.parametrize("layer", TYPICAL, ids=lambda layer: layer.norm)
def test_exports(layer: Layer, device: torch.device) -> None:
    """The exported program gives the same values at another batch size, and needs nothing but torch."""
    module = build(Case(layer, activation="silu", mode="eval"), fastnorm, device)
    x = torch.randn(layer.shape, device=device)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: batch}, None)[:1])
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets and all(t.startswith("aten.") for t in targets)
    for n in (layer.shape[0], layer.shape[0] + 3):
        x = torch.randn(n, *layer.shape[1:], device=device)
        torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.fallback(r"exported program")
def test_export_for_training(device: torch.device) -> None:
    """Running statistics are mutated inside the exported program."""
    module = fastnorm.BatchNorm2d(4).to(device)
    x = torch.randn(2, 4, 3, 3, device=device)
    exported = torch.export.export(copy.deepcopy(module), (x,)).module()
    torch.testing.assert_close(exported(x), module(x))
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(exported.get_buffer(name), buffer)
