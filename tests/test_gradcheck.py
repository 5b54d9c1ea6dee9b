"""Derivatives against finite differences in float64: backward, double backward, forward mode, and under torch.func."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastnorm import functional
from tests.common.cases import ACTIVATIONS, to_layout
from tests.common.numerics import SLOPE


@dataclasses.dataclass(frozen=True)
class Norm:
    """A functional norm with everything but its tensors fixed."""

    name: str
    shape: tuple[int, ...]
    channels: int | tuple[int, ...]
    call: Callable[..., Tensor]


def frozen(x: Tensor, weight: Tensor, bias: Tensor, **kwargs: object) -> Tensor:
    channels = x.shape[1]
    mean = torch.linspace(-0.5, 0.5, channels, dtype=x.dtype, device=x.device)
    return functional.batch_norm(x, mean, mean + 1.5, weight, bias, **kwargs)


def group(x: Tensor, weight: Tensor, bias: Tensor, **kwargs: object) -> Tensor:
    return functional.group_norm(x, 2, weight, bias, **kwargs)


def instance(x: Tensor, weight: Tensor, bias: Tensor, **kwargs: object) -> Tensor:
    return functional.instance_norm(x, weight=weight, bias=bias, **kwargs)


def batch(x: Tensor, weight: Tensor, bias: Tensor, **kwargs: object) -> Tensor:
    return functional.batch_norm(x, None, None, weight, bias, training=True, **kwargs)


def layer(x: Tensor, weight: Tensor, bias: Tensor, **kwargs: object) -> Tensor:
    return functional.layer_norm(x, weight.shape, weight, bias, **kwargs)


NORMS = (
    Norm("batch", (2, 2, 2, 2), 2, batch),
    Norm("frozen", (1, 3, 2, 2), 3, frozen),
    Norm("group", (2, 4, 1, 2), 4, group),
    Norm("instance", (2, 2, 2, 2), 2, instance),
    Norm("layer", (3, 5), 5, layer),
)


def make_args(norm: Norm, residual: bool, layout: str, device: torch.device) -> tuple[Tensor, ...]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device)

    args = [to_layout(random(*norm.shape), layout), random(norm.channels), random(norm.channels)]
    if residual:
        args.append(to_layout(random(*norm.shape), layout))
    return tuple(a.requires_grad_() for a in args)


def function(norm: Norm, activation: str | None) -> Callable[..., Tensor]:
    def call(x: Tensor, w: Tensor, b: Tensor, residual: Tensor | None = None) -> Tensor:
        return norm.call(x, w, b, residual=residual, activation=activation, activation_param=SLOPE)

    return call


COMBINATIONS = [
    pytest.param(norm, activation, residual, layout, id=f"{norm.name}-{activation}-{residual}-{layout}")
    for norm, activation, residual, layout in itertools.product(
        NORMS, ACTIVATIONS, (False, True), ("planar", "channels_last")
    )
    if layout == "planar" or len(norm.shape) == 4
]


@pytest.mark.emulated
@pytest.mark.parametrize(("norm", "activation", "residual", "layout"), COMBINATIONS)
def test_gradients(norm: Norm, activation: str | None, residual: bool, layout: str, device: torch.device) -> None:
    args = make_args(norm, residual, layout, device)
    batched = residual and layout == "planar" and activation in (None, "silu")
    assert gradcheck(function(norm, activation), args, check_batched_grad=batched)


@pytest.mark.fallback("forward-mode")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
def test_forward_mode(norm: Norm, activation: str | None, device: torch.device) -> None:
    args = make_args(norm, True, "planar", device)
    assert gradcheck(function(norm, activation), args, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=4))[1:])
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
def test_any_subset_of_gradients(norm: Norm, needs: tuple[bool, ...], device: torch.device) -> None:
    """Whichever inputs want a gradient, it is the one they get when all do."""
    for activation, layout in itertools.product(("relu", "silu", None), ("planar", "channels_last")):
        args = make_args(norm, True, layout if len(norm.shape) == 4 else "planar", device)
        call = function(norm, activation)
        grad = torch.randn(norm.shape, dtype=torch.float64, device=device)
        expected = torch.autograd.grad(call(*args), args, grad)
        some = [a.detach().requires_grad_(n) for a, n in zip(args, needs, strict=True)]
        wanted = [a for a in some if a.requires_grad]
        results = iter(torch.autograd.grad(call(*some), wanted, grad))
        for need, value in zip(needs, expected, strict=True):
            if need:
                torch.testing.assert_close(next(results), value, rtol=0, atol=0)


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu", "tanh"])
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
def test_second_derivatives(norm: Norm, activation: str | None, device: torch.device) -> None:
    for residual, layout in ((False, "planar"), (True, "channels_last")):
        if layout == "channels_last" and len(norm.shape) != 4:
            layout = "planar"
        args = make_args(norm, residual, layout, device)
        assert gradgradcheck(function(norm, activation), args, gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
def test_third_derivative(norm: Norm, device: torch.device) -> None:
    """Double backward is made of torch's operators, so it can be differentiated again."""
    args = make_args(norm, True, "planar", device)

    def second(x: Tensor, *rest: Tensor) -> Tensor:
        y = function(norm, "tanh")(x, *rest)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (gg,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        return gg

    assert gradcheck(second, args)


@pytest.mark.fallback(r"forward-mode")
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
def test_forward_over_reverse(norm: Norm, device: torch.device) -> None:
    args = make_args(norm, False, "planar", device)
    assert gradgradcheck(
        function(norm, "silu"), args, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False
    )


# torch.func: the transforms of our function against those of torch's.


def native(norm: Norm) -> Callable[..., Tensor]:
    """The same function from torch's operators: silu(norm(x) + residual)."""
    f = torch.nn.functional

    def call(x: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> Tensor:
        if norm.name == "batch":
            y = f.batch_norm(x, None, None, w, b, training=True)
        elif norm.name == "frozen":
            mean = torch.linspace(-0.5, 0.5, x.shape[1], dtype=x.dtype, device=x.device)
            y = f.batch_norm(x, mean, mean + 1.5, w, b)
        elif norm.name == "group":
            y = f.group_norm(x, 2, w, b)
        elif norm.name == "instance":
            y = f.instance_norm(x, weight=w, bias=b)
        else:
            y = f.layer_norm(x, w.shape, w, b)
        return f.silu(y + residual)

    return call


BATCHED = list(itertools.product((0, None), repeat=4))[:-1]


@pytest.mark.fallback(r"torch\.func transform")
@pytest.mark.parametrize("in_dims", BATCHED, ids=lambda dims: "".join("n0"[d == 0] for d in dims))
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
def test_vmap(norm: Norm, in_dims: tuple[int | None, ...], device: torch.device) -> None:
    args = [
        torch.stack([a.detach(), a.detach().flip(0) + 0.1, a.detach() * 2]) if d == 0 else a.detach()
        for a, d in zip(make_args(norm, True, "planar", device), in_dims, strict=True)
    ]
    ours = torch.func.vmap(function(norm, "silu"), in_dims)(*args)
    expected = torch.stack(
        [native(norm)(*(a[i] if d == 0 else a for a, d in zip(args, in_dims, strict=True))) for i in range(3)]
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.fallback(r"torch\.func transform")
@pytest.mark.parametrize("dim", [1, 2, -1])
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
def test_vmap_over_another_dim(norm: Norm, dim: int, device: torch.device) -> None:
    x, w, b, residual = (a.detach() for a in make_args(norm, True, "planar", device))
    stacked = torch.stack([x, x * 2 + 1, -x], dim)
    in_dims = (dim, None, None, None)
    ours = torch.func.vmap(function(norm, "silu"), in_dims, out_dims=1)(stacked, w, b, residual)
    expected = [native(norm)(part, w, b, residual) for part in stacked.unbind(dim)]
    torch.testing.assert_close(ours, torch.stack(expected, 1))


@pytest.mark.fallback(r"torch\.func transform")
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
def test_vmap_of_vmap(norm: Norm, device: torch.device) -> None:
    x, w, b, residual = (a.detach() for a in make_args(norm, True, "planar", device))
    grid = torch.stack([torch.stack([x, 2 * x]), torch.stack([x + 1, x.flip(0)])])
    inner = torch.func.vmap(function(norm, "silu"), (0, None, None, None))
    ours = torch.func.vmap(inner, (0, None, None, None))(grid, w, b, residual)
    expected = torch.stack([torch.stack([native(norm)(x, w, b, residual) for x in row]) for row in grid])
    torch.testing.assert_close(ours, expected)


@pytest.mark.fallback(r"torch\.func transform")
@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian", "per_sample", "jvp", "vjp"])
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
def test_transforms(norm: Norm, transform: str, device: torch.device) -> None:
    func = torch.func
    args = tuple(a.detach() for a in make_args(norm, True, "planar", device))
    tangents = tuple(torch.randn_like(a) for a in args)

    def apply(f: Callable[..., Tensor]) -> object:
        def loss(*args: Tensor) -> Tensor:
            return f(*args).square().sum()

        if transform == "jacrev":
            return func.jacrev(f, (0, 1, 2, 3))(*args)
        if transform == "jacfwd":
            return func.jacfwd(f, (0, 1, 2, 3))(*args)
        if transform == "hessian":
            return func.hessian(loss, (0, 1))(*args)
        if transform == "per_sample":
            xs = torch.stack([args[0], args[0] * 2])
            return func.vmap(func.grad(loss, (0, 1)), (0, None, None, None))(xs, *args[1:])
        if transform == "jvp":
            return func.jvp(f, args, tangents)
        return func.vjp(f, *args)[1](tangents[0])

    torch.testing.assert_close(apply(function(norm, "silu")), apply(native(norm)))
