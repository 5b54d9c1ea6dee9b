"""fastnorm.fuse across modules: containers, modules that return a norm's output, and what reaches into others."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnorm
from tests.test_fuse import compare, fused, refusals


class ConvBN(nn.Module):
    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, stride, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Residual(nn.Module):
    """Both branches end in a norm that somebody else calls."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch, self.relu = branch, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        y = y + x
        return self.relu(y)


@pytest.mark.parametrize(
    ("branch", "norm"),
    [
        (ConvBN(), "branch.bn"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)), "branch.1"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(ConvBN(), nn.Identity())), "branch.1.0.bn"),
    ],
)
def test_a_residual_reaches_the_norm_at_the_end_of_a_module(branch: nn.Module, norm: str) -> None:
    ours = compare(Residual(branch), torch.randn(2, 4, 5, 5))
    assert fused(ours) == {norm: "add + relu"}
    assert "branch" in dict(ours.named_modules())
    seen: list[int] = []
    ours.branch.register_forward_hook(lambda module, args, output: seen.append(len(args)))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = fastnorm.revert(copy.deepcopy(ours).eval())(x)
    torch.testing.assert_close(ours.eval()(x), expected)
    assert seen  # a hook added later is called


def test_a_module_behind_a_module() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.ReLU())
    assert fused(compare(model, torch.randn(2, 4, 5, 5))) == {"0.1": "relu"}


def test_a_shared_activation_module_stays_where_it_is_needed() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.bn1, self.bn2, self.act = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.bn1(self.conv1(x)))
            y = self.act(y + x)
            return self.act(self.bn2(self.conv2(y)) + x)

    assert fused(compare(Shared(), torch.randn(2, 4, 5, 5))) == {"bn1": "silu", "bn2": "add + silu"}
    act = nn.SiLU()
    model = nn.Sequential(nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 1), act, nn.BatchNorm2d(4), act)
    assert fused(compare(model, torch.randn(2, 4, 5, 5))) == {"0": "silu", "4": "silu"}


class Tapped(nn.Module):
    """Iterates over an nn.Sequential, as perceptual losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        taps = []
        for layer in self.features:
            x = layer(x)
            taps.append(x)
        return sum(taps)


class Sliced(Tapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.features[:2](x) + self.features(x)


class Indexed(Tapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.features[1](x) + self.features(x)


class ByChildren(Tapped):
    def forward(self, x: Tensor) -> Tensor:
        for _, child in self.named_children():
            for layer in child.children():
                x = layer(x)
        return x


class Listed(Tapped):
    def __init__(self) -> None:
        super().__init__()
        self.stages = {"first": [self.features]}

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages["first"]:
            for layer in stage:
                x = x if isinstance(layer, nn.ReLU) else layer(x)
        return x


class HandedOn(Tapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)

    @staticmethod
    def run(model: nn.Module, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in model.features if not isinstance(layer, nn.ReLU))


@pytest.mark.parametrize("cls", [Tapped, Sliced, Indexed, ByChildren, HandedOn, Listed])
def test_a_container_that_is_taken_apart_is_left(cls: type[nn.Module]) -> None:
    model = cls()
    x = torch.randn(2, 4, 5, 5)
    ours = fastnorm.fuse(copy.deepcopy(model))
    torch.testing.assert_close(ours(x), model(x))
    assert not fused(ours) and refusals(ours)


class KeptByItsOldName(ConvBN):
    kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        z = y
        self.kept = y
        return z


class AsksForASetting(ConvBN):
    """As timm's ConvNormAct does between the norm and the return."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        aa = getattr(self, "aa", None)
        if aa is not None:
            x = aa(x)
        return x


def test_a_setting_is_no_use_of_the_value() -> None:
    ours = compare(Residual(AsksForASetting()), torch.randn(2, 4, 5, 5))
    assert fused(ours) == {"branch.bn": "add + relu"}


class ChangesTheResidual(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        x.mul_(2)
        return y


class Scaled(Residual):
    """What is added is computed after the branch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + 2 * x)


class ScaledFirst(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(2 * x + self.branch(x))


def in_place_first() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    "model", [Residual(KeptByItsOldName()), Residual(ChangesTheResidual()), Scaled(in_place_first())]
)
def test_a_module_whose_value_or_residual_something_else_sees(model: nn.Module) -> None:
    ours = fastnorm.fuse(copy.deepcopy(model))
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x.clone()), model(x.clone()))
    if isinstance(model.branch, KeptByItsOldName):
        torch.testing.assert_close(ours.branch.kept, model.branch.kept)
    assert not fused(ours) and refusals(ours)


def test_what_is_added_to_a_module_and_runs_before_it() -> None:
    with torch.no_grad():
        model, x = ScaledFirst(in_place_first()), torch.randn(2, 4, 5, 5)
        ours = fastnorm.fuse(copy.deepcopy(model))
        torch.testing.assert_close(ours(x.clone()), model(x.clone()))
    assert fused(ours) == {"branch.2": "add + relu"}


class Inherits(Residual):
    """Its base's forward is out of use."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.branch(x) + x)


class Extends(Residual):
    """Its base's forward is called."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.branch(x)


def test_methods_that_are_overridden() -> None:
    assert fused(compare(Inherits(ConvBN()), torch.randn(2, 4, 5, 5))) == {"branch.bn": "add + silu"}
    ours = compare(Extends(ConvBN()), torch.randn(2, 4, 5, 5))
    assert not fused(ours) and list(refusals(ours)) == ["branch.bn"]


def test_a_norm_that_others_reach_into() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.bn(self.conv(x)))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder.bn(x) - self.encoder(x)

    model, x = Decoder(), torch.randn(2, 4, 5, 5)
    ours = fastnorm.fuse(copy.deepcopy(model))
    torch.testing.assert_close(ours(x), model(x))
    assert not fused(ours)
