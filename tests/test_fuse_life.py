"""A fused model in use: copies, pickles, hooks, replaced modules, derivatives, torch.compile, bytes, reverts."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnorm
from tests.test_convert import ResNetBlock, UNetBlock
from tests.test_fuse import fused, refusals
from tests.test_fuse_containers import ConvBN, Residual


class Net(nn.Module):
    """Places of all kinds: an nn.Sequential, a method, a module that returns a norm's output."""

    def __init__(self, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.GroupNorm(2, 4), act())
        self.block = Residual(ConvBN())
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act()

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        return x * self.act(self.norm(self.conv(x)))

    def custom(self) -> str:
        return "kept"


FUSED = {"stem.1": "silu", "block.branch.bn": "add + relu", "norm": "silu"}


def pair() -> tuple[nn.Module, Net]:
    native = Net()
    for p in native.parameters():
        nn.init.normal_(p, 0.2, 0.5)
    ours = fastnorm.fuse(copy.deepcopy(native))
    assert fused(ours) == FUSED
    return native, ours


X = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved, lambda m: m])
def test_copies_are_fused_and_can_be_reverted(make: Callable[[nn.Module], nn.Module]) -> None:
    native, ours = pair()
    copied = make(ours)
    assert fused(copied) == FUSED and copied.custom() == "kept" and isinstance(copied, Net)  # type: ignore[operator]
    torch.testing.assert_close(copied(X), native(X), rtol=1e-4, atol=1e-5)
    fastnorm.revert(copied)
    assert [type(m) for m in copied.modules()] == [type(m) for m in native.modules()]
    torch.testing.assert_close(copied(X), native(X), rtol=1e-4, atol=1e-5)
    assert fastnorm.fuse(copied) is copied and fused(copied) == FUSED


def test_everything_is_kept() -> None:
    native = Net()
    before = {id(t): name for name, t in (*native.named_parameters(), *native.named_buffers())}
    keys, modules = list(native.state_dict()), [name for name, _ in native.named_modules()]
    native.norm.weight.requires_grad_(False)
    native.block.eval()
    flags = [m.training for m in native.modules()]
    fastnorm.fuse(native)
    assert {id(t): name for name, t in (*native.named_parameters(), *native.named_buffers())} == before
    assert list(native.state_dict()) == keys and [name for name, _ in native.named_modules()] == modules
    assert [m.training for m in native.modules()] == flags and not native.norm.weight.requires_grad
    fastnorm.revert(native)
    assert [m.training for m in native.modules()] == flags
    assert not [name for m in native.modules() for name in vars(m) if "fus" in name or name == "activation"]


def test_checkpoints_go_both_ways() -> None:
    native, ours = pair()
    other = fastnorm.fuse(Net())
    other.load_state_dict(native.state_dict())
    torch.testing.assert_close(other.eval()(X), native.eval()(X), rtol=1e-4, atol=1e-5)
    native.load_state_dict(ours.state_dict())


def test_modes_are_those_of_the_model() -> None:
    native, ours = pair()
    for training in (True, False, True, False):
        native.train(training)
        ours.train(training)
        torch.testing.assert_close(ours(X), native(X), rtol=1e-4, atol=1e-5)
    ours.norm.train()  # a norm of its own mode
    native.norm.train()
    torch.testing.assert_close(ours(X), native(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), native.state_dict(), rtol=1e-4, atol=1e-5)


def test_double_backward() -> None:
    native, ours = (m.double() for m in pair())
    results = []
    for m in (ours, native):
        x = X.double().requires_grad_()
        (dx,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [x, *m.parameters()], allow_unused=True))
    for actual, expected in zip(*results, strict=True):
        if actual is None or expected is None:  # of a constant that the other way adds as zeros
            given = actual if expected is None else expected
            assert given is None or not given.any()
        else:
            torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile(compiler: str) -> None:
    native, ours = pair()
    compiled = torch.compile(ours, backend=compiler, fullgraph=True)
    for _ in range(2):
        x = X.clone().requires_grad_()
        y = compiled(x)
        expected = native(X)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        y.sum().backward()
    torch.testing.assert_close(ours.state_dict(), native.state_dict(), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


TOOLS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "torch.fx": torch.fx.symbolic_trace,
    "torch.export": lambda m: torch.export.export(m, (X,)).module(),
    "torch.jit.trace": lambda m: torch.jit.trace(m, X),
    "torch.jit.script": torch.jit.script,
    "functional_call": lambda m: lambda x: torch.func.functional_call(m, dict(m.state_dict()), (x,)),
    "vmap": lambda m: lambda x: torch.vmap(m)(x[None])[0],
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "copy": copy.copy,
}


