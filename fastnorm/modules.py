"""Drop-in torch.nn norms: same constructor, Parameters, buffers, state_dict and exceptions, with a fused epilogue.

    fastnorm.BatchNorm2d(64, activation="relu")(x, residual)      # act(norm(x) + residual)

Constructors take what the torch.nn class of the same name takes, then keyword-only `activation` and
`activation_param` (see functional.py). A call that the kernels do not serve runs torch.nn's own forward.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch.fx
from torch import Tensor, nn

from . import reference
from .autograd import apply_norm, require_plain
from .functional import (
    REFUSALS,
    leave_to_torch,
    serve_group_norm,
    serve_instance_norm,
    serve_layer_norm,
)
from .ops import ACTIVATIONS, KIND_BATCH, Unserved, activation_code

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
]


class Norm(nn.Module):
    """What all fastnorm modules share. Mixed in before the torch.nn class.

    The defaults are the class's, so that a torch.nn module becomes one of ours when its class is changed.
    """

    activation: str | None = None
    activation_param: float = 0.01

    def __init__(
        self,
        *args: Any,
        activation: str | None = None,
        activation_param: float = 0.01,
        **kwargs: Any,
    ) -> None:
        activation_code(activation)
        if not isinstance(activation_param, (int, float)):
            raise TypeError(f"activation_param must be a number, but got {type(activation_param).__name__}")
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.activation_param = float(activation_param)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(norm(input) + residual), of input's shape and dtype. residual: input's shape and dtype."""
        try:
            require_plain(input)
            return self._serve(input, residual, ACTIVATIONS[self.activation])
        except REFUSALS as refusal:
            leave_to_torch(type(self).__name__, refusal)
        code = activation_code(self.activation)
        if isinstance(input, torch.fx.Proxy):
            return self._record(input, residual)
        return reference.epilogue(super().forward(input), residual, code, self.activation_param)

    def _record(self, input: torch.fx.Proxy, residual: torch.fx.Proxy | None) -> Any:
        """Be a leaf to torch.fx, as torch.nn's own modules are."""
        tracer: Any = input.tracer
        args = (input,) if residual is None else (input, residual)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, {})

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script asks for what to compile in this module's place."""
        from .convert import scriptable

        return scriptable(self)

    def _serve(self, x: Tensor, residual: Tensor | None, activation: int) -> Tensor:
        """By the kernels; raises one of REFUSALS if they do not serve this call."""
        raise NotImplementedError

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        parameters = self._parameters
        try:  # a tenth of what nn.Module.__getattr__ takes
            return parameters["weight"], parameters["bias"]
        except KeyError:  # parametrized, or a replica of DataParallel
            module: Any = self
            return module.weight, module.bias

    def _statistics(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        buffers = self._buffers
        try:
            return buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:
            module: Any = self
            return module.running_mean, module.running_var, module.num_batches_tracked

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if self.activation == "leaky_relu":
            text += f", activation_param={self.activation_param}"
        return text


NormClass = TypeVar("NormClass", bound=type[Norm])


def _with_signature(cls: NormClass) -> NormClass:
    """Let help() and inspect.signature show the constructor in full: torch.nn's of the torch that is installed."""
    base: Any = cls

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super(base, self).__init__(*args, **kwargs)

    own = inspect.signature(Norm.__init__).parameters
    parameters = dict(inspect.signature(getattr(nn, cls.__name__).__init__).parameters)
    parameters |= {name: own[name] for name in ("activation", "activation_param")}
    __init__.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    base.__init__ = __init__
    return cls


class _BatchNorm(Norm, nn.modules.batchnorm._BatchNorm):
    def _serve(self, x: Tensor, residual: Tensor | None, activation: int) -> Tensor:
        self._check_input_dim(x)  # torch's, with torch's ValueError
        weight, bias = self._affine()
        running_mean, running_var, num_batches_tracked = self._statistics()
        training = self.training
        momentum = self.momentum
        if not training:
            training = running_mean is None and running_var is None
            num_batches_tracked = None
        elif not self.track_running_stats:
            running_mean = running_var = num_batches_tracked = None
        elif momentum is None and num_batches_tracked is None:
            momentum = 0.0
        return apply_norm(
            x,
            weight,
            bias,
            residual,
            running_mean,
            running_var,
            num_batches_tracked,
            KIND_BATCH,
            0,
            training,
            momentum,
            self.eps,
            activation,
            self.activation_param,
        )


class _InstanceNorm(Norm, nn.modules.instancenorm._InstanceNorm):
    def _serve(self, x: Tensor, residual: Tensor | None, activation: int) -> Tensor:
        self._check_input_dim(x)
        if x.dim() == self._get_no_batch_dim():
            batched = None if residual is None else residual.unsqueeze(0)
            return self._serve(x.unsqueeze(0), batched, activation).squeeze(0)
        if x.size(1) != self.num_features:
            raise Unserved(f"x has {x.size(1)} channels, expected {self.num_features}")
        weight, bias = self._affine()
        running_mean, running_var, _ = self._statistics()
        return serve_instance_norm(
            x, running_mean, running_var, weight, bias,
            self.training or not self.track_running_stats, self.momentum or 0.0, self.eps,
            residual, activation, self.activation_param,
        )  # fmt: skip


@_with_signature
class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d with a fused epilogue: x (N, C) or (N, C, L)."""


@_with_signature
class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d with a fused epilogue: x (N, C, H, W)."""


@_with_signature
class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d with a fused epilogue: x (N, C, D, H, W)."""


@_with_signature
class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d with a fused epilogue: x (N, C, L) or (C, L)."""


@_with_signature
class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d with a fused epilogue: x (N, C, H, W) or (C, H, W). Keeps channels_last."""


@_with_signature
class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d with a fused epilogue: x (N, C, D, H, W) or (C, D, H, W). Keeps channels_last_3d."""


@_with_signature
class GroupNorm(Norm, nn.GroupNorm):
    """torch.nn.GroupNorm with a fused epilogue: x (N, C, *)."""

    def _serve(self, x: Tensor, residual: Tensor | None, activation: int) -> Tensor:
        weight, bias = self._affine()
        return serve_group_norm(x, self.num_groups, weight, bias, self.eps, residual, activation, self.activation_param)


@_with_signature
class LayerNorm(Norm, nn.LayerNorm):
    """torch.nn.LayerNorm with a fused epilogue: x (*, *normalized_shape)."""

    def _serve(self, x: Tensor, residual: Tensor | None, activation: int) -> Tensor:
        weight, bias = self._affine()
        return serve_layer_norm(
            x, self.normalized_shape, weight, bias, self.eps, residual, activation, self.activation_param
        )
