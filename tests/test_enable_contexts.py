"""fastnorm.enable where something stands between the call and the kernels: torch.func, autocast, inference mode, fake
and meta tensors; and cuDNN's batch norm, which a GPU prefers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnorm
from tests.common.aten_calls import Counted, described
from tests.common.numerics import assert_alike
from tests.test_enable import Net, switched_off  # noqa: F401

aten = torch.ops.aten

# ---- torch.func ----

MEAN, VAR = torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8)


def of_module(norm: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda w, x: torch.func.functional_call(norm.eval(), {"weight": w}, (x,))


#: Norms of x (N, 8, P) with weight w, and the operators of aten that have to answer for them.
TRANSFORMED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "layer_norm": (lambda w, x: F.layer_norm(x.movedim(1, -1), (8,), w), "native_layer_norm"),
    "group_norm": (lambda w, x: F.group_norm(x, 2, w), "native_group_norm"),
    "batch_norm": (lambda w, x: F.batch_norm(x, MEAN, VAR, w), "native_batch_norm"),
    "fastnorm.GroupNorm": (of_module(fastnorm.GroupNorm(2, 8)), "native_group_norm"),
    "fastnorm.BatchNorm1d": (of_module(fastnorm.BatchNorm1d(8)), "native_batch_norm"),
    "fastnorm.LayerNorm": (of_module(fastnorm.LayerNorm(3)), "native_layer_norm"),
}


@pytest.mark.fallback(r"torch\.func|functorch|transform|forward")
@pytest.mark.parametrize("name", TRANSFORMED)
def test_functorch_is_served(name: str) -> None:
    """Of functions, and of converted modules, which leave calls under torch.func to torch's operators."""
    norm, operator = TRANSFORMED[name]
    torch.manual_seed(0)
    x = torch.randn(5, 4, 8, 3)
    w = torch.randn(3 if name == "fastnorm.LayerNorm" else 8)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return norm(w, x).pow(3).sum()

    transformed: dict[str, Callable[[], Any]] = {
        "vmap": lambda: torch.func.vmap(norm, (None, 0))(w, x),
        "grad": lambda: torch.func.grad(loss, (0, 1))(w, x[0]),
        "vmap of grad": lambda: torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, 0))(w, x),
        "jvp": lambda: torch.func.jvp(loss, (w, x[0]), (torch.ones_like(w), x[1])),
        "hessian": lambda: torch.func.hessian(loss)(w, x[0]),
    }
    for how, function in transformed.items():
        expected = function()
        with fastnorm.enabled(), Counted() as counted:
            actual = function()
        assert counted.served[operator] >= 1, how
        assert not +counted.left, how
        if how == "grad" and operator != "native_group_norm":  # whose second derivative torch takes of a formula
            assert counted.served[f"{operator}_backward"] >= 1
        assert_alike(actual, expected, what=how)


# ---- fake and meta tensors ----

NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm2d in evaluation": lambda: nn.BatchNorm2d(4).eval(),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "LayerNorm": lambda: nn.LayerNorm(5),
}
FORMATS = {"planar": torch.contiguous_format, "channels_last": torch.channels_last}


def descriptions(make: Callable[[], nn.Module], device: str, layout: torch.memory_format) -> list[object]:
    """Those of the output and of all gradients."""
    with torch.device(device):
        norm = make()
        x, dy = (torch.randn(2, 4, 3, 5).to(memory_format=layout) for _ in range(2))
    y = norm(x.requires_grad_())
    return [described(t) for t in (y, *torch.autograd.grad(y, [x, *norm.parameters()], dy))]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", NORMS)