@pytest.mark.fallback
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_see_what_the_model_computes(tool: str) -> None:
    native, ours = pair()
    expected = native.eval()(X)
    torch.testing.assert_close(TOOLS[tool](ours.eval())(X), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(X), expected, rtol=1e-4, atol=1e-5)  # and leave it as it is


def test_replicas_of_data_parallel() -> None:
    """As torch.nn.parallel.replicate makes them, which needs GPUs."""
    native, ours = pair()
    replicas: dict[nn.Module, Any] = {m: m._replicate_for_data_parallel() for m in ours.modules()}
    for m, replica in replicas.items():
        for name, child in m.named_children():
            setattr(replica, name, replicas[child])
        for name, p in m.named_parameters(recurse=False):
            setattr(replica, name, p.clone())
        replica._parameters |= {name: None for name, p in m._parameters.items() if p is None}
    torch.testing.assert_close(replicas[ours](X), native(X), rtol=1e-4, atol=1e-5)
    assert [type(replica) for replica in replicas.values()] == [type(m) for m in ours.modules()]
    assert fused(replicas[ours]) == fused(ours) == FUSED


# ---- hooks ----


@pytest.mark.parametrize("where", ["norm", "act", "stem.1", "stem.2", "block.relu", "block.branch", "block.branch.bn"])
def test_what_has_hooks_is_left(where: str) -> None:
    native = Net()
    shapes: list[Tensor] = []
    native.get_submodule(where).register_forward_hook(lambda module, args, output: shapes.append(output.clone()))
    ours = fastnorm.fuse(copy.deepcopy(native))
    if where == "block.relu":  # the sum in front of it is no matter of its hooks
        assert fused(ours) == FUSED | {"block.branch.bn": "add"}
    else:
        assert len(fused(ours)) == 2 and any("hooks" in reason for reason in refusals(ours).values())
    native(X), ours(X)
    torch.testing.assert_close(shapes[0], shapes[1], rtol=1e-4, atol=1e-5)


# ---- when the model changes ----


def test_a_replaced_norm_keeps_its_activation() -> None:
    """Rewritten methods ask the norm; where it is another one, they add and activate themselves."""
    native, ours = pair()
    for m in (native, ours):
        m.norm = nn.BatchNorm2d(4)
        m.block.branch.bn = nn.GroupNorm(1, 4)
        m.eval()
    torch.testing.assert_close(ours(X), native(X), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:convert_sync_batchnorm")
def test_sync_batch_norm_keeps_the_activation_of_a_rewritten_method() -> None:
    native = ResNetBlock()
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(fastnorm.fuse(copy.deepcopy(native)))
    assert isinstance(ours.bn2, nn.SyncBatchNorm)
    torch.testing.assert_close(ours.eval()(X), native.eval()(X))


def test_a_replaced_activation_is_obeyed() -> None:
    """What a rewritten method takes for granted is set: the module is itself again."""
    native, ours = pair()
    for m in (native, ours):
        m.act = nn.Tanh()
        m.block.relu = nn.Sigmoid()
    assert fused(ours) == {"stem.1": "silu"} and type(ours) is Net
    torch.testing.assert_close(ours(X), native(X), rtol=1e-4, atol=1e-5)


def test_settings_that_are_added_are_obeyed() -> None:
    for change in (lambda m: m.add_module("act", nn.Tanh()), lambda m: m.register_module("act", nn.Tanh())):
        native, ours = pair()
        for m in (native, ours):
            change(m)
        torch.testing.assert_close(ours(X), native(X), rtol=1e-4, atol=1e-5)


def test_slices_of_containers_are_ordinary() -> None:
    native = Residual(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    ours = fastnorm.fuse(copy.deepcopy(native))
    x = torch.randn(2, 4, 3, 3)
    assert type(ours.branch[:1]) is nn.Sequential
    torch.testing.assert_close(ours.branch[:1](x), native.branch[:1](x))


def test_a_sum_with_none_is_an_error() -> None:
    ours = fastnorm.fuse(Sum(False))
    with pytest.raises(TypeError, match="unsupported operand"):
        ours(torch.randn(2, 4, 3, 3), None)


@pytest.mark.parametrize("part", ["norm", "block", "block.branch", "block.branch.bn", "stem", "stem.1", "stem.2"])
def test_a_part_can_be_reverted(part: str) -> None:
    native, ours = pair()
    fastnorm.revert(ours.get_submodule(part))
    torch.testing.assert_close(ours(X), native(X), rtol=1e-4, atol=1e-5)
    fastnorm.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in native.modules()]
    torch.testing.assert_close(ours(X), native(X), rtol=1e-4, atol=1e-5)


def test_reverted_for_a_while() -> None:
    native, ours = pair()
    with fastnorm.reverted(ours):
        assert [type(m) for m in ours.modules()] == [type(m) for m in native.modules()]
    assert fused(ours) == FUSED


def test_converted_norms_are_fused_too() -> None:
    ours = fastnorm.fuse(fastnorm.convert(Net()))
    assert fused(ours) == FUSED
    fastnorm.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in Net().modules()]


