"""The front door: every norm comes through here, to be served by the kernels or left to torch.

    entry_for(x)          how the kernels are called on x; Unsupported where torch has to see its own operators
    fused_*(entry, ...)   one norm each, by the kernels; Unsupported for what they do not serve
    fall_back(...)        lets torch answer a call that was refused

A refusal is an `Unsupported` of ours or a NotImplementedError of the operators, raised before anything is written.
Every other exception reaches the user unchanged.

Host time counts: a layer on a small tensor costs its Python. So an eager call is one operator, `norm`, whose C++ checks
the arguments and records the gradient (csrc/torch/autograd.cpp). torch.compile sees the functional operators.

    FASTNORM_LOG=fallback   prints a line for every distinct reason for which a call is left to torch
    FASTNORM_STRICT=1       such a call raises Unsupported, unless torch raises too
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import autograd as autograd  # registers the derivatives
from . import ops, settings
from .extension import _C
from .ops import OptTensor

__all__ = ["Config", "Unsupported", "entry_for", "fall_back"]

strict: bool = os.environ.get("FASTNORM_STRICT") == "1"
log_fallbacks: bool = "fallback" in os.environ.get("FASTNORM_LOG", "").split(",")

_logger = logging.getLogger("fastnorm")
_logged: set[str] = set()


class Unsupported(NotImplementedError):
    """The kernels do not serve this call; the text says why. Users see it in strict mode alone."""


class Decomposed(Unsupported):
    """torch.compile is to see torch's operators: a choice, and no failure of the kernels."""


class Config(NamedTuple):
    """What a call is besides its tensors: the operator `norm` takes these after them. The functional operators take the
    first five, `ops.Settings`."""

    groups: int
    """Of group norm, else 0."""
    normalized_dims: int
    """Trailing dims that layer norm normalizes, or ops.NORMALIZED_CHANNELS; else 0. Both 0: batch norm."""
    eps: float
    activation: int
    activation_param: float
    use_input_stats: bool = True
    """The statistics are x's, and the running ones move; else the statistics are the running ones."""
    momentum: float | None = None
    """None: running statistics become the average over all batches."""


#: (x, weight, bias, residual, running_mean, running_var, num_batches_tracked, *config) ->
#: act((x - mean) * rstd * weight + bias + residual), differentiable
Entry: TypeAlias = Callable[..., Tensor]

_jit_tracing = torch._C._is_tracing
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_mode = torch._C._get_dispatch_mode
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_PLAIN = frozenset((Tensor, torch.nn.Parameter, FakeTensor))
#: An eager call: one operator, which checks its arguments.
run_norm = cast(Entry, _C.make_eager_norm(ops.norm._op))


# ---- calling the kernels ----


def trace_norm(
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    running_mean: OptTensor,
    running_var: OptTensor,
    num_batches_tracked: OptTensor,
    *call: Any,
) -> Tensor:
    """A call under torch.compile: functional operators, and all checks beforehand, as none could be caught."""
    groups, normalized_dims, eps, activation, param, use_input_stats, momentum = call
    pointwise_on_gpu = not use_input_stats and x.device.type == "cuda"
    if settings.compile_mode == "decompose" or (settings.compile_mode == "auto" and pointwise_on_gpu):
        raise Decomposed("set_compile_mode has chosen torch's operators")
    numbers = (groups, normalized_dims, eps, activation, param)
    check_call(x, weight, bias, residual, running_mean, running_var, numbers)
    if not use_input_stats and running_mean is None:
        raise Unsupported("there are no running statistics to use")
    if groups == normalized_dims == 0 and (eps < 0 or (use_input_stats and (eps == 0 or x.numel() <= x.shape[1]))):
        raise Unsupported("eps is not positive, or a channel has a single value")
    mean, var = (None, None) if use_input_stats else (running_mean, running_var)
    save_mask = torch.is_grad_enabled()
    y, stats, _ = ops.norm_forward(x, weight, bias, residual, mean, var, *numbers, save_mask)
    if use_input_stats and (running_mean is not None or num_batches_tracked is not None):
        count = x.numel() // stats.shape[1]
        ops.update_running_stats_(running_mean, running_var, num_batches_tracked, stats, count, momentum)
    return y  # type: ignore[no-any-return]


def check_call(
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    running_mean: OptTensor,
    running_var: OptTensor,
    settings: ops.Settings,
) -> None:
    """Raise Unsupported where the functional operators would refuse a call, from sizes and dtypes alone."""
    refusal = ops.why_unsupported(x, weight, bias, residual, running_mean, running_var, settings)
    if refusal is not None:
        raise Unsupported(refusal)
    if any(t is not None and t.requires_grad for t in (running_mean, running_var)):
        raise Unsupported("running statistics require grad")


