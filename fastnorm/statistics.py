"""moments and normalize: the two halves of a norm over any dims, as in tf.nn.moments and tf.nn.batch_normalization."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from functools import partial

import torch.fx
from torch import Tensor
from torch.compiler import is_compiling

from . import ops, reference
from .dispatch import Config, check_call, check_recorded, check_tensor, fall_back, serve

__all__ = ["moments", "normalize"]


def moments(
    x: Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False, correction: float = 0
) -> tuple[Tensor, Tensor]:
    """Mean and variance over `dim`, read in one pass; differentiable any number of times.

    x: any shape, any real dtype.
    dim: the dimensions to reduce; None: all but the second, so that every channel of (N, C, *) has its own; (): every
        element is a set of its own.
    keepdim: whether the reduced dimensions stay, with size 1, so that the results broadcast against x.
    correction: the variance is the sum of squares over n - correction; 0 is the biased variance, 1 Bessel's. Where n
        is no larger it is infinite or NaN, as torch.var_mean's.
    Returns (mean, var), float32 (float64 for float64 x), NaN where x is empty.

    The kernels serve every `dim` whose kept dimensions adjoin, such as the channels, leading dims (what LayerNorm and
    InstanceNorm share statistics over) or none; torch.var_mean computes the others.
    ValueError for less than two dimensions where dim is None, and for a dimension named twice; IndexError for one that
    x does not have; TypeError for dims that are not integers, for a correction that is no number, and for complex x.
    Source: tf.nn.moments; torch.var_mean, which rounds half precision.
    """
    return _moments(x, dim, keepdim, correction)


def _moments(x: Tensor, dim: int | Sequence[int] | None, keepdim: bool, correction: float) -> tuple[Tensor, Tensor]:
    if not isinstance(correction, numbers.Real):
        raise TypeError(f"correction must be a number, but got {type(correction).__name__}")
    if not abs(correction) < math.inf:  # and no math.isfinite: torch.compile may make it a symbol
        raise ValueError(f"correction is {correction}, expected a finite number")
    if x.is_complex():
        raise TypeError(f"x has dtype {x.dtype}, expected a real one")
    if dim is None and x.dim() < 2:
        raise ValueError(f"expected at least 2D input (got {x.dim()}D input)")
    reduced = _reduced_dims(x, dim)
    count = math.prod([x.shape[d] for d in reduced])  # torch.compile does not trace a generator here
    view = _as_channels(x, reduced) if count > correction else None
    if view is None:
        mean, var = reference.moments(x, reduced, correction)
    else:
        try:
            mean, var = _by_kernel(view)
        except RuntimeError as error:
            mean, var = fall_back("moments", error, partial(reference.moments, view))
        shape = [size for d, size in enumerate(x.shape) if d not in reduced]
        mean, var = mean.reshape(shape), var.reshape(shape)
        if correction != 0:
            var = var * (count / (count - correction))
    if keepdim:
        shape = [1 if d in reduced else size for d, size in enumerate(x.shape)]
        mean, var = mean.reshape(shape), var.reshape(shape)
    return mean, var


def _reduced_dims(x: Tensor, dim: int | Sequence[int] | None) -> tuple[int, ...]:
    """The dimensions to reduce, from 0, in order."""
    dims = x.dim()
    if dim is None:
        return (0, *range(2, dims))
    try:
        given = [operator.index(dim)] if not isinstance(dim, Sequence) else [operator.index(d) for d in dim]
    except TypeError:
        raise TypeError(f"dim is {dim!r}, expected an integer, integers or None") from None
    named = max(dims, 1)  # torch takes dimension 0 of a number for the number
    for d in given:
        if not -named <= d < named:
            raise IndexError(f"dim has {d}, expected {-named} to {named - 1}: x has {dims} dimensions")
    found = sorted(d % named for d in given)
    if len(set(found)) < len(found):
        raise ValueError(f"dim is {dim!r}, which names a dimension of x twice")
    return tuple(found) if dims else ()


def _as_channels(x: Tensor, reduced: tuple[int, ...]) -> Tensor | None:
    """x as (N, C, S) whose channels are the sets, or x itself where they are its channels (in its own layout, planar or
    channels_last). None where the kept dimensions do not adjoin, or there is nothing to sum."""
    kept = [d for d in range(x.dim()) if d not in reduced]
    if not reduced or x.numel() == 0 or (kept and kept[-1] - kept[0] != len(kept) - 1):
        return None
    if kept == [1]:
        return x
    first, last = (kept[0], kept[-1] + 1) if kept else (0, 0)
    return x.reshape(*(math.prod(x.shape[a:b]) for a, b in ((0, first), (first, last), (last, x.dim()))))


def _by_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """Biased moments of every channel by the operator; Unsupported where it does not serve x."""
    check_recorded(x)
    if is_compiling():
        check_call(x, None, None, None, None, None, (0, 0, 0.0, 0, 0.0))
    return ops.moments(x)  # type: ignore[no-any-return]


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, in one pass; differentiable in every tensor, any number of times.

    x: any shape, float64, float32, bfloat16 or float16.
    mean, var, weight, bias: (C,), for dimension 1 of x (N, C, *), as `moments(x)` gives them and BatchNorm holds them;
        or any shape that broadcasts against x's, as `moments(x, dim, keepdim=True)` gives them. weight None: 1, bias
        None: 0.
    eps: 0 or more.
    Returns x's shape and dtype; computed in float32 (float64 for float64 x) and rounded once.

    The kernels serve values per channel, in either of the two shapes; torch's operators compute the others.
    TypeError for x of another dtype, complex values and what is no Tensor; ValueError for shapes that do not go with
    x's, and for a negative eps.
    Source: tf.nn.batch_normalization. (torch.nn.functional.normalize is another function: it divides by a p-norm.)
    """
    return _normalize(x, mean, var, weight, bias, eps)


