"""A fused model that is edited computes what the same edit makes of the unfused one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnorm
from tests.test_fuse import compare, fused
from tests.test_fuse_containers import ConvBN, Residual

Edit = Callable[[nn.Module], nn.Module | None]
X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))


def assert_alike(native: nn.Module, *edits: Edit, text: str | None = None) -> nn.Module:
    """Outputs, input gradients and statistics after the same edits of a model and of its fused copy."""
    ours = fastnorm.fuse(copy.deepcopy(native))
    assert fused(ours)
    results = []
    for edit in (lambda m: None, *edits):  # the first: unchanged
        results.clear()
        for i, m in enumerate((ours, native)):
            torch.manual_seed(2)
            edited = edit(m) or m
            x = X.clone().requires_grad_()
            y = edited(x)
            y.square().sum().backward()
            results.append((y, x.grad, dict(edited.state_dict())))
            ours, native = (edited, native) if i == 0 else (ours, edited)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    return ours


def act_walker(m: nn.Module) -> None:
    """What users write to replace all activations of a kind."""
    for name, child in m.named_children():
        if isinstance(child, nn.ReLU):
            setattr(m, name, nn.Tanh())
        else:
            act_walker(child)


def last_conv_bn(m: nn.Sequential) -> None:
    m[0] = nn.utils.fuse_conv_bn_eval(m[0].eval(), m[1].eval())
    m[1] = nn.Identity()


def hooked(m: nn.Module) -> None:
    for module in list(m.modules()):
        module.register_forward_hook(lambda module, args, output: output * 1.5)


def patched(m: nn.Module) -> None:
    for module in m.modules():
        if not list(module.children()):
            own = module.forward
            module.forward = lambda x, own=own: own(x) + 0.5  # type: ignore[method-assign]


EDITS: dict[str, Edit] = {
    "norm": lambda m: m.__setitem__(1, nn.BatchNorm2d(4).eval()),
    "norm of ours": lambda m: m.__setitem__(1, fastnorm.GroupNorm(2, 4)),
    "norm with an activation": lambda m: m.__setitem__(1, fastnorm.GroupNorm(2, 4, activation="silu")),
    "no norm": lambda m: m.__setitem__(1, nn.Identity()),
    "folded": last_conv_bn,
    "synchronized": lambda m: fastnorm.convert_sync_batchnorm(m),
    "torch's synchronized": lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m).eval(),
    "activation": lambda m: m.__setitem__(2, nn.Tanh()),
    "unknown activation": lambda m: m.__setitem__(2, nn.Softplus()),
    "setattr": lambda m: setattr(m, "2", nn.Tanh()),
    "set_submodule": lambda m: m.set_submodule("2", nn.Tanh()),
    "add_module": lambda m: m.add_module("2", nn.Tanh()),
    "register_module": lambda m: m.register_module("2", nn.Tanh()),
    "_modules": lambda m: m._modules.__setitem__("2", nn.Tanh()),
    "walker": act_walker,
    "deleted": lambda m: m.__delitem__(2),
    "popped": lambda m: m.pop(2) and None,
    "slice": lambda m: m[:2],
    "back": lambda m: m[1:],
    "children": lambda m: nn.Sequential(*list(m.children())[:-1]),
    "norm alone": lambda m: m[1],
    "appended": lambda m: m.append(nn.Tanh()),
    "inserted": lambda m: m.insert(2, nn.Conv2d(4, 4, 1)),
    "extended": lambda m: m.extend([nn.BatchNorm2d(4), nn.SiLU()]),
    "reversed": lambda m: nn.Sequential(*reversed(m)),
    "in place": lambda m: setattr(m[2], "inplace", True),
    "weight norm": lambda m: nn.utils.parametrize.register_parametrization(m[1], "weight", nn.Softplus()) and None,
    "hooks": hooked,
    "forward": patched,
    "frozen": lambda m: m[1].requires_grad_(False) and None,
    "reverted norm": lambda m: fastnorm.revert(m[1]) and None,
    "reverted": lambda m: fastnorm.revert(m),
    "fused again": lambda m: fastnorm.fuse(m),
    "copied": copy.deepcopy,
    "nested": lambda m: nn.Sequential(m, nn.ReLU()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU()], ids=["relu", "silu"])
def test_an_edited_sequential(name: str, act: nn.Module) -> None:
    native = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), copy.deepcopy(act)).eval()
    nn.init.normal_(native[1].weight)
    # Behind a second edit too: what an edit has left is a model as any other.
    assert_alike(native, EDITS[name], lambda m: copy.deepcopy(m))


OUTER: dict[str, Edit] = {
    "activation": lambda m: m.__setitem__(1, nn.Tanh()),
    "no activation": lambda m: m.__delitem__(1),
    "appended inside": lambda m: m[0].append(nn.Tanh()) and None,
    "norm inside": lambda m: m[0].__setitem__(1, nn.GroupNorm(2, 4)),
    "norm taken inside": lambda m: m[0].__delitem__(1),
    "inner alone": lambda m: m[0],
    "inner replaced": lambda m: m.__setitem__(0, nn.Conv2d(4, 4, 1)),
    "inner reverted": lambda m: fastnorm.revert(m[0]) and None,
    "inner hooks": lambda m: m[0].register_forward_hook(lambda module, args, output: output - 1) and None,
}


@pytest.mark.parametrize("name", OUTER)
def test_an_edited_container_of_a_container(name: str) -> None:
    native = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.SiLU())
    assert_alike(native, OUTER[name])


TAIL: dict[str, Edit] = {
    "appended": lambda m: m.branch.append(nn.GELU()) and None,
    "norm": lambda m: m.branch.__setitem__(1, nn.GroupNorm(2, 4)),
    "no norm": lambda m: m.branch.__setitem__(1, nn.Identity()),
    "norm taken": lambda m: m.branch.__delitem__(1),
    "branch": lambda m: setattr(m, "branch", nn.Conv2d(4, 4, 1)),
    "branch alone": lambda m: m.branch,
    "norm alone": lambda m: m.branch[1],
    "slice": lambda m: m.branch[:2],
    "activation": lambda m: setattr(m, "relu", nn.Tanh()),
    "hooks": hooked,
}


@pytest.mark.parametrize("name", TAIL)
@pytest.mark.parametrize("in_place", [False, True])
def test_an_edited_tail_with_the_sum_outside(name: str, in_place: bool) -> None:
    branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    native: nn.Module = InPlace(branch) if in_place else Residual(branch)
    assert_alike(native, TAIL[name])


class InPlace(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        y += x
        return self.relu(y)


class Between(nn.Module):
    """What runs between the norm and the sum may be replaced by what works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.down = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        y += self.down(x)
        return F.relu(y)


