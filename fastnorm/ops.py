"""The operators of `torch.ops.fastnorm`: their handles, their constants, what they take, and their fake kernels.

| operator                       | what                                                                    |
|--------------------------------|-------------------------------------------------------------------------|
| `norm`                         | an eager call in one: forward, running statistics, autograd             |
| `norm_forward`                 | y = act((x - mean) * rstd * weight + bias + residual), stats, mask       |
| `batch_norm_forward_`          | that of a batch norm in training, which moves its running statistics     |
| `norm_backward`                | dx, dweight, dbias, dresidual                                           |
| `norm_backward_differentiable` | the same where it is differentiated again (autograd.py)                 |
| `update_running_stats_`        | moves running_mean, running_var and num_batches_tracked, in place       |
| `moments`                      | per-channel mean and biased variance                                    |

Batch norm in steps, for statistics of several ranks (sync.py; csrc/torch/ops.h has the arguments):

| operator                        | what                                                                   |
|---------------------------------|------------------------------------------------------------------------|
| `batch_norm_partial`            | mean, variance and count of this rank's x                              |
| `batch_norm_fold_`              | those of all ranks to stats and a count; moves running statistics      |
| `batch_norm_apply`              | x and stats to y and mask                                              |
| `batch_norm_backward_sums`      | this rank's sums of d and d xhat                                       |
| `batch_norm_backward_apply`     | the sums of all ranks to dx and dresidual                              |
| `batch_norm_apply_synchronized` | `batch_norm_apply` with the gradient that goes through all ranks       |

Those of the first table take their tensors, then `groups` and `normalized_dims` (both 0: batch norm;
NORMALIZED_CHANNELS: layer norm of channels), eps, activation, activation_param (`Settings`), then what they alone need.
`stats` is [STATS_ROWS, sets]: mean, rstd, biased variance, what rounding cut off the mean. `mask` is opaque: a bit an
element. The C++ side holds the schemas and checks every argument before it writes anything; what the kernels do not
serve raises NotImplementedError.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .activations import CODES
from .extension import _C

OptTensor: TypeAlias = Tensor | None
#: groups, normalized_dims, eps, activation, activation_param: what forward and backward both take (dispatch.Config)
Settings: TypeAlias = tuple[int, int, float, int, float]

#: Numbers of the activations that save a mask.
TWO_SIDED: tuple[int, ...] = tuple(CODES[name] for name in _C.two_sided_activations())

#: Rows of `stats` (StatsRow in csrc/core/args.h).
STATS_ROWS: int = _C.STATS_ROWS

#: normalized_dims of a layer norm over dim 1 of (N, C, *) (kNormalizedChannels in csrc/torch/ops.h).
NORMALIZED_CHANNELS = -1

#: Input dtype -> the dtypes its weight, bias and statistics may have.
PARAMETER_DTYPES: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float64: (torch.float64,),
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}

#: Types of devices that the kernels of this build serve.
DEVICES: tuple[str, ...] = ("cpu",) if _C.build_info()["cuda"] == "none" else ("cpu", "cuda")

norm = torch.ops.fastnorm.norm.default
norm_forward = torch.ops.fastnorm.norm_forward.default
norm_backward = torch.ops.fastnorm.norm_backward.default
norm_backward_differentiable = torch.ops.fastnorm.norm_backward_differentiable.default
update_running_stats_ = torch.ops.fastnorm.update_running_stats_.default
moments = torch.ops.fastnorm.moments.default
batch_norm_partial = torch.ops.fastnorm.batch_norm_partial.default
batch_norm_fold_ = torch.ops.fastnorm.batch_norm_fold_.default
batch_norm_apply = torch.ops.fastnorm.batch_norm_apply.default
batch_norm_backward_sums = torch.ops.fastnorm.batch_norm_backward_sums.default
batch_norm_backward_apply = torch.ops.fastnorm.batch_norm_backward_apply.default
batch_norm_apply_synchronized = torch.ops.fastnorm.batch_norm_apply_synchronized.default


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics: float64 for float64 x, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def why_unsupported(
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    mean: OptTensor,
    var: OptTensor,
    settings: Settings,
) -> str | None:
    """Why `norm_forward` would refuse these arguments (None: it takes them). From sizes and dtypes alone.

    Eager calls never come here: they let the operator itself decide. Tracing has to know beforehand.
    """
    allowed = PARAMETER_DTYPES.get(x.dtype)
    if allowed is None:
        return f"x has dtype {x.dtype}, expected float64, float32, bfloat16 or float16"
    if x.device.type not in (*DEVICES, "meta"):
        return f"x is on {x.device}, expected {' or '.join(DEVICES)}: what this build has kernels for"
    if x.layout is not torch.strided or x.is_nested:
        return "x is sparse or nested, expected a strided tensor"
    groups, normalized_dims = settings[:2]
    if normalized_dims > 0:
        if normalized_dims > x.dim():
            return f"normalized_shape has {normalized_dims} dimensions, expected 1 to {x.dim()}"
        expected = x.shape[x.dim() - normalized_dims :]
    else:
        if x.dim() < 2:
            return f"x has {x.dim()} dimensions, expected at least 2"
        if groups > 0 and x.shape[1] % groups != 0:
            return f"x has {x.shape[1]} channels, expected a multiple of {groups} groups"
        expected = x.shape[1:2]
    if (mean is None) != (var is None):
        return "got one of mean and var, expected both or neither"
    dtype = None
    for name, parameter in (("weight", weight), ("bias", bias), ("mean", mean), ("var", var)):
        if parameter is None:
            continue
        if parameter.shape != expected:
            return f"{name} has shape {tuple(parameter.shape)}, expected {tuple(expected)}"
        if parameter.device != x.device:
            return f"{name} is on {parameter.device}, expected {x.device}"
        if parameter.dtype not in allowed or dtype not in (None, parameter.dtype):
            return f"{name} has dtype {parameter.dtype}, which does not go with the other arguments"
        dtype = parameter.dtype
    if residual is not None:
        if residual.device != x.device:
            return f"residual is on {residual.device}, expected {x.device}"
        if (residual.shape, residual.dtype) != (x.shape, x.dtype):
            return f"residual is {residual.dtype} {tuple(residual.shape)}, expected {x.dtype} {tuple(x.shape)}"
    return None


def _memory_format(x: Tensor, normalized_dims: int) -> torch.memory_format:
    """The layout the kernels walk x in, and give their outputs."""
    return torch.contiguous_format if normalized_dims > 0 else suggest_memory_format(x)


def _channels_are_last(x: Tensor) -> bool:
    """Whether the channels of a position adjoin in memory."""
    return _memory_format(x, 0) is not torch.contiguous_format and x.shape[1] > 1


def _sets_are_positions(x: Tensor) -> bool:
    """Whether a layer norm over channels walks rows of positions (Geometry of csrc/core/geometry.h)."""
    return x.shape[1] > 1 and math.prod(x.shape[2:]) > 1 and not _channels_are_last(x)


def _empty_like(x: Tensor, normalized_dims: int) -> Tensor:
    return torch.empty_like(x, memory_format=_memory_format(x, normalized_dims))


def _mask_bytes(x: Tensor, groups: int, normalized_dims: int) -> int:
    """`mask_bytes` of csrc/core/args.h: a bit an element, every run beginning at a whole pack."""
    if normalized_dims > 0:
        run = math.prod(x.shape[x.dim() - normalized_dims :])
    else:
        channels, spatial = x.shape[1], math.prod(x.shape[2:])
        if normalized_dims == NORMALIZED_CHANNELS:
            run = spatial if _sets_are_positions(x) else channels
        elif spatial == 1:
            run = channels if groups == 0 else channels // groups
        else:
            run = channels if _channels_are_last(x) else spatial
    lanes = 8 if x.dtype == torch.float64 else 16
    return x.numel() // run * ((run + lanes - 1) // lanes * lanes // 8)


def _set_count(x: Tensor, groups: int, normalized_dims: int) -> int:
    if normalized_dims > 0:
        return math.prod(x.shape[: x.dim() - normalized_dims])
    if normalized_dims == NORMALIZED_CHANNELS:
        return x.shape[0] * math.prod(x.shape[2:])
    return x.shape[1] if groups == 0 else x.shape[0] * groups


def _fake_forward(
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    mean: OptTensor,
    var: OptTensor,
    groups: int,
    normalized_dims: int,
    eps: float,
    activation: int,
    activation_param: float,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = (groups, normalized_dims, eps, activation, activation_param)
    refusal = why_unsupported(x, weight, bias, residual, mean, var, settings)
    if refusal is not None:
        raise NotImplementedError(f"fastnorm: {refusal}")
    stats = x.new_empty(STATS_ROWS, _set_count(x, groups, normalized_dims), dtype=accumulation_dtype(x))
    masked = save_mask and residual is not None and activation in TWO_SIDED
    mask = x.new_empty(_mask_bytes(x, groups, normalized_dims) if masked else 0, dtype=torch.uint8)
    return _empty_like(x, normalized_dims), stats, mask


def _fake_batch_forward(
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    running_mean: OptTensor,
    running_var: OptTensor,
    num_batches_tracked: OptTensor,
    eps: float,
    activation: int,
    activation_param: float,
    save_mask: bool,
    momentum: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = (0, 0, eps, activation, activation_param)
    return _fake_forward(x, weight, bias, residual, None, None, *settings, save_mask)


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    stats: Tensor,
    mask: Tensor,
    groups: int,
    normalized_dims: int,
    eps: float,
    activation: int,
    activation_param: float,
    frozen: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def parameter_gradient(parameter: OptTensor) -> Tensor:
        wanted = output_mask[1] and parameter is not None
        return torch.empty_like(parameter) if wanted else x.new_empty(0)  # type: ignore[arg-type]

    return (
        _empty_like(x, normalized_dims) if output_mask[0] else x.new_empty(0),
        parameter_gradient(weight),
        parameter_gradient(bias),
        _empty_like(x, normalized_dims) if output_mask[2] and activation else x.new_empty(0),
    )


def _fake_update(*args: Any) -> None:
    return None


def _fake_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    shape, dtype = (x.shape[1],), accumulation_dtype(x)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _fake_partial(x: Tensor) -> Tensor:
    return x.new_empty(3 * x.shape[1] + 1, dtype=accumulation_dtype(x))


def _fake_fold(
    partials: Tensor,
    running_mean: OptTensor,
    running_var: OptTensor,
    num_batches_tracked: OptTensor,
    eps: float,
    momentum: float | None,
) -> tuple[Tensor, Tensor]:
    return partials.new_empty(STATS_ROWS, partials.shape[1] // 3), partials.new_empty(1, dtype=torch.float64)


def _fake_apply(
    x: Tensor,
    weight: OptTensor,
    bias: OptTensor,
    residual: OptTensor,
    stats: Tensor,
    activation: int,
    activation_param: float,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    settings = (0, 0, 0.0, activation, activation_param)
    y, _, mask = _fake_forward(x, weight, bias, residual, None, None, *settings, save_mask)
    return y, mask


def _fake_apply_synchronized(*args: Any) -> tuple[Tensor, Tensor]:
    x, weight, bias, residual, stats, _, _, activation, activation_param, save_mask, _ = args
    return _fake_apply(x, weight, bias, residual, stats, activation, activation_param, save_mask)


def _fake_backward_sums(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(2, x.shape[1], dtype=accumulation_dtype(x))


def _fake_backward_apply(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, activation, _, (wants_dx, wants_dresidual) = rest
    return (
        _empty_like(x, 0) if wants_dx else x.new_empty(0),
        _empty_like(x, 0) if wants_dresidual and activation else x.new_empty(0),
    )


torch.library.register_fake("fastnorm::norm_forward", _fake_forward)
torch.library.register_fake("fastnorm::batch_norm_forward_", _fake_batch_forward)
torch.library.register_fake("fastnorm::norm_backward", _fake_backward)
torch.library.register_fake("fastnorm::update_running_stats_", _fake_update)
torch.library.register_fake("fastnorm::moments", _fake_moments)
torch.library.register_fake("fastnorm::batch_norm_partial", _fake_partial)
torch.library.register_fake("fastnorm::batch_norm_fold_", _fake_fold)
torch.library.register_fake("fastnorm::batch_norm_apply", _fake_apply)
torch.library.register_fake("fastnorm::batch_norm_apply_synchronized", _fake_apply_synchronized)
torch.library.register_fake("fastnorm::batch_norm_backward_sums", _fake_backward_sums)
torch.library.register_fake("fastnorm::batch_norm_backward_apply", _fake_backward_apply)
