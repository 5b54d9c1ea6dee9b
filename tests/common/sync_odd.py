"""Uses of SyncBatchNorm that are out of the ordinary, on a rank, each with what one big batch gives. Imports no pytest:
ranks import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastnorm
from tests.common.numerics import assert_alike

RANKS = 2
Forward = Callable[[nn.Module, Tensor], Tensor]


def whole(seed: int = 0) -> Tensor:
    """The batch of both ranks."""
    return torch.randn(6, 4, 5, 7, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def mine(t: Tensor) -> Tensor:
    return t.chunk(RANKS)[dist.get_rank()]


def compare(
    use: Forward, ours: nn.Module, theirs: nn.Module, prepare: Callable[[Tensor], Tensor] = lambda t: t
) -> None:
    """use(module, x) of this rank's share and of the whole, their gradients and running statistics."""
    results: list[dict[str, Tensor]] = []
    for module, share in ((ours, mine), (theirs, lambda t: t)):
        x = prepare(share(whole())).detach().requires_grad_()
        y = use(module, x)
        y.backward(share(whole(1))[:, :, : y.shape[2]])
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        if module is ours:
            for gradient in gradients.values():
                dist.all_reduce(gradient)
        assert x.grad is not None
        outputs = {"y": y.detach(), "dx": x.grad}
        if module is theirs:
            outputs = {name: mine(t) for name, t in outputs.items()}
        results.append(outputs | gradients | {name: b.clone() for name, b in module.named_buffers()})
    assert_alike(*results)


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    return fastnorm.SyncBatchNorm(4, **options), nn.BatchNorm2d(4, **options)


def plain(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x)
    return y


def twice_in_one_pass() -> None:
    compare(lambda m, x: m(m(x) * 2), *pair())


def output_changed_in_place() -> None:
    compare(lambda m, x: m(x).add_(x).relu_(), *pair())


def strided_input() -> None:
    compare(lambda m, x: m(x.transpose(2, 3)[:, :, ::2]).repeat(1, 1, 2, 2)[:, :, :5, :7], *pair())


def expanded_gradient() -> None:
    compare(lambda m, x: m(x).sum((2, 3), keepdim=True).expand(-1, -1, 5, 7), *pair())


def frozen_weight() -> None:
    modules = pair()
    for module in modules:
        module.weight.requires_grad_(False)
    compare(plain, *modules)


def tracking_switched_off() -> None:
    modules = pair()
    for module in modules:
        module.track_running_stats = False
    compare(plain, *modules)


def no_statistics_and_no_momentum() -> None:
    compare(plain, *pair(momentum=None, track_running_stats=False))


def tensors_saved_elsewhere() -> None:
    def use(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return plain(module, x)

    compare(use, *pair())


def backward_twice() -> None:
    def use(module: nn.Module, x: Tensor) -> Tensor:
        y = plain(module, x)
        y.sum().backward(retain_graph=True)
        return y

    compare(use, *pair())


def layouts_that_differ() -> None:
    """One rank planar, the other channels_last."""
    last = dist.get_rank() == 1
    compare(plain, *pair(), lambda t: t.to(memory_format=torch.channels_last) if last and len(t) == 3 else t)


def without_gradients() -> None:
    """Training mode under no_grad and inference_mode moves the running statistics."""
    ours, theirs = pair()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_alike(ours(mine(whole())), mine(theirs(whole())))
    assert_alike(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def only_parameters_want_gradients() -> None:
    """Nothing is exchanged in backward: dx is not wanted."""
    ours, theirs = pair()
    ours(mine(whole())).square().sum().backward()
    theirs(whole()).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        dist.all_reduce(a.grad)
        assert_alike(a.grad, b.grad)


def autocast() -> None:
    ours, theirs = pair()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(mine(whole()).bfloat16()), mine(theirs(whole().bfloat16()))
    assert y.dtype == torch.bfloat16
    assert_alike(y, expected)


def shapes_that_differ() -> None:
    """Other numbers of samples and of positions on each rank: statistics of all elements."""
    rank = dist.get_rank()
    parts = [torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), torch.randn(2, 4, 3, 7) * 3]
    parts[1] = torch.linspace(-2, 5, 2 * 4 * 21).view(2, 4, 3, 7)
    ours = fastnorm.SyncBatchNorm(4, momentum=1.0)
    ours(parts[rank])
    elements = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1)
    assert_alike(ours.running_mean, elements.mean(1))
    assert_alike(ours.running_var, elements.var(1))


def transforms() -> None:
    """torch.func and forward mode have no kernels here, and torch.nn none for the CPU: an error, on every rank."""
    ours, _ = pair()
    for call in (
        lambda: torch.func.vmap(ours)(whole()[:, None]),
        lambda: torch.func.jvp(ours, (whole(),), (whole(1),)),
    ):
        try:
            call()
        except RuntimeError as error:
            assert "serves no CPU tensors" in str(error) and "is active" in str(error.__context__)
            continue
        raise AssertionError("not refused")


USES = (
    twice_in_one_pass,
    output_changed_in_place,
    strided_input,
    expanded_gradient,
    frozen_weight,
    tracking_switched_off,
    tensors_saved_elsewhere,
    backward_twice,
    layouts_that_differ,
    without_gradients,
    only_parameters_want_gradients,
    autocast,
    shapes_that_differ,
    transforms,
)
