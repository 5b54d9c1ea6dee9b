"""FrozenBatchNorm2d: values, gradients, states of other packages, and the ways to and from BatchNorm2d.

tests/models compares it with torchvision's own class.
"""

from __future__ import annotations

import copy
import pickle
import sys
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import fastnorm
from fastnorm import plain
from tests.common.cases import DTYPES, PRECISIONS
from tests.common.numerics import ACTIVATION_FUNCTIONS, SLOPE, assert_alike

BUFFERS = ("weight", "bias", "running_mean", "running_var")


def randomized(norm: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, t in (*norm.named_parameters(), *norm.named_buffers()):
        if t.is_floating_point():
            value = torch.randn(t.shape, generator=generator)
            t.data.copy_(0.5 + value.abs() if name in ("weight", "running_var") else value)
    return norm


def frozen(channels: int = 6, **options: object) -> fastnorm.FrozenBatchNorm2d:
    norm = randomized(fastnorm.FrozenBatchNorm2d(channels, **options))
    assert isinstance(norm, fastnorm.FrozenBatchNorm2d)
    return norm


def formula(norm: nn.Module, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
    """The definition, in float64."""
    weight, bias, mean, var = (getattr(norm, name).double()[:, None, None] for name in BUFFERS)
    z = (x.double() - mean) / (var + norm.eps).sqrt() * weight + bias
    return ACTIVATION_FUNCTIONS[activation](z if residual is None else z + residual.double())


# Values.


@pytest.mark.emulated
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", PRECISIONS, ids="-".join)
def test_values_and_gradients(
    precision: tuple[str, str], memory_format: torch.memory_format, activation: str | None, device: torch.device
) -> None:
    dtype, buffers = (DTYPES[name] for name in precision)
    norm = frozen(dtype=buffers, activation=activation, activation_param=SLOPE).to(device)
    x, residual, dy = (
        torch.randn(3, 6, 5, 7, device=device).to(dtype).contiguous(memory_format=memory_format) for _ in range(3)
    )
    leaves = [t.requires_grad_() for t in (x, residual)]
    y = norm(x, residual)
    assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
    exact = formula(norm, x, residual, activation)
    assert_alike(y, exact.to(dtype), exact)
    expected = torch.autograd.grad(exact, leaves, dy.double())
    assert_alike(torch.autograd.grad(y, leaves, dy), [t.to(dtype) for t in expected])


def test_training_changes_nothing() -> None:
    norm, x = frozen(), torch.randn(2, 6, 4, 4)
    before = copy.deepcopy(norm.state_dict())
    y = norm.eval()(x)
    assert torch.equal(norm.train()(x), y)
    assert all(torch.equal(t, before[name]) for name, t in norm.state_dict().items())
    assert list(norm.parameters()) == [] and list(norm.state_dict()) == list(BUFFERS)


@pytest.mark.fallback("has dtype")
@pytest.mark.parametrize(
    ("dtype", "buffers"), [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)], ids=["wide x", "narrow x"]
)
def test_other_dtypes_of_buffers(dtype: torch.dtype, buffers: torch.dtype) -> None:
    """torch's operators compute in what x and the buffers promote to; the result has x's dtype."""
    norm, x = frozen(dtype=buffers), torch.randn(2, 6, 4, 4, dtype=dtype)
    exact = formula(norm, x)
    y = norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.fallback("dtype")
def test_integers_become_floats() -> None:
    norm, x = frozen(), torch.randint(-9, 9, (2, 6, 4, 4), dtype=torch.int32)
    y = norm(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), formula(norm, x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (6, 4, 4), (2, 6, 4, 4, 4)])
def test_other_ranks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"expected 4D input \(got {len(shape)}D input\)"):
        frozen()(torch.randn(shape))


@pytest.mark.fallback("x has shape")
def test_no_samples() -> None:
    assert frozen()(torch.randn(0, 6, 4, 4)).shape == (0, 6, 4, 4)


@pytest.mark.fallback("has shape")
def test_other_channels_are_refused() -> None:
    with pytest.raises(RuntimeError, match="size"):
        frozen()(torch.randn(2, 5, 4, 4))


def test_compiles_whole() -> None:
    norm, x = frozen(activation="relu"), torch.randn(2, 6, 4, 4, requires_grad=True)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    assert_alike(compiled(x), norm(x))
    (dx,), (expected,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, norm))
    assert_alike(dx, expected)


def test_gradcheck() -> None:
    norm = frozen(dtype=torch.float64, activation="silu")
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x) and torch.autograd.gradgradcheck(norm, x)