class Made(Between):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = self.bn(y)
        r = self.down(x)
        y = y + r
        return F.relu(y)


@pytest.mark.parametrize(("cls", "name"), [(Between, "down"), (Made, "down"), (Made, "conv")])
def test_an_edit_of_what_runs_before_the_sum(cls: type[Between], name: str) -> None:
    native = cls()
    ours = fastnorm.fuse(copy.deepcopy(native))
    assert fused(ours) == {"bn": "add + relu"}
    for m in (native, ours):
        setattr(m, name, nn.Identity())
        m.down = nn.Hardtanh(-0.1, 0.1, inplace=True)
    torch.testing.assert_close(ours(X.clone()), native(X.clone()), rtol=1e-4, atol=1e-5)


class Act(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.act, self.acts = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act, nn.ModuleList([act])
        self.inner = Residual(ConvBN())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.act(self.bn(self.conv(x)))) + x


class Listed(Act):
    def forward(self, x: Tensor) -> Tensor:
        return self.acts[0](self.bn(self.conv(x)))


METHOD: dict[str, Edit] = {
    "slope": lambda m: setattr(m.act, "negative_slope", 0.7),
    "approximate": lambda m: setattr(m.act, "approximate", "tanh"),
    "_modules": lambda m: m._modules.__setitem__("act", nn.Tanh()),
    "setattr": lambda m: setattr(m, "act", nn.Tanh()),
    "add_module": lambda m: m.add_module("act", nn.Tanh()),
    "register_module": lambda m: m.register_module("act", nn.Softplus()),
    "list": lambda m: m.acts.__setitem__(0, nn.Tanh()),
    "class": lambda m: setattr(m.act, "__class__", nn.Tanh),
    "hooks": hooked,
    "forward": patched,
    "conv": lambda m: setattr(m.inner.branch, "conv", nn.Identity()),
    "norm": lambda m: m._modules.__setitem__("bn", nn.Identity()),
    "norm inside": lambda m: setattr(m.inner.branch, "bn", nn.GroupNorm(2, 4)),
    "deleted": lambda m: setattr(m.inner, "relu", nn.Identity()),
}


@pytest.mark.parametrize("name", METHOD)
@pytest.mark.parametrize("cls", [Act, Listed])
@pytest.mark.parametrize("act", [nn.LeakyReLU(0.1), nn.GELU()], ids=["leaky_relu", "gelu"])
def test_a_method_obeys_the_activation_it_has_now(name: str, cls: type[Act], act: nn.Module) -> None:
    assert_alike(cls(copy.deepcopy(act)), METHOD[name])