def check_tensor(name: str, t: object) -> None:
    """TypeError unless the argument of this name is a Tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor, but got {type(t).__name__}")


def entry_for(x: Tensor) -> Entry:
    """How the kernels are called on x. Unsupported unless x is an ordinary tensor, outside of everything that has to
    see torch's own operators."""
    if is_compiling():
        if torch.compiler._is_exporting_flag:  # is_exporting() is always True in a trace of torch 2.10
            raise Unsupported("an exported program should need nothing but torch")
        if _functorch_active() or forward_ad._current_level >= 0:
            raise Unsupported("a torch.func transform or forward-mode differentiation is active")
        return trace_norm
    if type(x) not in _PLAIN:
        raise Unsupported(f"x is a {type(x).__name__}, not a plain Tensor")
    if _functorch_active():
        raise Unsupported("a torch.func transform is active")
    if forward_ad._current_level >= 0:
        raise Unsupported("forward-mode differentiation is active")
    if _jit_tracing():
        raise Unsupported("torch.jit.trace records torch's operators")
    if type(x) is FakeTensor:  # `norm` asks where tensors are real
        _refuse_make_fx()
    return run_norm


def check_recorded(x: Tensor) -> None:
    """What entry_for(x) refuses, for a call of another operator than `norm`."""
    if entry_for(x) is run_norm:
        _refuse_make_fx()


def _refuse_make_fx() -> None:
    if _dispatch_mode(_PROXY) is not None:
        raise Unsupported("make_fx records torch's operators")


# ---- autocast ----

#: Types of devices on which autocast runs torch's group norm and layer norm in float32.
WIDENING: frozenset[str] = frozenset(
    device
    for device in ops.DEVICES
    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::layer_norm", f"Autocast{device.upper()}")
)


def widened(*tensors: OptTensor) -> tuple[Any, ...]:
    """The arguments of a group or layer norm, the first of them x, as autocast gives them to torch's."""
    x = tensors[0]
    if (
        x is None
        or x.device.type not in WIDENING
        or settings.autocast_mode == "keep"
        or not torch.is_autocast_enabled(x.device.type)
    ):
        return tensors
    halves = (torch.bfloat16, torch.float16)
    return tuple(t.float() if t is not None and t.dtype in halves else t for t in tensors)


# ---- each norm ----
#
# The fields of a Config, one by one: to make one and unpack it takes half a microsecond, a twentieth of a small call.


def fused_batch_norm(
    entry: Entry,
    x: Tensor,
    running_mean: OptTensor,
    running_var: OptTensor,
    weight: OptTensor,
    bias: OptTensor,
    training: bool,
    momentum: float,
    eps: float,
    residual: OptTensor,
    activation: int,
    param: float,
) -> Tensor:
    """Batch norm by the kernels."""
    if momentum is None:
        raise Unsupported("momentum is None")
    return entry(
        x, weight, bias, residual, running_mean, running_var, None,
        0, 0, eps, activation, param, training, momentum,
    )  # fmt: skip


def fused_instance_norm(
    entry: Entry,
    x: Tensor,
    running_mean: OptTensor,
    running_var: OptTensor,
    weight: OptTensor,
    bias: OptTensor,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    residual: OptTensor,
    activation: int,
    param: float,
) -> Tensor:
    """Instance norm by the kernels: group norm of one channel a group; by running statistics, batch norm."""
    if momentum is None:
        raise Unsupported("momentum is None")
    if x.dim() < 2:
        raise Unsupported(f"x has {x.dim()} dimensions, expected at least 2")
    groups = 0
    if use_input_stats:
        if eps == 0:  # torch takes 1 / sqrt(0) for 0 where a channel is constant
            raise Unsupported("eps is 0")
        groups = int(x.size(1))  # int: torch.compile takes the number of channels for a constant
        if x.numel() <= x.size(0) * groups:
            raise Unsupported("x has less than two spatial elements")
    return entry(
        x, weight, bias, residual, running_mean, running_var, None,
        groups, 0, eps, activation, param, use_input_stats, momentum,
    )  # fmt: skip


def fused_group_norm(
    entry: Entry,
    x: Tensor,
    groups: int,
    weight: OptTensor,
    bias: OptTensor,
    eps: float,
    residual: OptTensor,
    activation: int,
    param: float,
) -> Tensor:
    """Group norm by the kernels."""
    if WIDENING:
        x, weight, bias, residual = widened(x, weight, bias, residual)
    if groups < 1 or x.numel() <= groups:  # torch counts the values of the whole batch
        raise Unsupported(f"groups is {groups}, expected at least 1, and less than x has values")
    return entry(x, weight, bias, residual, None, None, None, groups, 0, eps, activation, param, True, None)


