"""fastnorm.convert, revert, report and explain, on models like those that people train."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnorm
from fastnorm import _C
from tests.common.numerics import ACTIVATION_FUNCTIONS

NATIVE = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
)


class ResNetBlock(nn.Module):
    """A basic block of a ResNet-D with its shortcut: a pool and a convolution of stride 1. oneDNN's 1x1 convolution of
    stride 2 over 6 channels (channels_last, AVX2) writes past its gradient of the weights."""

    def __init__(self, channels: int = 6, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y)


class UNetBlock(nn.Module):
    """A residual block of a diffusion UNet: GroupNorm, SiLU, time embedding."""

    def __init__(self, channels: int = 6, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(3, channels), nn.GroupNorm(4, width)
        self.conv1, self.conv2 = (
            nn.Conv2d(channels, width, 3, 1, 1),
            nn.Conv2d(width, width, 3, 1, 1),
        )
        self.skip = nn.Conv2d(channels, width, 1)
        self.time = nn.Linear(5, width)

    def forward(self, x: Tensor) -> Tensor:
        time = self.time(torch.linspace(0, 1, 5))[None, :, None, None]
        h = self.conv1(F.silu(self.norm1(x))) + time
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm over channels last, inverted bottleneck."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class StyleBlock(nn.Module):
    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm = nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.leaky_relu(self.norm(self.conv(x)), 0.2)


BLOCKS = (ResNetBlock, UNetBlock, ConvNeXtBlock, StyleBlock)


def train(model: nn.Module, memory_format: torch.memory_format, steps: int = 6) -> list[float]:
    """Losses of a few steps of SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 6, 8, 8, generator=generator).contiguous(memory_format=memory_format)
        # torch 2.13's GroupNorm crashes on channels_last when its input wants no gradient.
        loss = model(x.requires_grad_()).sub(x.mean()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", BLOCKS)
def test_trains_as_torch_does(block: type[nn.Module], memory_format: torch.memory_format) -> None:
    """Losses, parameters and buffers after each of several steps, then evaluation, then back."""
    native = block().to(memory_format=memory_format)
    ours = fastnorm.convert(copy.deepcopy(native))
    assert any(type(m).__module__.startswith("fastnorm") for m in ours.modules())
    losses = train(native, memory_format)
    assert train(ours, memory_format) == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(ours.state_dict(), native.state_dict(), rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 6, 8, 8)
    torch.testing.assert_close(ours.eval()(x), native.eval()(x), rtol=1e-4, atol=1e-5)
    trained = ours(x)
    torch.testing.assert_close(fastnorm.revert(ours)(x), trained, rtol=1e-4, atol=1e-5)


def zoo() -> nn.Sequential:
    return nn.Sequential(*(c(2, 4) if c is nn.GroupNorm else c(4) for c in NATIVE))


def test_classes_there_and_back() -> None:
    model = zoo()
    assert fastnorm.convert(model) is model
    assert [type(m) for m in model] == [getattr(fastnorm, c.__name__) for c in NATIVE]
    assert not any(hasattr(m, "activation") for m in model)
    assert fastnorm.revert(model) is model
    assert [type(m) for m in model] == list(NATIVE)
    assert [repr(m) for m in model] == [repr(m) for m in zoo()]


def test_nothing_is_copied() -> None:
    """Parameters, buffers and every attribute stay the objects they are, so optimizers stay good."""
    model = ResNetBlock()
    before = [(id(m), {k: id(v) for k, v in vars(m).items()}) for m in model.modules()]
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    for function in (fastnorm.convert, fastnorm.convert, fastnorm.revert, fastnorm.revert):
        function(model)
        assert [(id(m), {k: id(v) for k, v in vars(m).items()}) for m in model.modules()] == before
        assert [id(t) for t in (*model.parameters(), *model.buffers())] == tensors


def test_a_single_layer() -> None:
    layer = nn.GroupNorm(2, 4)
    assert fastnorm.convert(layer) is layer and type(layer) is fastnorm.GroupNorm
    assert fastnorm.revert(layer) is layer and type(layer) is nn.GroupNorm


def test_flags_hooks_and_dtypes_are_kept() -> None:
    model = zoo().bfloat16()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    calls = []
    model[1].register_forward_hook(lambda m, args, y: calls.append(type(m)))
    model[1].register_forward_pre_hook(lambda m, args: calls.append("before"))
    model[1].register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    model[1].note = "kept"
    fastnorm.convert(model)
    assert not model[1].training and model[0].training
    assert not model[0].weight.requires_grad and model[1].weight.requires_grad
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model[1].note == "kept"
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    model[1].float()(x).sum().backward()
    assert calls == ["before", fastnorm.BatchNorm2d, "backward"]


def test_shared_modules_stay_shared() -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm), "c": nn.LayerNorm(3)})
    model["c"].weight = norm.weight
    fastnorm.convert(model)
    assert model["a"] is model["b"][0] and type(model["a"]) is fastnorm.BatchNorm1d
    assert model["c"].weight is model["a"].weight


class Doubled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.LayerNorm):
    """No forward of its own: still not torch.nn's exact class."""


