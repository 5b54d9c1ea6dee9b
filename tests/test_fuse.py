"""fastnorm.fuse: what is fused, in the forms that models are written in, computes what it did."""

from __future__ import annotations

import copy
import linecache
import pickle
import re
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnorm
from fastnorm.activations import ACTIVATIONS
from tests.test_convert import BLOCKS, ConvNeXtBlock, ResNetBlock, StyleBlock, UNetBlock, train

FUSED = {
    ResNetBlock: {"bn1": "relu", "bn2": "add + relu"},
    UNetBlock: {"norm1": "silu", "norm2": "silu"},
    ConvNeXtBlock: {},
    StyleBlock: {"norm": "leaky_relu"},
}


def fused(model: nn.Module) -> dict[str, str]:
    """Norm -> what is fused with it, by the report."""
    found = {row.name: re.search(r"(^|; )fused with (.+?) from ", row.why) for row in fastnorm.report(model)}
    return {name: match[2] for name, match in found.items() if match}


def refusals(model: nn.Module) -> dict[str, str]:
    """Norm -> why nothing is fused with it, by the report."""
    found = {row.name: re.search(r"(^|; )not fused: (.+)", row.why) for row in fastnorm.report(model)}
    return {name: match[2] for name, match in found.items() if match}


def compare(model: nn.Module, *inputs: Tensor, fuse: Callable[[nn.Module], nn.Module] = fastnorm.fuse) -> nn.Module:
    """Fuses a copy in float64, and compares outputs, gradients, statistics and keys, in training and evaluation; then
    takes it apart. Returns a fused copy."""
    torch.set_default_dtype(torch.float64)
    native = copy.deepcopy(model).double()
    for norm in native.modules():
        if isinstance(norm, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) and norm.weight is not None:
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias, 0, 0.3)
    ours = fuse(copy.deepcopy(native))
    assert list(ours.state_dict()) == list(native.state_dict())
    names = ([name for name, _ in m.named_modules(remove_duplicate=False)] for m in (ours, native))
    assert next(names) == next(names)
    for training in (True, False):
        results = []
        for m in (ours, native):
            m.train(training)
            torch.manual_seed(1)
            xs = [x.double().requires_grad_() for x in inputs]
            y = m(*xs)
            y.square().sum().backward()
            results.append((y, [x.grad for x in xs], [p.grad for p in m.parameters()], m.state_dict()))
        torch.testing.assert_close(*results)
    taken_apart = fastnorm.revert(copy.deepcopy(ours))
    assert [type(m) for m in taken_apart.modules()] == [type(m) for m in native.modules()]
    assert repr(taken_apart) == repr(native)
    torch.testing.assert_close(taken_apart(*inputs_like(inputs)), native(*inputs_like(inputs)))
    return ours


def inputs_like(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.double() for x in inputs]


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks(block: type[nn.Module]) -> None:
    ours = compare(block(), torch.randn(2, 6, 8, 8))
    assert fused(ours) == FUSED[block]


@pytest.mark.parametrize("block", BLOCKS)
def test_trains_as_torch_does(block: type[nn.Module]) -> None:
    native = block()
    ours = fastnorm.fuse(copy.deepcopy(native))
    losses = train(native, torch.channels_last)
    assert train(ours, torch.channels_last) == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(ours.state_dict(), native.state_dict(), rtol=1e-4, atol=1e-5)


# ---- forms ----