def fused_layer_norm(
    entry: Entry,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: OptTensor,
    bias: OptTensor,
    eps: float,
    residual: OptTensor,
    activation: int,
    param: float,
) -> Tensor:
    """Layer norm by the kernels."""
    if WIDENING:
        x, weight, bias, residual = widened(x, weight, bias, residual)
    if not isinstance(normalized_shape, (tuple, list)):
        raise Unsupported(f"normalized_shape is a {type(normalized_shape).__name__}")
    dims = len(normalized_shape)
    if dims == 0 or x.shape[-dims:] != tuple(normalized_shape) or x.numel() == 0:
        raise Unsupported(f"x is empty or does not end in {tuple(normalized_shape)}")
    return entry(x, weight, bias, residual, None, None, None, 0, dims, eps, activation, param, True, None)


def fused_layer_norm2d(
    entry: Entry,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: OptTensor,
    bias: OptTensor,
    eps: float,
    residual: OptTensor,
    activation: int,
    param: float,
) -> Tensor:
    """Layer norm over the channels of a map by the kernels."""
    if WIDENING:
        x, weight, bias, residual = widened(x, weight, bias, residual)
    if x.dim() != 4 or tuple(normalized_shape) != (x.shape[1],) or x.numel() == 0:
        raise Unsupported(f"x is empty or not (N, C, H, W) with (C,) = {tuple(normalized_shape)}")
    return entry(
        x, weight, bias, residual, None, None, None,
        0, ops.NORMALIZED_CHANNELS, eps, activation, param, True, None,
    )  # fmt: skip


# ---- leaving a call to torch ----


def is_refusal(error: Exception) -> bool:
    """Whether the kernels refused, before anything was written: everything else is a failure, or the user's own."""
    if isinstance(error, Unsupported):
        return True
    # The dispatcher's own: it has no kernel for the device; an argument is of another type than the schema says.
    text = str(error)
    if isinstance(error, NotImplementedError):
        return text.startswith(("fastnorm: ", "Could not run 'fastnorm::"))
    # And a nested tensor's, which has no shape to ask for.
    return (text.startswith("fastnorm::") and "Expected a value of type" in text) or "NestedTensorImpl" in text


def reason_of(refusal: Exception | str) -> str:
    """The reason that a refusal, or its text, gives, on one line."""
    return str(refusal).removeprefix("fastnorm: ").partition("\n")[0]


def fall_back(name: str, error: Exception, unfused: Callable[[], Any]) -> Any:
    """What `unfused` makes of a call of `name` that the kernels refused with `error`; raises what is no refusal."""
    if is_compiling():
        if (strict and not isinstance(error, Decomposed)) or not isinstance(error, NotImplementedError):
            raise error
        return unfused()
    if not is_refusal(error):
        raise error
    reason = reason_of(error)
    note_fallback(f"{name} left to torch: {reason}")
    result = unfused()  # what torch rejects, it rejects in its own words
    if strict:
        raise Unsupported(f"{name} was left to torch: {reason}") from error
    return result


def note_fallback(text: str) -> None:
    """Tell the debug log; print the line, once, where FASTNORM_LOG asks for it."""
    if _logger.isEnabledFor(logging.DEBUG):
        _logger.debug("%s", text)
    if log_fallbacks and text not in _logged:
        _logged.add(text)
        print(f"fastnorm: {text}", file=sys.stderr)


# ---- tensors that carry metadata ----


def carries_metadata(x: object) -> bool:
    """Whether x is a Tensor subclass that is a tensor like any other to the dispatcher: what makes it special, its
    `__torch_function__` adds (MONAI's MetaTensor)."""
    return (
        isinstance(x, Tensor)
        and type(x) not in _PLAIN
        and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not is_compiling()
    )


def _call_on_plain(x: Tensor, residual: OptTensor, call: Callable[[Tensor, OptTensor], Tensor]) -> Tensor:
    plain = residual if residual is None else residual.as_subclass(Tensor)
    return call(x.as_subclass(Tensor), plain)


# ---- a whole call ----


def serve(
    name: str,
    fused: Callable[[Entry, Tensor, OptTensor], Tensor],
    unfused: Callable[[Tensor, OptTensor], Tensor],
    x: Tensor,
    residual: OptTensor,
) -> Tensor:
    """fused(entry, x, residual) by the kernels; where they refuse, unfused(x, residual) by torch."""
    try:
        return fused(entry_for(x), x, residual)
    except RuntimeError as error:
        return fall_back_or_wrap(name, error, partial(serve, name, fused, unfused), unfused, x, residual)[0]


def fall_back_or_wrap(
    name: str,
    error: RuntimeError,
    call: Callable[[Tensor, OptTensor], Tensor],
    unfused: Callable[[Tensor, OptTensor], Tensor],
    x: Tensor,
    residual: OptTensor,
) -> tuple[Tensor, bool]:
    """What a refused call gives, and whether the kernels gave it after all: `call` is made again on the plain tensor of
    an x that only carries metadata, and x's class wraps the result as it wraps those of torch's functions."""
    if carries_metadata(x):
        cls = type(x)
        y = cls.__torch_function__(_call_on_plain, (cls,), (x, residual, call), {})
        if y is not NotImplemented:
            return y, True
    return fall_back(name, error, lambda: unfused(x, residual)), False
