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
#: RuntimeErrors that are none: a kernel or an allocation failed on the GPU, and torch should not be left to hide it.
FAILURES = (torch.AcceleratorError, torch.OutOfMemoryError)

_logger = logging.getLogger("fastnorm")


def leave_to_torch(name: str, refusal: Exception) -> None:
    """Say in the debug log why a call of `name` is left to torch; raise what is no refusal."""
    if is_compiling():
        return
    if isinstance(refusal, FAILURES):
        raise refusal
    if _logger.isEnabledFor(logging.DEBUG):
        _logger.debug("%s left to torch: %s", name, why(refusal))


def why(refusal: Exception) -> str:
    """The reason an exception gives, on one line."""
    return str(refusal).removeprefix("fastnorm: ").partition("\n")[0]


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
        return apply_norm(
            input,
            weight,
            bias,
            residual,
            running_mean,
            running_var,
            None,
            KIND_BATCH,
            0,
            training,
            momentum,
            eps,
            code,
            activation_param,
        )
    except REFUSALS as refusal:
        leave_to_torch("batch_norm", refusal)
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
            input,
            running_mean,
            running_var,
            weight,
            bias,
            use_input_stats,
            momentum,
            eps,
            residual,
            code,
            activation_param,
        )
    except REFUSALS as refusal:
        leave_to_torch("instance_norm", refusal)
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
        leave_to_torch("group_norm", refusal)
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
        leave_to_torch("layer_norm", refusal)
    y = F.layer_norm(input, normalized_shape, weight, bias, eps)
    return reference.epilogue(y, residual, code, activation_param)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, over all the other dimensions.

    x (N, C, *) of any real dtype. Returns two tensors (C,), float32 (float64 for float64 x), NaN where x is empty.
    ValueError for less than two dimensions.
    """
    if x.dim() < 2:
        raise ValueError(f"expected at least 2D input (got {x.dim()}D input)")
    try:
        require_plain(x)
        if torch.is_grad_enabled() and x.requires_grad:
            raise Unserved("moments is differentiated by torch")
        if is_compiling() and (refusal := ops.why_refused(x, *(None,) * 5, KIND_BATCH, 0)) is not None:
            raise Unserved(refusal)
        mean, var = ops.moments(x)
        return mean, var
    except REFUSALS as refusal:
        leave_to_torch("moments", refusal)
    return reference.moments(x)


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
    kind, groups = KIND_BATCH, 0
    if use_input_stats:
        kind, groups = KIND_GROUP, int(x.size(1))  # int: torch.compile takes the number of channels for a constant
        if x.numel() <= x.size(0) * groups:
            raise Unserved("x has less than two spatial elements")
    return apply_norm(
        x,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        None,
        kind,
        groups,
        use_input_stats,
        momentum,
        eps,
        activation,
        param,
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
    return apply_norm(
        x, weight, bias, residual, None, None, None, KIND_GROUP, groups, True, None, eps, activation, param
    )


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
    return apply_norm(x, weight, bias, residual, None, None, None, KIND_LAYER, dims, True, None, eps, activation, param)
