"""fastnorm's LayerNorm2d and FrozenBatchNorm2d against torchvision's and timm's, and in their models."""

from __future__ import annotations

import copy
import pickle
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from tests.common.numerics import assert_alike
from tests.models.test_enable_models import timm_model, torchvision_model

#: Module and name of the classes that `convert` takes, and ours.
LAYER_NORMS = (("torchvision.models.convnext", "LayerNorm2d"), ("timm.layers.norm", "LayerNorm2d"))
FROZEN = ("torchvision.ops.misc", "FrozenBatchNorm2d")


def foreign(package: str, name: str) -> type[nn.Module]:
    module: ModuleType = pytest.importorskip(package)
    cls: type[nn.Module] = getattr(module, name)
    return cls


def randomized(norm: nn.Module) -> nn.Module:
    for name, t in norm.state_dict().items():
        nn.init.uniform_(t, 0.5, 1.5) if name in ("weight", "running_var") else nn.init.normal_(t)
    return norm


def outcome(norm: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x)
    return [y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [x, *norm.parameters()])]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("origin", [*LAYER_NORMS, FROZEN], ids=".".join)
def test_values_and_state(origin: tuple[str, str], memory_format: torch.memory_format) -> None:
    native = randomized(foreign(*origin)(12, eps=1e-3))
    ours = getattr(fastnorm, origin[1])(12, eps=1e-3)
    assert ours.state_dict().keys() == native.state_dict().keys()
    ours.load_state_dict(native.state_dict())
    native.load_state_dict(ours.state_dict())
    x = torch.randn(3, 12, 5, 7).contiguous(memory_format=memory_format)
    assert_alike(outcome(ours, x), outcome(native, x))


@pytest.mark.parametrize("origin", [*LAYER_NORMS, FROZEN], ids=".".join)
def test_there_and_back(origin: tuple[str, str]) -> None:
    cls = foreign(*origin)
    net, x = nn.Sequential(randomized(cls(12))), torch.randn(3, 12, 5, 7)
    before, tensors, y = vars(net[0]).copy(), [*net.parameters(), *net.buffers()], net(x)
    assert "fastnorm.convert(model) would serve it" in str(fastnorm.report(net))
    fastnorm.convert(net)
    assert type(net[0]) is getattr(fastnorm, origin[1])
    assert [(row.layer, row.status) for row in fastnorm.report(net)] == [(origin[1], "served")]
    assert all(a is b for a, b in zip([*net.parameters(), *net.buffers()], tensors, strict=True))
    assert_alike(net(x), y)
    with fastnorm.reverted(net):
        assert type(net[0]) is cls
    assert type(net[0]) is getattr(fastnorm, origin[1])
    net = copy.deepcopy(pickle.loads(pickle.dumps(net)))
    fastnorm.revert(net)
    assert type(net[0]) is cls and vars(net[0]).keys() == before.keys()
    assert torch.equal(net(x), y)


def test_subclasses_are_left() -> None:
    cls = foreign(*LAYER_NORMS[0])
    net = nn.Sequential(type("LayerNorm2d", (cls,), {})(12))
    fastnorm.convert(net)
    assert not isinstance(net[0], fastnorm.modules.Norm)


def test_timms_fast_norm_is_left() -> None:
    norm = foreign(*LAYER_NORMS[1])(12)
    norm._fast_norm = True
    fastnorm.convert(nn.Sequential(norm))
    assert "_fast_norm keeps half types" in str(fastnorm.report(norm))


def test_returns_xs_dtype() -> None:
    """torchvision's promotes: half x and float32 buffers make float32."""
    native, x = foreign(*FROZEN)(12), torch.randn(2, 12, 3, 3).bfloat16()
    ours = fastnorm.convert(copy.deepcopy(native))
    assert native(x).dtype == torch.float32 and ours(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["torchvision convnext_tiny", "timm convnext_atto", "timm convnextv2_atto"])
def test_convnext(name: str) -> None:
    package, model = name.split()
    net, inputs = (torchvision_model if package == "torchvision" else timm_model)(model)
    (x,) = inputs.values()
    converted = fastnorm.convert(copy.deepcopy(net.eval()))
    assert sum(type(m) is fastnorm.LayerNorm2d for m in converted.modules()) >= 4
    y = converted(x)
    torch.testing.assert_close(y, net(x), rtol=1e-3, atol=1e-4)
    fastnorm.revert(converted)
    assert [type(m) for m in converted.modules()] == [type(m) for m in net.modules()]


def test_frozen_resnet() -> None:
    """The backbone of torchvision's detection models."""
    frozen = foreign(*FROZEN)
    net, inputs = torchvision_model("resnet18", norm_layer=frozen)
    (x,) = inputs.values()
    converted = fastnorm.convert(copy.deepcopy(net))
    assert sum(type(m) is fastnorm.FrozenBatchNorm2d for m in converted.modules()) == 20
    torch.testing.assert_close(converted(x), net(x), rtol=1e-3, atol=1e-4)
    plain_net, _ = torchvision_model("resnet18")
    plain_net.load_state_dict(net.state_dict(), strict=False)
    fastnorm.freeze_batch_norm(plain_net)
    torch.testing.assert_close(plain_net(x), net(x), rtol=1e-3, atol=1e-4)