@pytest.mark.fallback
def test_torch_func_and_forward_mode() -> None:
    norm, x, t = frozen(), torch.randn(2, 6, 3, 2), torch.randn(2, 6, 3, 2)
    y, dy = torch.func.jvp(norm, (x,), (t,))
    exact, exact_dy = torch.func.jvp(lambda x: formula(norm, x), (x,), (t,))
    assert_alike([y, dy], [exact.float(), exact_dy.float()])
    each = torch.stack([norm(x) for x in torch.stack([x, t])])
    assert_alike(torch.vmap(norm)(torch.stack([x, t])), each)


def test_scripts() -> None:
    norm, x = frozen(activation="relu"), torch.randn(2, 6, 4, 4)
    assert_alike(torch.jit.script(norm)(x), norm(x))


def test_copies_and_pickles() -> None:
    norm, x = frozen(activation="relu"), torch.randn(2, 6, 4, 4)
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(copied(x), norm(x))


def test_repr() -> None:
    assert repr(frozen()) == "FrozenBatchNorm2d(6, eps=1e-05)"
    assert repr(frozen(activation="relu")) == "FrozenBatchNorm2d(6, eps=1e-05, activation='relu')"


# States.


def test_takes_the_state_of_a_batch_norm() -> None:
    batch_norm, norm = randomized(nn.BatchNorm2d(6), 1), frozen()
    assert str(norm.load_state_dict(batch_norm.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(2, 6, 4, 4)
    assert_alike(norm(x), batch_norm.eval()(x))


@pytest.mark.parametrize("version", [None, 1])
def test_takes_the_first_state_of_detectron2(version: int | None) -> None:
    """Weight and bias alone, of a norm whose statistics are folded into them."""
    state: OrderedDict[str, Tensor] = OrderedDict(weight=torch.full((6,), 3.0), bias=torch.full((6,), 2.0))
    state._metadata = {"": {"version": version}}  # type: ignore[attr-defined]
    norm = frozen()
    norm.load_state_dict(state)
    assert torch.equal(norm.running_mean, torch.zeros(6)) and torch.equal(norm.running_var, torch.ones(6))
    torch.testing.assert_close(norm(torch.ones(1, 6, 1, 2)), torch.full((1, 6, 1, 2), 5.0), rtol=1e-4, atol=0)
    assert list(state) == ["weight", "bias"]


def test_other_incomplete_states_are_refused() -> None:
    state = frozen().state_dict()
    assert state._metadata[""]["version"] == 3  # type: ignore[attr-defined]
    del state["running_var"]
    with pytest.raises(RuntimeError, match=r"Missing key.*running_var"):
        frozen().load_state_dict(state)


# To and from BatchNorm2d.


@pytest.mark.parametrize("make", [nn.BatchNorm2d, fastnorm.BatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize("affine", [True, False])
def test_there_and_back(make: type[nn.BatchNorm2d], affine: bool) -> None:
    batch_norm = randomized(make(6, eps=1e-3, affine=affine), 1).eval()
    norm = fastnorm.FrozenBatchNorm2d.from_batch_norm(batch_norm)
    x = torch.randn(2, 6, 4, 4)
    expected = nn.functional.batch_norm(
        x, batch_norm.running_mean, batch_norm.running_var, batch_norm.weight, batch_norm.bias, False, 0.0, 1e-3
    )
    assert_alike(norm(x), expected.detach())
    assert norm.eps == 1e-3 and norm.num_features == 6 and not norm.training
    back = norm.to_batch_norm()
    assert type(back) is fastnorm.BatchNorm2d and back.eps == 1e-3 and not back.training
    assert_alike(back(x).detach(), expected.detach())
    assert [name for name, p in back.named_parameters() if p.requires_grad] == ["weight", "bias"]
    own = {t.data_ptr() for t in (*batch_norm.state_dict().values(), *norm.state_dict().values())}
    assert own.isdisjoint(t.data_ptr() for t in back.state_dict().values())
    back.train()(x)
    assert not torch.equal(back.running_mean, norm.running_mean)


def test_keeps_the_activation_and_dtype() -> None:
    batch_norm = fastnorm.BatchNorm2d(6, activation="leaky_relu", activation_param=0.3, dtype=torch.float64)
    norm = fastnorm.FrozenBatchNorm2d.from_batch_norm(batch_norm)
    back = norm.to_batch_norm()
    for module in (norm, back):
        assert module._epilogue() == ("leaky_relu", 0.3) and module.weight.dtype == torch.float64 and module.training


@pytest.mark.parametrize("other", [nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.Conv2d(1, 1, 1)])
def test_from_another_class(other: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"norm must be a BatchNorm2d or SyncBatchNorm, but got {type(other).__name__}"):
        fastnorm.FrozenBatchNorm2d.from_batch_norm(other)


def test_from_one_without_statistics() -> None:
    with pytest.raises(ValueError, match="track_running_stats=False"):
        fastnorm.FrozenBatchNorm2d.from_batch_norm(nn.BatchNorm2d(6, track_running_stats=False))


# freeze_batch_norm.


class Odd(nn.BatchNorm2d):
    pass


def model() -> nn.Sequential:
    shared = nn.BatchNorm2d(6)
    norms = (shared, nn.ReLU(), shared, fastnorm.BatchNorm2d(6, activation="relu"), nn.BatchNorm2d(6, affine=False))
    result = nn.Sequential(nn.Conv2d(3, 6, 3), *norms, nn.Sequential(nn.SyncBatchNorm(6)), Odd(6), nn.GroupNorm(2, 6))
    for module in result.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            randomized(module)
    return result


def test_freezes_a_model_in_place() -> None:
    net, x = model(), torch.randn(2, 3, 8, 8)
    modules = list(net.modules())
    with torch.no_grad():
        expected = copy.deepcopy(net).eval()(x)
    calls = []
    net[1].register_forward_hook(lambda *_: calls.append(1))
    assert fastnorm.freeze_batch_norm(net) is net
    assert list(net.modules()) == modules
    kinds = [type(m).__name__ for m in net]
    assert kinds[1:6] == ["FrozenBatchNorm2d", "ReLU", "FrozenBatchNorm2d", "FrozenBatchNorm2d", "FrozenBatchNorm2d"]
    assert type(net[6][0]) is fastnorm.FrozenBatchNorm2d and kinds[7:] == ["Odd", "GroupNorm"]
    assert net[1] is net[3] and net[4]._epilogue()[0] == "relu"
    assert vars(net[1]).keys() == vars(fastnorm.FrozenBatchNorm2d(6)).keys()
    net.train()[7].eval()
    with torch.no_grad():
        assert_alike(net(x), expected)
    assert calls == [1, 1]
    assert {name for name, _ in net.named_parameters()} == {
        "0.weight", "0.bias", "7.weight", "7.bias", "8.weight", "8.bias",
    }  # fmt: skip
    assert "convert" not in str(fastnorm.report(net[:7]))


def test_frozen_values_are_copies() -> None:
    net = nn.Sequential(nn.BatchNorm2d(6))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=0.5)
    net[0].weight.grad = torch.ones(6)
    fastnorm.freeze_batch_norm(net)
    optimizer.step()
    assert torch.equal(net[0].weight, torch.ones(6))


def test_freezes_nothing_where_one_has_no_statistics() -> None:
    net = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(6, track_running_stats=False))
    with pytest.raises(ValueError, match="1: norm has no running statistics"):
        fastnorm.freeze_batch_norm(net)
    assert type(net[0]) is nn.BatchNorm2d


def test_freezes_a_lone_norm() -> None:
    norm = fastnorm.freeze_batch_norm(nn.BatchNorm2d(6))
    assert type(norm) is fastnorm.FrozenBatchNorm2d and norm.num_features == 6


# convert, revert, report.


def test_reverts_to_torchs_operators() -> None:
    x = torch.randn(2, 6, 4, 4)
    for activation in (None, "silu"):
        net = nn.Sequential(frozen(activation=activation))
        y, state = net(x), net.state_dict()
        fastnorm.revert(net)
        assert isinstance(net[0], plain.FrozenBatchNorm2d) and not isinstance(net[0], fastnorm.FrozenBatchNorm2d)
        assert_alike(net(x), y)
        assert net.state_dict().keys() == state.keys()
        fastnorm.convert(net)
        assert type(net[0]) is fastnorm.FrozenBatchNorm2d and torch.equal(net(x), y)
    rows = list(fastnorm.report(net))
    assert [(row.layer, row.status) for row in rows] == [("FrozenBatchNorm2d", "served")]
    assert fastnorm.explain(x, net[0]).startswith("fastnorm: cpu")


class Detectron(nn.Module):
    """The attributes and buffers of detectron2's class, which no test environment has."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name in BUFFERS:
            self.register_buffer(name, torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def test_converts_detectron2s(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the class that its module has: another of the same name is left."""
    package = "detectron2.layers.batch_norm"
    module, cls = ModuleType(package), type("FrozenBatchNorm2d", (Detectron,), {"__module__": package})
    net, x = nn.Sequential(randomized(cls(6))), torch.randn(2, 6, 4, 4)
    fastnorm.convert(net)
    assert type(net[0]) is cls
    module.FrozenBatchNorm2d = cls  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, module)
    y = net(x)
    fastnorm.convert(net)
    assert type(net[0]) is fastnorm.FrozenBatchNorm2d and net[0].num_features == 6
    assert_alike(net(x), y)
    monkeypatch.delitem(sys.modules, package)
    with pytest.raises(ImportError, match="detectron2"):
        fastnorm.revert(net)
    assert type(net[0]) is fastnorm.FrozenBatchNorm2d
    monkeypatch.setitem(sys.modules, package, module)
    assert type(fastnorm.revert(net)[0]) is cls and "_converted_from" not in vars(net[0])
