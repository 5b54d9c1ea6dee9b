"""True to torch.nn under whatever wraps, traces, replaces or inspects a norm."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx.experimental.optimization
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastnorm

NORMS: dict[str, tuple[Callable[[Any], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda ns: ns.BatchNorm1d(4), (3, 4)),
    "BatchNorm2d": (lambda ns: ns.BatchNorm2d(4), (2, 4, 3, 4)),
    "GroupNorm": (lambda ns: ns.GroupNorm(2, 4), (2, 4, 3, 4)),
    "InstanceNorm2d": (lambda ns: ns.InstanceNorm2d(4, affine=True, track_running_stats=True), (2, 4, 3, 4)),
    "LayerNorm": (lambda ns: ns.LayerNorm(4), (2, 3, 4)),
}
each_norm = pytest.mark.parametrize(("make", "shape"), NORMS.values(), ids=NORMS.keys())
Make = Callable[[Any], nn.Module]


# A forward of the instance's own: offloading, timers, graph capture.


def wrap(module: nn.Module) -> None:
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)


@each_norm
def test_a_wrapped_forward_outlives_revert(make: Make, shape: tuple[int, ...]) -> None:
    module, x = make(fastnorm).eval(), torch.randn(shape)
    wrap(module)
    expected = module(x)
    assert fastnorm.report(module).rows[0].status == "left"  # it may compute something else
    fastnorm.revert(module)
    torch.testing.assert_close(module(x), expected)
    fastnorm.convert(module)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_wrapped_forward_with_a_residual(activation: str | None) -> None:
    module, x, residual = fastnorm.GroupNorm(2, 4, activation=activation), torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    wrap(module)
    expected = module(x, residual)
    fastnorm.revert(module)
    if activation is not None:
        torch.testing.assert_close(module(x, residual), expected)
    else:
        with pytest.raises(TypeError):  # torch.nn's takes no residual
            module(x, residual)


@each_norm
def test_a_leftover_bound_method_is_no_patch(make: Make, shape: tuple[int, ...]) -> None:
    """What accelerate's remove_hook_from_module leaves in the instance: the class's own forward, bound."""
    module, x = make(nn).eval(), torch.randn(shape)
    expected = module(x)
    module.forward = module.forward
    fastnorm.convert(module)
    assert type(module).__module__ == "fastnorm.modules" and "forward" not in vars(module)
    torch.testing.assert_close(module(x), expected)
    module.forward = module.forward
    (row,) = fastnorm.report(module)
    assert row.status == "served"
    fastnorm.revert(module)
    assert type(module).__module__.startswith("torch.nn") and "forward" not in vars(module)
    torch.testing.assert_close(module(x), expected)


def test_a_wrapper_that_goes_after_revert_leaves_nothing() -> None:
    module, x = fastnorm.GroupNorm(2, 4), torch.randn(2, 4, 3)
    inner, expected = module.forward, module(x)
    module.forward = lambda x: inner(x)
    fastnorm.revert(module)
    module.forward = inner
    torch.testing.assert_close(module(x), expected)
    assert type(fastnorm.convert(module)) is fastnorm.GroupNorm and "forward" not in vars(module)


def test_a_patch_is_a_patch() -> None:
    """Another module's method, another function of the class's: convert leaves them."""
    other = nn.LayerNorm(4)
    for forward in (
        other.forward,
        types.MethodType(lambda self, x: x, other),
        lambda x: x,
        types.MethodType(nn.Identity.forward, nn.LayerNorm(4)),
    ):
        module = nn.LayerNorm(4)
        module.forward = forward
        assert type(fastnorm.convert(module)) is nn.LayerNorm
        assert "replaced on the instance" in fastnorm.report(module).rows[0].why


# Attributes: whatever self.weight gives.


def shadow_in_dict(ns: Any) -> Tensor:
    module, scale = ns.LayerNorm(4), torch.tensor(3.0, requires_grad=True)
    module.__dict__["weight"] = scale * torch.ones(4)
    y = module(torch.arange(4.0).view(1, 4))
    y[0, 3].backward()
    return torch.stack([y[0, 3].detach(), scale.grad])


def shadow_bias(ns: Any) -> Tensor:
    module = ns.GroupNorm(2, 4)
    module.__dict__["bias"] = torch.full((4,), 5.0)
    return module(torch.arange(24.0).view(2, 4, 3)).detach()


def shadow_by_property(ns: Any) -> Tensor:
    class Centred(ns.LayerNorm):
        def __init__(self) -> None:
            super().__init__(4, elementwise_affine=False)
            self.gamma = nn.Parameter(torch.full((4,), 2.0))

        weight = property(lambda self: 1 + self.gamma)

    return Centred()(torch.arange(4.0).view(1, 4)).detach()


def shadow_statistics(ns: Any) -> Tensor:
    module = ns.BatchNorm1d(4).eval()
    module.__dict__["running_mean"] = torch.full((4,), 2.0)
    return module(torch.arange(8.0).view(2, 4)).detach()


def shadow_statistics_by_property(ns: Any) -> Tensor:
    class Fixed(ns.BatchNorm2d):
        running_var = property(lambda self: torch.full((4,), 9.0), lambda self, value: None)

        def register_buffer(self, name: str, *args: Any, **kwargs: Any) -> None:
            if name != "running_var":
                super().register_buffer(name, *args, **kwargs)

        def reset_running_stats(self) -> None:
            pass

    return Fixed(4).eval()(torch.arange(64.0).view(1, 4, 4, 4)).detach()


def parametrized(ns: Any) -> Tensor:
    module = ns.BatchNorm2d(4).eval()
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Softplus())
    return module(torch.arange(64.0).view(1, 4, 4, 4)).detach()


@pytest.mark.parametrize(
    "of",
    [shadow_in_dict, shadow_bias, shadow_by_property, shadow_statistics, shadow_statistics_by_property, parametrized],
)
def test_weights_are_whatever_the_attribute_is(of: Callable[[Any], Tensor]) -> None:
    torch.testing.assert_close(of(fastnorm), of(nn))


def moved(ns: Any, cls: str, name: str) -> Tensor:
    """A Parameter that is a buffer instead, or a buffer that is a Parameter."""
    module = getattr(ns, cls)(*((2, 4) if cls == "GroupNorm" else (4,))).eval()
    value = getattr(module, name)
    delattr(module, name)
    if isinstance(value, nn.Parameter):
        module.register_buffer(name, value.data * 3)
    else:
        module.register_parameter(name, nn.Parameter(value * 3, requires_grad=False))
    return module(torch.arange(64.0).view(1, 4, 4, 4)).detach()


@pytest.mark.parametrize(
    ("cls", "name"),
    [(c, n) for c in ("BatchNorm2d", "GroupNorm") for n in ("weight", "bias")]
    + [("BatchNorm2d", "running_mean"), ("BatchNorm2d", "running_var")],
)
def test_weights_may_be_of_another_kind(cls: str, name: str) -> None:
    torch.testing.assert_close(moved(fastnorm, cls, name), moved(nn, cls, name))


def test_evaluation_does_without_a_count_of_batches() -> None:
    module, x = fastnorm.BatchNorm2d(4).eval(), torch.randn(2, 4, 3, 3)
    expected = module(x)
    del module.num_batches_tracked
    assert torch.equal(module(x), expected)


# The attribute `activation`: torch.nn's norms have none.


@each_norm
def test_a_plain_norm_has_no_activation(make: Make, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for module in (fastnorm.convert(make(nn)), make(fastnorm)):
        assert vars(module).keys() == vars(make(nn)).keys()
        assert not hasattr(module, "activation") and not hasattr(module, "activation_param")
        expected = module.eval()(x)
        for value in (nn.ReLU(), torch.tanh, "relu", None, 3):
            module.activation = value
            assert module.activation is value
            assert torch.equal(module(x), expected)
            again = fastnorm.convert(fastnorm.revert(module))
            assert again.activation is value and torch.equal(again(x), expected)
            del module.activation


def test_convert_leaves_an_attribute_of_the_users_alone() -> None:
    native = nn.GroupNorm(2, 4)
    native.activation = nn.SiLU()
    module = fastnorm.convert(native)
    assert type(module) is fastnorm.GroupNorm and isinstance(module.activation, nn.SiLU)
    assert list(module.state_dict()) == ["weight", "bias"]


def test_a_fused_activation_may_be_set() -> None:
    module, x = fastnorm.LayerNorm(4, activation="relu"), torch.randn(2, 4)
    z = F.layer_norm(x, (4,))
    torch.testing.assert_close(module(x), F.relu(z))
    module.activation, module.activation_param = "leaky_relu", 0.3
    torch.testing.assert_close(module(x), F.leaky_relu(z, 0.3))
    assert "activation='leaky_relu', activation_param=0.3" in repr(module)
    module.activation = None
    torch.testing.assert_close(module(x), z)
    assert type(fastnorm.revert(module)) is nn.LayerNorm and vars(module).keys() == vars(nn.LayerNorm(4)).keys()
    module = fastnorm.LayerNorm(4, activation="relu")
    module.activation = nn.ReLU()
    with pytest.raises(ValueError, match="activation must be one of"):
        module(x)


# Tensor subclasses.


class Meta(Tensor):
    """Carries metadata as MONAI's MetaTensor does: its class's functions wrap results and pass `meta` on."""

    meta: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, Meta) and isinstance(args[0], Meta):
            result.meta = args[0].meta
        return result


class Plain(Tensor):
    pass


class Picky(Tensor):
    """Knows torch.nn.functional's functions, and no others."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "").startswith("fastnorm"):
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs or {})


