"""batch_norm, group_norm, instance_norm and layer_norm with the signatures of torch.nn.functional and a fused
epilogue: `act(norm(input) + residual)`.

Each calls the kernels; what they refuse, torch.nn.functional's own function computes. So what torch rejects is rejected
by torch, in its words. `FASTNORM_LOG=fallback`, or the logger "fastnorm" at level DEBUG, tells why a call was left to
torch.

Keyword arguments that all of them share:
    activation: None, or a name in `fastnorm.activations.ACTIVATIONS` ("relu", "silu", "gelu", ...).
    activation_param: the slope of leaky_relu.
    residual: a tensor of input's shape and dtype, added before the activation; it gets a gradient too.

Dtypes: float64, float32, bfloat16 and float16 input; parameters and statistics of input's dtype, or float32.
Raises: what torch.nn.functional raises; ValueError for an unknown activation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from . import plain, reference
from .activations import activation_code
from .dispatch import (
    fused_batch_norm,
    fused_group_norm,
    fused_instance_norm,
    fused_layer_norm,
    fused_layer_norm2d,
    serve,
)
from .statistics import moments, normalize

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "layer_norm2d", "moments", "normalize"]


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
    norm = (running_mean, running_var, weight, bias, training, momentum, eps)
    return serve(
        "batch_norm",
        lambda entry, x, added: fused_batch_norm(entry, x, *norm, added, code, activation_param),
        lambda x, added: reference.epilogue(F.batch_norm(x, *norm), added, activation, activation_param),
        input,
        residual,
    )


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
    norm = (running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return serve(
        "instance_norm",
        lambda entry, x, added: fused_instance_norm(entry, x, *norm, added, code, activation_param),
        lambda x, added: reference.epilogue(F.instance_norm(x, *norm), added, activation, activation_param),
        input,
        residual,
    )


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
    norm = (num_groups, weight, bias, eps)
    return serve(
        "group_norm",
        lambda entry, x, added: fused_group_norm(entry, x, *norm, added, code, activation_param),
        lambda x, added: reference.epilogue(F.group_norm(x, *norm), added, activation, activation_param),
        input,
        residual,
    )


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
    norm = (normalized_shape, weight, bias, eps)
    return serve(
        "layer_norm",
        lambda entry, x, added: fused_layer_norm(entry, x, *norm, added, code, activation_param),
        lambda x, added: reference.epilogue(F.layer_norm(x, *norm), added, activation, activation_param),
        input,
        residual,
    )


def layer_norm2d(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    activation: str | None = None,
    activation_param: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """Layer norm over the channels of every position, then `+ residual`, then the activation.

    input (N, C, H, W), weight and bias (C,). Returns input's shape, dtype and, where the kernels serve the call, memory
    format. Raises what F.layer_norm raises of input.permute(0, 2, 3, 1). Liu et al. 2022 (ConvNeXt),
    https://arxiv.org/abs/2201.03545.
    """
    code = activation_code(activation)
    norm = (list(input.shape[1:2]), weight, bias, eps)
    return serve(
        "layer_norm2d",
        lambda entry, x, added: fused_layer_norm2d(entry, x, *norm, added, code, activation_param),
        lambda x, added: reference.epilogue(plain.layer_norm2d(x, *norm), added, activation, activation_param),
        input,
        residual,
    )