def left_alone() -> dict[str, nn.Module]:
    patched = nn.LayerNorm(4)
    patched.forward = lambda x: x
    parametrized = nn.utils.parametrizations.weight_norm(nn.LayerNorm(4), dim=None)
    return {
        "subclass with a forward": Doubled(4),
        "plain subclass": Renamed(4),
        "lazy": nn.LazyBatchNorm2d(),
        "patched forward": patched,
        "parametrized": parametrized,
        "rms": nn.RMSNorm(4),
        "no norm": nn.Linear(4, 4),
        "scripted": torch.jit.script(nn.LayerNorm(4)),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("what", list(left_alone()))
def test_left_alone(what: str) -> None:
    module = left_alone()[what]
    model = nn.Sequential(module)
    cls = type(module)
    fastnorm.convert(model)
    assert model[0] is module and type(module) is cls
    fastnorm.revert(model)
    assert model[0] is module and type(module) is cls


def test_lazy_modules_can_be_converted_once_they_know_their_size() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d())
    fastnorm.convert(model)
    model(torch.randn(2, 3, 4, 4))
    assert type(model[0]) is nn.BatchNorm2d
    assert type(fastnorm.convert(model)[0]) is fastnorm.BatchNorm2d


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu_tanh", "hardswish"])
def test_revert_keeps_the_activation(activation: str) -> None:
    """A fused module becomes torch.nn's with the activation after it; it pickles, and converts back."""
    model = nn.Sequential(fastnorm.GroupNorm(2, 4, activation=activation, activation_param=0.2))
    nn.init.normal_(model[0].weight)
    x, residual = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    expected, expected_sum = model(x), model[0](x, residual)
    fastnorm.revert(model)
    assert isinstance(model[0], nn.GroupNorm) and not isinstance(model[0], fastnorm.GroupNorm)
    plain = nn.functional.group_norm(x, 2, model[0].weight, model[0].bias)
    torch.testing.assert_close(model(x), ACTIVATION_FUNCTIONS[activation](plain))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model[0](x, residual), expected_sum)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x)) and type(again[0]) is type(model[0])
    fastnorm.convert(model)
    assert type(model[0]) is fastnorm.GroupNorm and model[0].activation == activation
    assert torch.equal(model(x), expected)


def test_state_dict_is_untouched() -> None:
    model = ResNetBlock()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    converted = fastnorm.convert(model).state_dict()
    assert list(converted) == list(state)
    assert all(torch.equal(converted[k], v) for k, v in state.items())


def test_report_lists_every_norm() -> None:
    model = nn.Sequential(ResNetBlock(), UNetBlock(), nn.Sequential(Doubled(4), nn.LazyBatchNorm2d()))
    before = list(fastnorm.report(model))
    assert {row.status for row in before} == {"left"}
    report = fastnorm.report(fastnorm.convert(model))
    rows = {row.name: row for row in report}
    kinds = (Doubled, nn.modules.batchnorm._NormBase, nn.GroupNorm)
    norms = [name for name, m in model.named_modules() if isinstance(m, kinds)]
    assert [row.name for row in before] == list(rows) == norms
    assert (rows["0.bn1"].layer, rows["0.bn1"].status) == ("BatchNorm2d", "served")
    for name in ("2.0", "2.1"):
        assert rows[name].status == "left" and rows[name].why
    text = str(report)
    assert all(name in text for name in norms) and len(report) == len(norms)
    assert list(fastnorm.report(nn.Linear(2, 2))) == []


def test_report_says_why() -> None:
    """Each kind of module that convert leaves alone has a reason of its own."""
    for what, module in left_alone().items():
        rows = list(fastnorm.report(module))
        if what in ("no norm", "rms", "scripted"):
            continue
        assert len(rows) == 1 and rows[0].status == "left", what
        assert rows[0].why and "would serve" not in rows[0].why, what


@pytest.mark.parametrize("cls", NATIVE)
def test_explain_says_what_serves_a_call(cls: type[nn.Module]) -> None:
    dims = {"1": 3, "2": 4, "3": 5}.get(cls.__name__[-2], 4)
    x = torch.randn([2, 4, 4, 4, 4][:dims])
    native = cls(2, 4) if cls is nn.GroupNorm else cls(4)
    assert fastnorm.explain(x, native).startswith("torch: ")
    ours = fastnorm.convert(native)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    assert fastnorm.explain(x, ours).startswith("fastnorm: ")
    assert fastnorm.explain(x, ours, torch.randn_like(x)).startswith("fastnorm: ")
    assert fastnorm.explain(x.int(), ours).startswith("torch: ")
    assert fastnorm.explain(x[:, :3, ..., :3], ours).startswith("torch: ")
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    assert _C.cpu_capability() in fastnorm.explain(x, ours)


def test_convert_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastnorm.revert(fastnorm.convert(zoo()))


def test_explain_tells_the_truth() -> None:
    """Of an own forward, of metadata, of parametrizations; and moves no statistics, wherever they are."""
    x, module = torch.randn(2, 4, 3, 3), fastnorm.BatchNorm2d(4)
    assert fastnorm.explain(x.as_subclass(type("Plain", (torch.Tensor,), {})), module).startswith("fastnorm: ")
    module.__dict__["running_mean"] = torch.zeros(4)
    assert fastnorm.explain(x, module).startswith("fastnorm: ")
    assert not module.running_mean.any() and module.num_batches_tracked == 0
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    assert fastnorm.explain(x, module).startswith("fastnorm: ")
    module = fastnorm.LayerNorm(3)
    module.forward = lambda x: x
    assert fastnorm.explain(x, module) == "torch: has a forward of its own"