ACTS = {
    "nn.ReLU": (nn.ReLU(), "relu"),
    "nn.ReLU in place": (nn.ReLU(True), "relu"),
    "nn.SiLU": (nn.SiLU(), "silu"),
    "nn.GELU": (nn.GELU(), "gelu"),
    "nn.GELU tanh": (nn.GELU("tanh"), "gelu_tanh"),
    "nn.LeakyReLU": (nn.LeakyReLU(0.3, True), "leaky_relu"),
    "nn.Hardswish": (nn.Hardswish(True), "hardswish"),
    "nn.Sigmoid": (nn.Sigmoid(), "sigmoid"),
    "nn.Tanh": (nn.Tanh(), "tanh"),
}


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.InstanceNorm2d(6), nn.LayerNorm(5)])
def test_sequential(name: str, norm: nn.Module) -> None:
    """Without its text; an nn.Identity in between is looked through."""
    act, expected = ACTS[name]
    model = nn.Sequential(nn.Conv2d(3, 6, 3), copy.deepcopy(norm), nn.Identity(), copy.deepcopy(act))
    assert fused(compare(model, torch.randn(2, 3, 7, 7))) == {"1": expected}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_recognised(name: str) -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), ACTIVATIONS[name].module(0.2))
    assert fused(compare(model, torch.randn(2, 4, 3))) == {"0": name}


