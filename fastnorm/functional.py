"""batch_norm, group_norm, instance_norm and layer_norm with the signatures of torch.nn.functional and a fused
epilogue: `act(norm(input) + residual)`.

Each asks its `serve_*` function, which calls the kernels or raises; whatever that raised, torch.nn.functional's own
function then answers. So what torch rejects is rejected by torch, in its words, and what the kernels do not do is
computed by torch. `logging.getLogger("fastnorm")` tells at level DEBUG why a call was left to torch.

Keyword arguments that all of them share:
    activation: None, "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish", "sigmoid" or "tanh".
    activation_param: the slope of leaky_relu.
    residual: a tensor of input's shape and dtype, added before the activation; it gets a gradient too.

Dtypes: float64, float32, bfloat16 and float16 input; parameters and statistics of input's dtype, or float32.
Raises: what torch.nn.functional raises; ValueError for an unknown activation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from . import ops, reference
from .autograd import apply_norm, require_plain
from .ops import KIND_BATCH, KIND_GROUP, KIND_LAYER, Unserved, activation_code

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "moments"]

#: What a `serve_*` function raises for a call that torch has to answer; not ValueError, which is torch's own check.
REFUSALS = (RuntimeError, LookupError, TypeError, AttributeError)

_logger = logging.getLogger("fastnorm")


def log_refusal(name: str, refusal: Exception) -> None:
    """Say in the debug log why a call of `name` was left to torch."""
    if not is_compiling():
        _logger.debug("%s left to torch: %s", name, refusal)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    activation_param: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.batch_norm, then `+ residual`, then the activation.

    input (N, C, *), the others (C,). Returns input's shape, dtype and memory format. Training moves running_mean and
    running_var in place. Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    code = activation_code(activation)
    try:
        require_plain(input)
        if momentum is None:
            raise Unserved("momentum is None")
        return serve_batch_norm(
            input, running_mean, running_var, None, weight, bias, training, momentum, eps,
            residual, code, activation_param,
        )  # fmt: skip
    except REFUSALS as refusal:
        log_refusal("batch_norm", refusal)
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return reference.epilogue(y, residual, code, activation_param)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    activation_param: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.instance_norm, then `+ residual`, then the activation.

    input (N, C, *), the others (C,). Returns input's shape, dtype and (unlike torch) memory format. With
    use_input_stats the running statistics move in place. Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022.
    """
    code = activation_code(activation)
    try:
        require_plain(input)
        if momentum is None:
            raise Unserved("momentum is None")
        return serve_instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps,
            residual, code, activation_param,
        )  # fmt: skip
    except REFUSALS as refusal:
        log_refusal("instance_norm", refusal)
    y = F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return reference.epilogue(y, residual, code, activation_param)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    activation_param: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.group_norm, then `+ residual`, then the activation.

    input (N, C, *), weight and bias (C,). Returns input's shape, dtype and memory format.
    Wu & He 2018, https://arxiv.org/abs/1803.08494.
    """
    code = activation_code(activation)
    try:
        require_plain(input)
        return serve_group_norm(input, num_groups, weight, bias, eps, residual, code, activation_param)
    except REFUSALS as refusal:
        log_refusal("group_norm", refusal)
    y = F.group_norm(input, num_groups, weight, bias, eps)
    return reference.epilogue(y, residual, code, activation_param)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    activation_param: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.layer_norm, then `+ residual`, then the activation.

    input (*, *normalized_shape), weight and bias of normalized_shape. Returns input's shape and dtype, contiguous.
    Ba et al. 2016, https://arxiv.org/abs/1607.06450.
    """
    code = activation_code(activation)
    try:
        require_plain(input)
        if not isinstance(normalized_shape, (tuple, list)):
            raise Unserved(f"normalized_shape is a {type(normalized_shape).__name__}")
        shape = torch.Size(normalized_shape)  # TypeError for anything but integers
        return serve_layer_norm(input, shape, weight, bias, eps, residual, code, activation_param)
    except REFUSALS as refusal:
        log_refusal("layer_norm", refusal)
    y = F.layer_norm(input, normalized_shape, weight, bias, eps)  # type: ignore[arg-type]
    return reference.epilogue(y, residual, code, activation_param)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, over all the other dimensions.

    x (N, C, *). Returns two tensors (C,), float32 (float64 for float64 x). RuntimeError for an empty or integer x.
    """
    try:
        require_plain(x)
        if torch.is_grad_enabled() and x.requires_grad:
            raise Unserved("moments is differentiated by torch")
        if is_compiling() and (refusal := ops.why_refused(x, *(None,) * 5, KIND_BATCH, 0)) is not None:
            raise Unserved(refusal)
        mean, var = ops.moments(x)
        return mean, var
    except REFUSALS as refusal:
        log_refusal("moments", refusal)
    return reference.moments(x)


def serve_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    activation: int,
    param: float,
) -> Tensor:
    """Batch norm by the kernels. Training moves every statistic it is given; momentum None: cumulative average."""
    mean = var = running = None
    if training:
        numel = x.numel()
        channels = x.size(1)
        if numel <= channels or eps <= 0.0:
            raise Unserved(f"eps is {eps}" if eps <= 0.0 else "x has less than two values per channel")
        if running_mean is not None or running_var is not None:
            _check_running(x, running_mean, running_var, bias if weight is None else weight)
            running = (running_mean, running_var, num_batches_tracked, numel // channels, momentum)
        elif num_batches_tracked is not None:
            running = (None, None, num_batches_tracked, 0, 0.0)
    else:
        mean, var = running_mean, running_var
        if mean is None or var is None:
            raise Unserved("evaluation needs running_mean and running_var")
        if mean.requires_grad or var.requires_grad:
            raise Unserved("running statistics require grad")
        if eps < 0.0 or x.numel() == 0:
            raise Unserved(f"eps is {eps}" if eps < 0.0 else "x is empty")
    return apply_norm(x, weight, bias, residual, mean, var, running, KIND_BATCH, 0, eps, activation, param)


def serve_instance_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: int,
    param: float,
) -> Tensor:
    """Instance norm by the kernels: group norm of one channel a group; by running statistics, batch norm."""
    if not use_input_stats:
        return serve_batch_norm(
            x, running_mean, running_var, None, weight, bias, False, momentum, eps, residual, activation, param
        )
    numel = x.numel()
    channels = x.size(1)
    sets = x.size(0) * channels
    if numel <= sets:
        raise Unserved("x has less than two spatial elements")
    running = None
    if running_mean is not None or running_var is not None:
        _check_running(x, running_mean, running_var, bias if weight is None else weight)
        running = (running_mean, running_var, None, numel // sets, momentum)
    return apply_norm(
        x, weight, bias, residual, None, None, running, KIND_GROUP, channels, eps, activation, param
    )


def serve_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: int,
    param: float,
) -> Tensor:
    """Group norm by the kernels."""
    if x.numel() <= groups:  # torch counts the values of the whole batch
        raise Unserved("x has less than two values per group")
    return apply_norm(x, weight, bias, residual, None, None, None, KIND_GROUP, groups, eps, activation, param)


def serve_layer_norm(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: int,
    param: float,
) -> Tensor:
    """Layer norm by the kernels."""
    dims = len(normalized_shape)
    if x.shape[-dims:] != normalized_shape or dims == 0 or x.numel() == 0:
        raise Unserved(f"x is empty or does not end in {normalized_shape}")
    return apply_norm(x, weight, bias, residual, None, None, None, KIND_LAYER, dims, eps, activation, param)


def _check_running(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, parameter: Tensor | None
) -> None:
    """torch's rules for statistics that are to move. The operator that moves them sees neither x nor parameters."""
    if running_mean is None or running_var is None:
        raise Unserved("one of running_mean and running_var is None")
    if running_mean.requires_grad or running_var.requires_grad:
        raise Unserved("running statistics require grad")
    if not x.size(1) == running_mean.numel() == running_var.numel():
        raise Unserved("running statistics are of another size than x has channels")
    dtype = running_mean.dtype
    if dtype is not running_var.dtype or dtype not in ops.PARAMETER_DTYPES.get(x.dtype, ()):
        raise Unserved("running statistics are of a dtype that does not go with x")
    if parameter is not None and parameter.dtype is not dtype:
        raise Unserved("running statistics are of another dtype than weight and bias")