def _normalize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    affine = {"weight": weight, "bias": bias}
    named = {"mean": mean, "var": var, **{name: t for name, t in affine.items() if t is not None}}
    for name, t in {"x": x, **named}.items():
        check_tensor(name, t)
    if x.dtype not in ops.PARAMETER_DTYPES:
        raise TypeError(f"x has dtype {x.dtype}, expected float64, float32, bfloat16 or float16")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, expected 0 or more")
    for name, t in named.items():
        if t.is_complex():
            raise TypeError(f"{name} has dtype {t.dtype}, expected a real one")
    dtype = ops.accumulation_dtype(x)
    tensors = {name: _shaped(name, t, x).to(dtype) for name, t in named.items()}
    if x.dim() < 2 or not all(_is_per_channel(t, x) for t in tensors.values()):
        return _normalize_broadcast(x, eps, **tensors)
    vectors = {name: t.reshape(-1) for name, t in tensors.items()}
    if mean.requires_grad or var.requires_grad:
        vectors = _moved_to_affine(eps, **vectors)
    config = Config(0, 0, eps, 0, 0.0, use_input_stats=False)
    return serve(
        "normalize",
        lambda entry, x, _: entry(
            x, vectors.get("weight"), vectors.get("bias"), None, vectors["mean"], vectors["var"], None, *config
        ),
        lambda x, _: _normalize_broadcast(x, eps, **{name: _shaped(name, t, x) for name, t in vectors.items()}),
        x,
        None,
    )


# One node each of a graph that torch.fx traces, wherever they are called from.
torch.fx.wrap("_moments")
torch.fx.wrap("_normalize")


def _shaped(name: str, t: Tensor, x: Tensor) -> Tensor:
    """t in a shape that broadcasts against x's: a vector belongs to dimension 1."""
    if t.dim() == 1 and x.dim() >= 2 and t.shape[0] == x.shape[1]:
        return t.reshape(-1, *[1] * (x.dim() - 2))
    padded = (1,) * (x.dim() - t.dim()) + tuple(t.shape)
    vector = t.dim() == 1 and x.dim() >= 2 and t.shape[0] != 1
    if vector or t.dim() > x.dim() or any(a not in (1, b) for a, b in zip(padded, x.shape, strict=True)):
        channels = f"({x.shape[1]},) or " if x.dim() >= 2 else ""
        raise ValueError(
            f"{name} has shape {tuple(t.shape)}, expected {channels}one that broadcasts against x's {tuple(x.shape)}"
            + (": a vector belongs to dimension 1" if vector else "")
        )
    return t


def _is_per_channel(t: Tensor, x: Tensor) -> bool:
    """Of a tensor that broadcasts against x."""
    return t.dim() >= x.dim() - 1 and t.shape[1 - x.dim()] == x.shape[1] and t.numel() == x.shape[1]


def _normalize_broadcast(
    x: Tensor, eps: float, mean: Tensor, var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    y = (x.to(mean.dtype) - mean) * (var + eps).rsqrt()
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def _moved_to_affine(
    eps: float, mean: Tensor, var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> dict[str, Tensor]:
    """The same map of x, by constant statistics and an affine that depends on them: the operator differentiates by
    weight and bias. Neither changes in value, since mean - constant is 0 and rstd / constant is 1: constants, too,
    where the statistics are not finite, or rstd is not."""
    rstd, fixed_mean, fixed_var = (var + eps).rsqrt(), mean.detach(), var.detach()
    regular = (rstd > 0) & rstd.isfinite()
    ratio = rstd.where(regular, 1) / rstd.detach().where(regular, 1)
    slope = rstd.where(rstd.isfinite(), 0) * (1 if weight is None else weight)
    shift = (fixed_mean - mean).where(mean.isfinite(), 0) * slope
    return {
        "mean": fixed_mean,
        "var": fixed_var,
        "weight": ratio if weight is None else weight * ratio,
        "bias": shift if bias is None else bias + shift,
    }