class Form(nn.Module):
    """A norm, a residual, and a forward of one of the forms below."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.drop_path = nn.Identity()
        self.layers = nn.ModuleList([nn.BatchNorm2d(4), nn.ReLU()])
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))
        self.se: nn.Module | None = None
        self.mode = "default"

    def half(self, r: Tensor) -> Tensor:
        return r / 2


def form(text: str) -> Form:
    """A module whose forward has these statements; x and r are its inputs."""
    lines = ["def forward(self, x, r):"] + ["    " + line for line in text.splitlines()]
    filename = f"<form {hash(text)}>"
    linecache.cache[filename] = (1, None, [line + "\n" for line in lines], filename)
    namespace: dict[str, object] = {}
    exec(compile("\n".join(lines), filename, "exec"), globals(), namespace)
    return type("Form", (Form,), {"forward": namespace["forward"], "__module__": __name__})()


ONE = {
    "return F.relu(self.norm(x)) + r": "relu",
    "return torch.relu(self.norm(x)) + r": "relu",
    "return self.norm(x).relu() + r": "relu",
    "return self.norm(x).relu_() + r": "relu",
    "return torch.relu_(self.norm(x)) + r": "relu",
    "return F.relu(self.norm(x), True) + r": "relu",
    "return F.relu(self.norm(x), inplace=True) + r": "relu",
    "return F.gelu(self.norm(x), approximate='tanh') + r": "gelu_tanh",
    "return F.leaky_relu(self.norm(x), 0.2) + r": "leaky_relu",
    "return torch.nn.functional.silu(self.norm(x)) + r": "silu",
    "return torch.sigmoid(self.norm(x)) + self.norm.eps * r": "sigmoid",
    "return self.layers[1](self.layers[0](x)) + r": "relu",
    "y = self.norm(x)\ny = self.relu(y)\nreturn y + r": "relu",
    "y = self.norm(x)\nself.relu(y)\nreturn y + r": "relu",
    "y = self.norm(x)\nz = y.tanh()\nreturn z + r": "tanh",
    "x = self.norm(x)\nx = self.drop_path(x)\nreturn r + self.relu(x)": "relu",
    "return self.relu(self.norm(self.conv(x)) + r)": "add + relu",
    "return self.relu(r + self.norm(self.conv(x)))": "add + relu",
    "return F.silu(torch.add(self.norm(x), r))": "add + silu",
    "return F.silu(torch.add(r, self.norm(x), alpha=1))": "add + silu",
    "return self.norm(x).add(r).relu()": "add + relu",
    "return self.norm(x).add_(r).relu_()": "add + relu",
    "y = self.norm(x)\ny.add_(r)\nreturn self.relu(y)": "add + relu",
    "y = self.norm(x)\ny += r\nreturn self.relu(y)": "add + relu",
    "y = self.norm(x)\ny = r + y\ny = self.relu(y)\nreturn y": "add + relu",
    "y = self.conv(x)\ny = self.norm(y)\nr = self.downsample(r)\ny += r\nreturn F.gelu(y)": "add + gelu",
    "y = self.norm(self.conv(x)) + self.downsample(r)\nreturn y.sigmoid()": "add + sigmoid",
    "y = self.downsample(r) + self.norm(self.conv(x))\nreturn torch.tanh(y)": "add + tanh",
    "y = self.norm(x)\nif self.se is not None:\n    y = self.se(y)\ny += r\nreturn self.relu(y)": "add + relu",
    "if self.mode == 'default':\n    x = self.norm(x)\nelse:\n    x = self.norm(x) * 2\nreturn F.silu(x) + r": "silu",
    "return self.norm(x) + r": "add",
    "y = self.norm(x) + r\nreturn F.relu(y) + y": "add",
    "y = self.norm(x)\ny += r\nz = F.relu(y)\nreturn z + y": "add",
    "y = self.norm(x)\ny.add_(r)\nz = F.relu(y)\nreturn z + y": "add",
    "y = self.norm(x)\ny = y + r\nz = []\nz.append(F.relu(y))\nreturn z[0] + y": "add",
    "y = self.norm(x)\nz = y\nz.relu_()\nreturn z + y + r": "relu",
    "y = self.norm(x)\nreturn torch.stack([y + r, torch.sin(x)])": "add",
    "for _ in range(2):\n    x = F.relu(self.norm(self.conv(x)))\nreturn x + r": "relu",
    "if x.sum() > 0:\n    x = self.relu(self.norm(x))\nreturn x + r": "relu",
    "if self.training:\n    return F.relu(self.norm(x)) + r\nreturn F.relu(self.norm(x)) - r": "relu",
}


@pytest.mark.parametrize("text", ONE)
def test_forms(text: str) -> None:
    model = form(text)
    ours = compare(model, torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5))
    assert list(fused(ours).values()) == [ONE[text]], refusals(ours)
    assert isinstance(ours, type(model)) and type(ours).__name__ == "Form"


LEFT = {
    "y = self.norm(x)\nreturn F.relu(y) + y + r": "is used in line",
    "y = self.norm(x)\nz = F.relu(y)\nreturn z + y + r": "is used again after",
    "y = self.norm(x)\nz = []\nz.append(F.relu(y))\nreturn z[0] + y + r": "is used again after",
    "y = self.norm(x)\nz = []\nz.append(y + r)\nreturn z[0] + y": "is used again after",
    "y = self.norm(x)\n(z := F.relu(y))\nreturn z + y + r": "is used again after",
    "y = self.norm(x)\nF.relu(y).add_(r)\nreturn y + r": "is used again after",
    "y = self.norm(x)\ny.add_(r).relu_()\nreturn y": "is used again after",
    "y = self.norm(x)\nz = y\nz.add_(r)\nreturn z + y": "is used again after",
    "y = self.norm(x)\ny += F.relu(y)\nreturn y + r": "is used in line",
    "y = self.norm(x)\ny += y + r\nreturn y": "is used in line",
    "y = self.norm(x)\nreturn torch.stack([x.mul_(2), y + r])": "which may change what it reads",
    "y = self.norm(x)\nz = F.relu(y)\nfor _ in range(2):\n    z = z + y\nreturn z + r": "is used again after",
    "y = self.norm(x)\ny = y if r is None else F.relu(y)\nreturn y": "is used in line",
    "y = self.norm(x)\nif r.sum() > 0:\n    y = F.relu(y)\nreturn y": "is used in line",
    "y = self.norm(x)\nlater = lambda: F.relu(y)\nreturn later() + r": "that other code of",
    "return F.relu(self.norm(x) * 2) + r": "is not followed by",
    "return F.relu(F.dropout(self.norm(x), 0.5)) + r": "is followed by `F.dropout`",
    "return F.relu6(self.norm(x)) + r": "is followed by `F.relu6`",
    "return F.relu(self.norm(x)) + F.silu(self.norm(r))": "followed by different things",
    "return F.relu(self.norm(x)) + self.norm(r)": "which may change what it reads",
    "return getattr(self, 'no' + 'rm')(x).relu() + r": "is handed on in",
    "n = self.norm\nreturn n(x).relu() + r": "is handed on in",
    "for layer in self.layers:\n    x = layer(x)\nreturn x + r": "is handed on in",
    "return self.norm(x) + 1 + r": "what has another shape",
    "return self.norm(x) + r[:, :, :1, :1].mean((2, 3))[:, :, None, None]": "what has another shape",
    "r += self.norm(x)\nreturn r": "is not followed by",
    "y = self.norm(x)\nx = self.relu(x)\ny = y + x\nreturn y": "which may change what it reads",
    "y = self.norm(x)\nx += 1\ny = y + r\nreturn y": "which may change what it reads",
    "y = self.norm(x)\nif r.sum() > 1e9:\n    return r\ny = y + r\nreturn y": "after a way out",
    "y = self.norm(self.conv(x))\nr = r * F.relu(self.norm.running_mean)[0]\ny += r\nreturn y": "which it may change",
    "y = self.norm(self.conv(x))\nr = self.half(r)\ny += r\nreturn y": "may read what it changes",
    "self.kept = self.norm(x)\nreturn F.relu(self.kept) + r": "is not followed by",
    "y = [self.norm(x)]\nreturn F.relu(y[0]) + r": "is not followed by",
    "y = z = self.norm(x)\ny = F.relu(y)\nreturn z + r": "is not followed by",
    "y = self.norm(x)\ny = y + y\nreturn F.relu(y)": "is used in line",
    "y = self.norm(x)\ny *= 2\nreturn F.relu(y)": "is changed in line",
    "F = type('F', (), {'relu': abs})\nreturn F.relu(self.norm(x)) + r": "is followed by `F.relu`",
    "for i in range(2):\n    y = self.norm(x)\n    x = F.relu(y)\n    r += y if i else x\nreturn r": "is used again",
    "h = self.conv(x)\ny = self.norm(h)\ng = self.relu(h)\nreturn F.silu(y + g)": "which may change what it reads",
    "get = lambda: y\ny = self.norm(x)\nr = r + get()\ny = F.relu(y)\nreturn y + r": "that other code of",
    "try:\n    y = self.norm(x)\n    y = F.relu(y)\nexcept ValueError:\n    r = y\nreturn r": "that other code of",
    "y = self.norm.__call__(x)\nreturn F.relu(y) + self.norm(r)": "is used as more than a module",
    "y = self.norm(x)\nself.relu.inplace = False\ny = self.relu(y)\nreturn y + r": "which may change what it does",
    "y = self.norm(x)\nself.relu = nn.SiLU()\ny = self.relu(y)\nreturn y + r": "which may change what it does",
    "y = self.norm(x)\ntorch.set_grad_enabled(True)\ny = F.relu(y)\nreturn y + r": "which may change what it does",
    "y = self.norm(x)\nlocals()\nreturn F.relu(y) + r": "reaches its own variables",
    "y = self.norm(x)\ndef f():\n    return self.norm(r)\nreturn F.relu(y) + f()": "in a function inside",
}


@pytest.mark.parametrize("text", LEFT)
def test_what_is_not_proved_is_left(text: str) -> None:
    model = form(text)
    before = type(model)
    ours = fastnorm.fuse(copy.deepcopy(model))
    assert type(ours) is before and not fused(ours)
    assert any(LEFT[text] in reason for reason in refusals(ours).values()), refusals(ours)
    assert not any(isinstance(m, fastnorm.BatchNorm2d) for m in ours.modules())


def test_two_norms_share_a_sum() -> None:
    """One of them takes it."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return F.silu(self.a(x) + self.b(r))

    ours = compare(Two(), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3))
    assert fused(ours) == {"a": "add + silu"} and "another norm" in refusals(ours)["b"]


def test_fuse_says_nothing_and_takes_modules_only() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ResNetBlock()
        assert fastnorm.fuse(model) is model and fastnorm.fuse(model) is model
    assert fused(model) == FUSED[ResNetBlock]
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, but got int"):
        fastnorm.fuse(3)  # type: ignore[type-var]
    assert pickle.loads(pickle.dumps(model)) is not None