def test_parts_of_a_fused_model_are_themselves() -> None:
    """Code outside of the model that calls a norm gets the norm, and its hooks see the norm's output."""
    native = Act(nn.SiLU())
    ours = fastnorm.fuse(copy.deepcopy(native))
    for part in ("bn", "inner.branch", "inner.branch.bn"):
        torch.testing.assert_close(ours.get_submodule(part)(X), native.get_submodule(part)(X))
    seen: dict[str, list[Tensor]] = {"ours": [], "native": []}
    for key, m in (("ours", ours), ("native", native)):
        for module in m.modules():
            module.register_forward_hook(lambda module, args, output, key=key: seen[key].append(output.clone()))
        m(X)
    torch.testing.assert_close(seen["ours"], seen["native"], rtol=1e-4, atol=1e-5)


def test_hooks_on_all_modules_are_called() -> None:
    native = Act(nn.SiLU())
    ours = fastnorm.fuse(copy.deepcopy(native))
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        ours(X)
        of_ours = seen.copy()
        seen.clear()
        native(X)
    finally:
        handle.remove()
    assert of_ours == seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_sum_in_place_keeps_its_dtype_where_it_is_not_fused(dtype: torch.dtype) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = ConvBN()

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            y = self.branch(x)
            y += r
            return F.silu(y)

    native = Sum()
    ours = fastnorm.fuse(copy.deepcopy(native))
    assert fused(ours) == {"branch.bn": "add + silu"}
    for m in (native, ours):
        m.branch.bn = nn.InstanceNorm2d(4)
    assert ours(X, X.to(dtype)).dtype == torch.float32
    torch.testing.assert_close(ours(X, X.to(dtype)), native(X, X.to(dtype)), rtol=1e-4, atol=1e-5)


class Private(nn.Module):
    """Names that the compiler changes, wherever a name may stand."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.__act = nn.BatchNorm2d(4), nn.SiLU()

    def forward(self, x: Tensor, __scale: float = 2.0, *, __shift: float = 1.0) -> Tensor:
        from math import pi as __pi

        def __half(__x: Tensor) -> Tensor:
            return __x * float(dict(__x="0.5")["__x"])  # noqa: C408

        try:
            __y = x * __scale
        except ValueError as __error:
            raise TypeError from __error
        y = self.__act(self.bn(__y))
        return __half(self.__sum(y, __pi)) + __shift

    def __sum(self, y: Tensor, *__rest: float, **__more: float) -> Tensor:
        return y + sum(__rest) + len(__more)


class PrivateMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.__activated(x, 3.0)

    def __activated(self, x: Tensor, __scale: float) -> Tensor:
        return F.relu(self.bn(x)) * __scale


@pytest.mark.parametrize("cls", [Private, PrivateMethod])
def test_private_names(cls: type[nn.Module]) -> None:
    assert list(fused(compare(cls(), X))) == ["bn"]


def layer_norm_2d(norm: nn.Module, x: Tensor) -> Tensor:
    """From the definition: of the channels at each position."""
    centred = x - x.mean(1, keepdim=True)
    xhat = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt()
    return xhat * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


def frozen_batch_norm_2d(norm: nn.Module, x: Tensor) -> Tensor:
    mean, var, weight, bias = (t.view(-1, 1, 1) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return (x - mean) / (var + norm.eps).sqrt() * weight + bias


@pytest.mark.parametrize(
    ("cls", "formula"),
    [(fastnorm.LayerNorm2d, layer_norm_2d), (fastnorm.FrozenBatchNorm2d, frozen_batch_norm_2d)],
)
def test_norms_that_torch_nn_lacks(cls: type[nn.Module], formula: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Output and gradients against the definition; what `revert` leaves computes the same."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(4, 4, 1), cls(4), nn.GELU())
            self.norm, self.act = cls(4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(self.stem(x)) + x)

    def by_definition(block: nn.Module, x: Tensor) -> Tensor:
        return F.relu(formula(block.norm, F.gelu(formula(block.stem[1], block.stem[0](x)))) + x)

    ours = Block().double()
    for norm in (ours.norm, ours.stem[1]):
        for name, t in norm.state_dict().items():
            nn.init.uniform_(t, 0.5, 1.5) if name in ("weight", "running_var") else nn.init.normal_(t)
    fastnorm.fuse(ours)
    assert fused(ours) == {"stem.1": "gelu", "norm": "add + relu"}
    results = []
    for call in (ours, lambda x: by_definition(ours, x), lambda x: fastnorm.revert(ours)(x)):
        x = X.double().requires_grad_()
        y = call(x)
        results.append([y, *torch.autograd.grad((y * torch.sin(7 * y)).sum(), [x, *ours.parameters()])])
    assert not fused(ours) and len(results[0]) == 4 + 4 * (cls is fastnorm.LayerNorm2d)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[2], results[1])