def test_norms_that_fuse_already_are_left() -> None:
    model = nn.Sequential(fastnorm.GroupNorm(2, 4, activation="silu"), nn.ReLU())
    x = torch.randn(2, 4, 3)
    expected = model(x)
    assert torch.equal(fastnorm.fuse(model)(x), expected) and not fused(model)
    assert refusals(model) == {"0": "has an activation of its own"}


# ---- residuals of other kinds ----


class Sum(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.norm, self.in_place = nn.BatchNorm2d(4), in_place

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.norm(x)
        if self.in_place:
            y += residual
        else:
            y = residual + y
        return F.silu(y)


@pytest.mark.fallback("residual")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (1, 4, 1, 1), (5,), (), (3, 2, 4, 5, 5)])
def test_residuals_that_broadcast_or_have_another_dtype(
    in_place: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Shape and dtype of the output are torch's; what torch refuses is refused."""
    native = Sum(in_place)
    ours = fastnorm.fuse(copy.deepcopy(native))
    assert fused(ours) == {"norm": "add + silu"}
    x, residual = torch.randn(2, 4, 5, 5), torch.randn(shape).mul(3).to(dtype)
    try:
        expected = native(x, residual)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=r"shape|size") as caught:
            ours(x, residual)
        assert str(caught.value) == str(error)
        return
    actual = ours(x, residual)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(ours.state_dict(), native.state_dict())


@pytest.mark.fallback("residual")
def test_autocast_keeps_dtypes() -> None:
    native = ResNetBlock()
    ours = fastnorm.fuse(copy.deepcopy(native))
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = native(X[..., :4, :4]), ours(X[..., :4, :4])
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


# ---- what is kept for backward ----


def bytes_saved(model: nn.Module, *inputs: Tensor) -> float:
    """In sizes of the first input; tensors that share memory count once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(*inputs)
    for p in model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    return sum(kept.values()) / inputs[0].untyped_storage().nbytes()


class AddReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(16), nn.ReLU(inplace=True)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        y = self.norm(x)
        y += r
        return self.relu(y)


class AddSiLU(AddReLU):
    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return F.silu(self.norm(x) + r)


@pytest.mark.parametrize(
    ("model", "inputs", "native", "ours"),
    [
        (AddReLU(), 2, 2.0, 1 + 1 / 32),  # a bit for each element
        (nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(inplace=True)), 1, 2.0, 1.0),
        (nn.Sequential(nn.BatchNorm2d(16), nn.SiLU()), 1, 2.0, 1.0),
        (nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU()), 1, 2.0, 1.0),
        (nn.Sequential(nn.GroupNorm(4, 16), nn.GELU()), 1, 2.0, 1.0),
        (AddSiLU(), 2, 2.0, 2.0),  # z cannot be made again without the residual, which torch.nn's z is the size of
    ],
)
def test_bytes_kept_for_backward(model: nn.Module, inputs: int, native: float, ours: float) -> None:
    tensors = [torch.randn(4, 16, 32, 32, requires_grad=True) for _ in range(inputs)]
    assert bytes_saved(model, *tensors) == pytest.approx(native, abs=0.01)
    fused_model = fastnorm.fuse(copy.deepcopy(model))
    assert fused(fused_model)
    assert bytes_saved(fused_model, *tensors) == pytest.approx(ours, abs=0.01)


def test_unet_block_keeps_half_of_its_activations() -> None:
    model = UNetBlock(15, 15 * 4)
    x = torch.randn(2, 15, 16, 16, requires_grad=True)
    before = bytes_saved(model, x)
    after = bytes_saved(fastnorm.fuse(model), x)
    assert before - after == pytest.approx(1.0 + 4.0, abs=0.1)  # z of either norm