@each_norm
def test_tensors_with_metadata_are_served_and_wrapped(make: Make, shape: tuple[int, ...]) -> None:
    module, x, residual = make(fastnorm), torch.randn(shape), torch.randn(shape)
    expected = module.eval()(x, residual)
    tagged = x.as_subclass(Meta)
    tagged.meta = "spacing"
    y = module(tagged, residual)
    assert type(y) is Meta and y.meta == "spacing" and torch.equal(y.as_subclass(Tensor), expected)
    y = module(x.as_subclass(Plain), residual.as_subclass(Plain))
    assert type(y) is Plain and torch.equal(y.as_subclass(Tensor), expected)
    (row,) = fastnorm.report(module)
    assert (row.served_calls, row.left_calls) == (3, 0)


def test_tensors_with_metadata_have_gradients() -> None:
    module, x = fastnorm.BatchNorm2d(4, activation="silu"), torch.randn(2, 4, 3, 3, requires_grad=True)
    expected = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    y = module(x.as_subclass(Plain)).as_subclass(Tensor)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]), expected)


@pytest.mark.fallback
def test_a_class_that_does_not_know_us_gets_torch() -> None:
    x = torch.randn(2, 3, 4)
    y = fastnorm.functional.layer_norm(x.as_subclass(Picky), (4,))
    assert type(y) is Picky
    torch.testing.assert_close(y.as_subclass(Tensor), F.layer_norm(x, (4,)))


