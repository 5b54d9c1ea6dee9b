"""Calls of aten's own norms, forward and backward, with all that their arguments may be: what fastnorm.enable answers,
and which of them it has answered."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm

aten = torch.ops.aten


def row_of(norm: str, device: str = "cpu") -> fastnorm.Row:
    return next(row for row in fastnorm.report() if (row.name, row.layer) == (norm, device))


class Counted(TorchDispatchMode):
    """served, left: how many calls of each of aten's operators ended in a kernel of ours, and in torch's although the
    norm is enabled. (The report has the calls of a norm, not which operator each was of.)"""

    def __init__(self) -> None:
        super().__init__()
        self.served: collections.Counter[str] = collections.Counter()
        self.left: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = list(fastnorm.report())
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        for then, now in zip(before, fastnorm.report(), strict=True):
            self.served[name] += now.served_calls - then.served_calls
            self.left[name] += now.left_calls - then.left_calls
        return result


#: Layouts of x, made of a tensor of the shape.
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "planar": ((3, 6, 5, 7), lambda x: x),
    "channels_last": ((3, 6, 5, 7), lambda x: x.to(memory_format=torch.channels_last)),
    "3d": ((2, 6, 3, 4, 5), lambda x: x.to(memory_format=torch.channels_last_3d)),
    "1d": ((3, 6, 11), lambda x: x),
    "(N, C)": ((9, 24), lambda x: x),
    "strided": ((3, 12, 5, 14), lambda x: x[:, ::2, :, ::2]),
    "permuted": ((5, 7, 3, 6), lambda x: x.permute(2, 3, 0, 1)),
    "no samples": ((0, 6, 5, 7), lambda x: x),
    "no positions": ((3, 6, 0, 7), lambda x: x),
    "one value": ((1, 6, 1, 1), lambda x: x),
}


def make_x(layout: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    shape, lay = LAYOUTS[layout]
    return lay(torch.randn(shape).to(device, dtype))


def like(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Random values, drawn on the CPU: the same whatever x's device and dtype."""
    return torch.randn(shape).to(x.device, dtype or x.dtype)


def described(t: Any) -> Any:
    return (t.dtype, tuple(t.shape), t.stride()) if isinstance(t, Tensor) else t


def outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


def batch_calls(x: Tensor, p: torch.dtype) -> dict[str, Callable[[], Any]]:
    channels = x.shape[1]
    torch.manual_seed(1)
    w, b, mean = (like(x, channels, dtype=p) for _ in range(3))
    var, dy = like(x, channels, dtype=p).abs() + 0.5, like(x, *x.shape)

    def forward(training: bool, affine: bool, tracked: bool) -> Any:
        m, v = (mean.clone(), var.clone()) if tracked else (None, None)
        return *aten.native_batch_norm(x, *((w, b) if affine else (None, None)), m, v, training, 0.1, 1e-5), m, v

    def backward(training: bool, mask: list[bool], weight: Tensor | None = w) -> Any:
        _, m, r, *_ = forward(training, True, True)
        return aten.native_batch_norm_backward(dy, x, weight, mean, var, m, r, training, 1e-5, mask)

    calls: dict[str, Callable[[], Any]] = {}
    for training, affine, tracked in itertools.product((True, False), repeat=3):
        if not training and not tracked:
            continue  # torch's kernel reads a null pointer
        calls[f"forward {training=} {affine=} {tracked=}"] = lambda a=(training, affine, tracked): forward(*a)
    for training, mask in itertools.product((True, False), itertools.product((True, False), repeat=3)):
        if x.numel() == 0:
            continue  # torch's kernel divides by 0
        calls[f"backward {training=} {mask=}"] = lambda a=(training, list(mask)): backward(*a)
    if x.numel() > 0:
        calls["backward, no weight"] = lambda: backward(True, [True, False, False], None)
    calls["legit"] = lambda: aten._native_batch_norm_legit(x, w, b, mean.clone(), var.clone(), True, 0.1, 1e-5)
    calls["legit, no stats"] = lambda: aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-5)
    calls["no training"] = lambda: aten._native_batch_norm_legit_no_training(x, w, b, mean, var, 0.1, 1e-5)
    calls["functional"] = lambda: aten._native_batch_norm_legit_functional(x, w, b, mean, var, True, 0.1, 1e-5)
    return calls


def group_calls(x: Tensor, p: torch.dtype) -> dict[str, Callable[[], Any]]:
    n, c, *spatial = x.shape
    torch.manual_seed(1)
    w, b = like(x, c, dtype=p), like(x, c, dtype=p)
    dy = torch.randn_like(x)  # torch's kernel takes dy to lie in memory as x does
    sizes = (n, c, torch.Size(spatial).numel())

    def forward(groups: int, *affine: Tensor | None) -> Any:
        return aten.native_group_norm(x, *affine, *sizes, groups, 1e-5)

    def backward(groups: int, mask: list[bool], weight: Tensor | None = w) -> Any:
        _, m, r = forward(groups, w, b)
        return aten.native_group_norm_backward(dy, x, m, r, weight, *sizes, groups, mask)

    calls: dict[str, Callable[[], Any]] = {}
    for groups in (1, 3, 6):
        calls[f"forward {groups=}"] = lambda g=groups: forward(g, w, b)
        for mask in itertools.product((True, False), repeat=3):
            if not mask[0] and not x.is_contiguous():
                continue  # torch's kernel writes dx through a null pointer
            calls[f"backward {groups=} {mask=}"] = lambda a=(groups, list(mask)): backward(*a)
    calls["forward, no parameters"] = lambda: forward(2, None, None)
    calls["backward, no weight"] = lambda: backward(2, [True, False, False], None)
    calls["5 groups"] = lambda: forward(5, w, b)
    return calls


def layer_calls(x: Tensor, p: torch.dtype) -> dict[str, Callable[[], Any]]:
    calls: dict[str, Callable[[], Any]] = {}
    for dims in range(1, x.dim()):
        shape = list(x.shape[-dims:])
        torch.manual_seed(1)
        w, b, dy = like(x, *shape, dtype=p), like(x, *shape, dtype=p), like(x, *x.shape)

        def forward(shape: list[int] = shape, w: Tensor = w, b: Tensor = b) -> Any:
            return aten.native_layer_norm(x, shape, w, b, 1e-5)

        def backward(mask: list[bool], shape: list[int] = shape, w: Tensor = w, b: Tensor = b, dy: Tensor = dy) -> Any:
            _, m, r = aten.native_layer_norm(x, shape, w, b, 1e-5)
            return aten.native_layer_norm_backward(dy, x, shape, m, r, w, b, mask)

        calls[f"forward {dims=}"] = forward
        calls[f"forward {dims=}, no bias"] = lambda f=forward: f(b=None)
        for mask in itertools.product((True, False), repeat=3):
            calls[f"backward {dims=} {mask=}"] = lambda f=backward, m=list(mask): f(m)
    calls["wrong shape"] = lambda: aten.native_layer_norm(x, [4], None, None, 1e-5)
    return calls


CALLS = {"batch_norm": batch_calls, "group_norm": group_calls, "layer_norm": layer_calls}