def test_fake_and_meta_tensors(name: str, layout: str) -> None:
    """They are what the real call gives: dtypes, shapes and strides."""

    def described_calls() -> dict[str, list[object]]:
        calls = {"real": descriptions(NORMS[name], "cpu", FORMATS[layout])}
        with FakeTensorMode():
            calls["fake"] = descriptions(NORMS[name], "cpu", FORMATS[layout])
        return calls | {"meta": descriptions(NORMS[name], "meta", FORMATS[layout])}

    torchs = described_calls()
    with fastnorm.enabled(), Counted() as counted:
        ours = described_calls()
    assert list((+counted.served).values()) == [1, 1], "forward and backward of the real tensors alone"
    assert ours == torchs
    for kind in ("fake", "meta"):
        # torch's meta function of a group norm, from 2.14 its fake one too, takes channels_last maps for planar ones.
        if (name, layout) != ("GroupNorm", "channels_last") or torchs[kind] == torchs["real"]:
            assert ours[kind] == ours["real"]


# ---- autocast and inference mode ----


def test_autocast_and_inference_mode() -> None:
    net, x = Net().eval(), torch.randn(2, 3, 9, 9)
    for context in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.no_grad()):
        with context:
            expected = net(x)
            with fastnorm.enabled():
                actual = net(x)
        assert described(actual) == described(expected)
        assert_alike(actual, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_values_under_autocast(name: str, training: bool) -> None:
    """Of one norm they differ from torch's by one rounding of bfloat16 at most."""
    norm = NORMS[name]().train(training)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1, 0.5)
    x = torch.randn(2, 4, 3, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = norm(x)
        with fastnorm.enabled(), Counted() as counted:
            actual = norm(x)
    assert counted.served.total() == 1
    assert actual.dtype == expected.dtype == torch.bfloat16
    rounding = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rounding, atol=1e-6)


# ---- cuDNN ----


@pytest.mark.cuda
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float16, 4e-3)], ids=str)
def test_cudnns_batch_norm(dtype: torch.dtype, tolerance: float, layout: str) -> None:
    """torch prefers it in training on a GPU: autograd's node is cuDNN's, and ours answers both ways."""
    results, nodes, operators = [], [], []
    for context in (contextlib.nullcontext(), fastnorm.enabled("batch_norm")):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(8, device="cuda")
        x, dy = (torch.randn(4, 8, 6, 5).to("cuda", dtype).to(memory_format=FORMATS[layout]) for _ in range(2))
        with torch.backends.cudnn.flags(enabled=True), context, Counted() as counted:
            y = norm(x.requires_grad_())
            gradients = torch.autograd.grad(y, [x, *norm.parameters()], dy)
        assert y.grad_fn is not None
        nodes.append(y.grad_fn.name())
        operators.append(+counted.served)
        results.append([y.detach(), *gradients, norm.running_mean, norm.running_var])
    assert nodes[0] == nodes[1] == "CudnnBatchNormBackward0"
    assert operators == [{}, {"cudnn_batch_norm": 1, "cudnn_batch_norm_backward": 1}]
    assert [described(t) for t in results[1]] == [described(t) for t in results[0]]
    for actual, expected in zip(results[1], results[0], strict=True):
        scale = max(1.0, expected.double().abs().max().item())
        torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.cuda
@pytest.mark.parametrize("forward_by_us", [False, True])
def test_forward_and_backward_of_cudnn_by_different_kernels(forward_by_us: bool) -> None:
    """The switch is turned in between: each forward gets the backward that can read what it has left."""
    x, dy = torch.randn(2, 4, 8, 6, 5, device="cuda")
    w, b = torch.randn(2, 8, device="cuda")
    if forward_by_us:
        with fastnorm.enabled("batch_norm"):
            _, mean, rstd, reserve = aten.cudnn_batch_norm(x, w, b, None, None, True, 0.1, 1e-5)
        actual = aten.cudnn_batch_norm_backward(x, dy, w, None, None, mean, rstd, 1e-5, reserve)
    else:
        _, mean, rstd, reserve = aten.cudnn_batch_norm(x, w, b, None, None, True, 0.1, 1e-5)
        with fastnorm.enabled("batch_norm"):
            actual = aten.cudnn_batch_norm_backward(x, dy, w, None, None, mean, rstd, 1e-5, reserve)
    assert reserve.numel() == 0 or not forward_by_us
    expected = aten.native_batch_norm_backward(dy, x, w, None, None, mean, rstd, True, 1e-5, [True] * 3)
    assert_alike(actual, expected)