# Fake tensors, make_fx, export.


@each_norm
@pytest.mark.parametrize("last", [False, True], ids=["planar", "channels_last"])
def test_fake_tensors_are_as_real_ones(make: Make, shape: tuple[int, ...], last: bool) -> None:
    """Sizes, strides and dtypes of y and of the gradients."""

    def run() -> list[Tensor]:
        x = torch.randn(shape)
        if last and len(shape) == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        module = make(fastnorm)
        y = module(x.requires_grad_())
        return [y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])]

    real = run()
    with FakeTensorMode():
        fake = run()
    for a, b in zip(real, fake, strict=True):
        assert type(b).__name__ == "FakeTensor"
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.fallback
@each_norm
def test_graphs_for_compilers_hold_torchs_operators_alone(make: Make, shape: tuple[int, ...]) -> None:
    module, x = nn.Sequential(make(fastnorm)).eval(), torch.randn(shape)
    with torch.no_grad():
        graph = make_fx(module)(x)
    assert not [n for n in graph.graph.nodes if "fastnorm" in str(n.target)]
    torch.testing.assert_close(graph(x), module(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, x)
    assert "fastnorm::" not in str(traced.inlined_graph)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("last", [False, True], ids=["planar", "channels_last"])
@pytest.mark.parametrize(
    ("groups", "dims", "activation", "use_input_stats", "momentum"),
    [(0, 0, 1, True, 0.1), (0, 0, 3, True, None), (0, 0, 1, False, None), (3, 0, 3, True, None), (6, 0, 0, True, 0.1),
     (0, 1, 5, True, None), (0, 2, 0, True, None)],
)  # fmt: skip
def test_opcheck_of_the_eager_operator(
    groups: int, dims: int, activation: int, use_input_stats: bool, momentum: float | None, last: bool, grad: bool
) -> None:
    format = torch.channels_last if last else torch.contiguous_format
    x, residual = (torch.randn(2, 6, 5, 4).contiguous(memory_format=format).requires_grad_(grad) for _ in range(2))
    parameters = [torch.rand((6,), requires_grad=grad) if not dims else torch.rand(x.shape[-dims:]) for _ in range(2)]
    tracked = groups in (0, 6) and not dims
    statistics = [torch.rand(6), torch.rand(6)] if tracked else [None, None]
    batches = torch.tensor(2) if tracked and groups == 0 and use_input_stats else None
    args = (x, *parameters, residual, *statistics, batches)
    config = (groups, dims, 1e-5, activation, 0.01, use_input_stats, momentum)
    torch.library.opcheck(torch.ops.fastnorm.norm.default, (*args, *config))


# Tools that look a class up exactly.


def test_reverted_is_torch_nn_for_a_while() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), fastnorm.BatchNorm2d(4), fastnorm.GroupNorm(2, 4, activation="silu"), nn.LayerNorm(3)
    )
    x = torch.randn(2, 3, 5, 5)
    expected = model.eval()(x)
    with fastnorm.reverted(model) as same:
        assert same is model and type(model[1]) is nn.BatchNorm2d and isinstance(model[2], nn.GroupNorm)
        torch.testing.assert_close(model(x), expected)
    assert [type(m) for m in model[1:]] == [fastnorm.BatchNorm2d, fastnorm.GroupNorm, nn.LayerNorm]
    assert torch.equal(model(x), expected)
    with pytest.raises(KeyError), fastnorm.reverted(model):
        raise KeyError
    assert type(model[1]) is fastnorm.BatchNorm2d


def test_a_tool_may_replace_norms_while_reverted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), fastnorm.BatchNorm2d(4), fastnorm.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    with fastnorm.reverted(model):
        fused = torch.fx.experimental.optimization.fuse(model)
        model[1], model[0] = nn.Identity(), nn.utils.fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert [type(m) for m in model] == [nn.Conv2d, nn.Identity, fastnorm.BatchNorm2d]


@pytest.mark.parametrize("activation", [None, "relu"])
def test_convert_sync_batchnorm_says_what_it_loses(activation: str | None) -> None:
    model = nn.Sequential(fastnorm.BatchNorm2d(4, activation=activation), fastnorm.BatchNorm1d(3))
    expected = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[0]) is nn.SyncBatchNorm
    assert [str(w.message) for w in seen if "loses its activation, 'relu'" in str(w.message)] or activation is None
    assert len(seen) == (activation is not None)
    torch.testing.assert_close(converted.state_dict(), expected)
