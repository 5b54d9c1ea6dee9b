"""SkipInit: a residual add with a learned scale in place of a norm."""

from __future__ import annotations

import math
import numbers

import torch.fx
from torch import Tensor, nn

from . import ops
from .dispatch import Config, Entry, Unsupported, check_tensor, serve

__all__ = ["SkipInit"]


def skip_init(residual: Tensor, branch: Tensor, alpha: Tensor) -> Tensor:
    """residual + alpha * branch; alpha has one element."""
    check_tensor("residual", residual)
    check_tensor("branch", branch)

    def fused(entry: Entry, branch: Tensor, residual: Tensor | None) -> Tensor:
        assert residual is not None
        x = branch
        if x.dim() < 2:
            if residual.shape != x.shape:
                raise Unsupported(f"residual has shape {tuple(residual.shape)}, expected {tuple(x.shape)}")
            x, residual = x.reshape(1, -1), residual.reshape(1, -1)
        scale = alpha.to(ops.accumulation_dtype(x)).expand(x.shape[1])
        mean, var = scale.new_zeros(x.shape[1]), scale.new_ones(x.shape[1])
        y = entry(x, scale, None, residual, mean, var, None, *Config(0, 0, 0.0, 0, 0.0, use_input_stats=False))
        return y if x is branch else y.reshape(branch.shape)

    def unfused(branch: Tensor, residual: Tensor | None) -> Tensor:
        assert residual is not None
        return residual + alpha.reshape(()) * branch  # a tensor without dimensions does not promote the dtype

    return serve("SkipInit", fused, unfused, branch, residual)


torch.fx.wrap("skip_init")  # one node of a traced graph, with alpha as its argument


class SkipInit(nn.Module):
    """residual + alpha * branch with a learned scalar alpha, at the end of a residual branch without norms.

    init: alpha at the start. At 0 every residual block starts as the identity, which is what lets very deep networks
        train; De & Smith found 1 / sqrt(number of blocks) and less to work too, and 1 to fail.
        TypeError unless it is a number, ValueError unless it is finite.
    device, dtype: of alpha, a Parameter of shape (1,). (Not (), which FSDP refuses.)

    forward(residual, branch): tensors of one shape and dtype; returns that shape and dtype, in branch's memory format.
    Reads both and writes the result in one pass, and goes back in one: dbranch = alpha * dy and dalpha = sum(dy *
    branch) together, dresidual = dy itself. It is the norm with mean 0 and variance 1, so it has what the norms have:
    half precision computed in float32, derivatives of any order, torch.compile, the CPU and CUDA kernels. What they do
    not serve (say, a residual that broadcasts), torch's operators compute.

    De & Smith 2020, https://arxiv.org/abs/2002.10444.
    """

    init: float
    alpha: Tensor

    def __init__(
        self, init: float = 0.0, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if isinstance(init, bool) or not isinstance(init, numbers.Real):
            raise TypeError(f"init must be a number, but got {type(init).__name__}")
        if not math.isfinite(init):
            raise ValueError(f"init is {init}, expected a finite number")
        super().__init__()
        self.init = float(init)
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """alpha = init"""
        nn.init.constant_(self.alpha, self.init)

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        """residual + alpha * branch"""
        return skip_init(residual, branch, self.alpha)

    def extra_repr(self) -> str:
        return f"init={self.init:g}"
