"""Drop-in torch.nn norms: same constructor, Parameters, buffers, state_dict and exceptions, with a fused epilogue.

    fastnorm.BatchNorm2d(64, activation="relu")(x, residual)      # act(norm(x) + residual)

Constructors take what the torch.nn class of the same name takes, then keyword-only `activation` and
`activation_param` (see functional.py). A call that the kernels do not serve runs torch.nn's own forward.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch.fx
from torch import Tensor, nn

from . import reference
from .activations import ACTIVATIONS, activation_code
from .dispatch import (
    Entry,
    Unsupported,
    entry_for,
    fall_back_or_wrap,
    fused_group_norm,
    fused_instance_norm,
    fused_layer_norm,
    run_norm,
)
from .ops import OptTensor
from .unfused import UNFUSED, scriptable

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

_OPTIONS = """

    Takes what {base} takes, then, by keyword:
        activation: None, {activations}.
        activation_param: the slope of leaky_relu.
    forward(input, residual=None) returns act(norm(input) + residual) of input's shape and dtype; residual has them too.
    Dtypes: float64, float32, bfloat16 and float16; parameters of input's dtype, or float32.
    What the kernels do not serve, the forward of {base} computes; `fastnorm.explain` tells why.
    Raises ValueError for an unknown activation, TypeError for an activation_param that is no number; else, made and
    called, what {base} raises, in its words, and for a residual what `+` raises.
"""


def add_if_given(y: Tensor, residual: OptTensor) -> Tensor:
    """What torch.fx records where a residual may be None when the graph runs."""
    return y if residual is None else y + residual


class Norm(nn.Module):
    """What all fastnorm modules share. Mixed in before the torch.nn class.

    All state of ours is on the class, unless an activation is fused: a torch.nn module becomes one of ours when its
    class is changed. A norm that fuses an activation has the attributes `activation` and `activation_param`, which may
    be set; to any other norm these names mean nothing, as to torch.nn's.
    """

    #: The torch.nn class that this is a drop-in for.
    torch_class: ClassVar[type[nn.Module]]
    #: Every public class names itself: a subclass of the user's may redefine anything.
    _public_class: ClassVar[type[nn.Module]]
    _fuses: bool = False
    _counts_batches: ClassVar[bool] = True

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
        if activation is not None:
            self._fuses = True
            self.activation = activation
            self.activation_param = float(activation_param)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(norm(input) + residual), of input's shape and dtype. residual: input's shape and dtype."""
        if not isinstance(self, Norm):  # a wrapper has kept this method, and `revert` has changed the class since
            module: Any = self
            return type(module).forward(module, *((input,) if residual is None else (input, residual)))
        if self._fuses:
            return self._run(input, residual, self.activation, self.activation_param)
        return self._run(input, residual)

    def _run(self, x: Tensor, residual: OptTensor = None, activation: str | None = None, param: float = 0.01) -> Tensor:
        """`forward` with the activation of this call, in place of the norm's own."""
        try:
            entry = entry_for(x)
            y = self._fused(entry, x, residual, activation_code(activation), param)
        except RuntimeError as error:
            return self._refused(error, x, residual, activation, param)
        if entry is run_norm:
            own = self.__dict__
            own["_served_calls"] = own.get("_served_calls", 0) + 1
        return y

    def _fused(self, entry: Entry, x: Tensor, residual: OptTensor, code: int, param: float) -> Tensor:
        """By the kernels; Unsupported if they do not serve this call. code: the operators' number of the activation."""
        raise NotImplementedError

    def _unfused(self, activation: str | None, param: float, x: Tensor, residual: OptTensor) -> Any:
        """By torch.nn's own forward."""
        y = super().forward(x)
        if residual is not None and "_adds_in_place" in self.__dict__:  # `fuse` found `y += residual`
            y, residual = y.add_(residual), None
        return reference.epilogue(y, residual, activation, param)

    def _refused(
        self, error: RuntimeError, x: Tensor, residual: OptTensor, activation: str | None, param: float
    ) -> Tensor:
        """What a call gives that the kernels refused; `error` itself where it is no refusal."""
        if isinstance(x, torch.fx.Proxy):
            traced: Tensor = self._trace(x, residual, activation, param)
            return traced
        again = partial(Norm._run, self, activation=activation, param=param)
        unfused = partial(self._unfused, activation, param)
        y, served = fall_back_or_wrap(type(self).__name__, error, again, unfused, x, residual)
        if not served:
            own = self.__dict__
            own["_left_calls"] = own.get("_left_calls", 0) + 1
        return y

    def _trace(self, x: torch.fx.Proxy, residual: OptTensor, activation: str | None, param: float) -> Any:
        """Be a leaf to torch.fx where a torch.nn norm in this place would be one; else be traced as that one is."""
        tracer: Any = x.tracer
        # What a subclass, a wrapper on the instance or a hook does is recorded already, and a leaf would do it again.
        recorded = type(self) is not self._public_class or "forward" in self.__dict__
        recorded = recorded or bool(self._forward_pre_hooks or self._forward_hooks)
        leaf = False
        if not recorded and isinstance(tracer, torch.fx.Tracer) and tracer.root is not self:
            path = tracer.path_of_module(self)
            stand_in = object.__new__(self.torch_class)
            stand_in.__dict__ = self.__dict__
            leaf = tracer.is_leaf_module(stand_in, path)
        if not leaf and isinstance(residual, torch.fx.Proxy) and residual.node.op == "placeholder":
            # The root's own parameter, which may be left out when the graph runs.
            z = tracer.create_proxy("call_function", add_if_given, (super().forward(x), residual), {})
            return reference.epilogue(z, None, activation, param)
        if not leaf:
            return self._unfused(activation, param, x, residual)  # type: ignore[arg-type]
        return tracer.create_proxy("call_module", path, (x,) if residual is None else (x, residual), {})

    def _epilogue(self) -> tuple[str | None, float]:
        """The fused activation and its parameter."""
        return (self.activation, self.activation_param) if self._fuses else (None, 0.0)

    def _affine(self) -> tuple[OptTensor, OptTensor]:
        """weight and bias: whatever `self.weight` and `self.bias` are."""
        own = self.__dict__
        # nn.Module.__getattr__ takes ten times as long.
        if type(self) is self._public_class and "weight" not in own and "bias" not in own:
            parameters = own["_parameters"]
            if "weight" in parameters and "bias" in parameters:
                return parameters["weight"], parameters["bias"]
        module: Any = self
        return module.weight, module.bias

    def _tensors(self) -> tuple[OptTensor, OptTensor, OptTensor, OptTensor, OptTensor]:
        """weight, bias, running_mean, running_var and num_batches_tracked, likewise."""
        own = self.__dict__
        if (
            type(self) is self._public_class
            and "weight" not in own
            and "bias" not in own
            and "running_mean" not in own
            and "running_var" not in own
            and "num_batches_tracked" not in own
        ):
            parameters, buffers = own["_parameters"], own["_buffers"]
            try:
                mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
                return parameters["weight"], parameters["bias"], mean, var, batches
            except KeyError:  # one of them is something else
                pass
        m: Any = self
        # torch's instance norm never asks for it, and its batch norm in training alone.
        batches = m.num_batches_tracked if self.training and self._counts_batches else None
        return m.weight, m.bias, m.running_mean, m.running_var, batches

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin to count anew."""
        state = self.__dict__.copy()
        for name in CALL_COUNTS:
            state.pop(name, None)
        return state

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script asks for what to compile in this module's place."""
        return scriptable(self)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        activation, param = self._epilogue()
        if activation is not None:
            text += f", activation={activation!r}"
        if activation == "leaky_relu":
            text += f", activation_param={param}"
        return text


#: Of eager calls: those that the kernels served, and those that were left to torch. (On a module, from its first call.)
CALL_COUNTS = ("_served_calls", "_left_calls")

NormClass = TypeVar("NormClass", bound=type[Norm])

#: torch.nn's class, or the same with an activation behind it -> fastnorm's: all public classes are in it
BY_TORCH_CLASS: dict[type[nn.Module], type[Norm]] = {}


def _public(cls: NormClass) -> NormClass:
    """Completes a public class: the class it is a drop-in for, its last base; and a constructor whose signature help()
    shows in full, that of the torch that is installed."""
    base: Any = cls
    base._public_class = cls
    base.torch_class = cls.__bases__[-1]
    BY_TORCH_CLASS[base.torch_class] = BY_TORCH_CLASS[UNFUSED[base.torch_class]] = cls
    package = base.torch_class.__module__.partition(".modules.")[0]
    base.__doc__ = (cls.__doc__ or "") + _OPTIONS.format(
        base=f"{package}.{cls.__name__}", activations=", ".join(map(repr, ACTIVATIONS))
    )

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super(base, self).__init__(*args, **kwargs)

    own = inspect.signature(Norm.__init__).parameters
    parameters = dict(inspect.signature(base.torch_class.__init__).parameters)
    parameters |= {name: own[name] for name in ("activation", "activation_param")}
    __init__.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    base.__init__ = __init__
    return cls


class _BatchNorm(Norm, nn.modules.batchnorm._BatchNorm):
    def _fused(self, entry: Entry, x: Tensor, residual: OptTensor, code: int, param: float) -> Tensor:
        self._check_input_dim(x)  # torch's, with torch's ValueError
        weight, bias, running_mean, running_var, num_batches_tracked = self._tensors()
        training = self.training
        momentum = self.momentum
        if not training:
            training = running_mean is None and running_var is None
            num_batches_tracked = None
        elif not self.track_running_stats:
            running_mean = running_var = num_batches_tracked = None
        elif momentum is None and num_batches_tracked is None:
            momentum = 0.0
        # As in dispatch.py, without a frame between: the call whose host time counts most.
        return entry(
            x, weight, bias, residual, running_mean, running_var, num_batches_tracked,
            0, 0, self.eps, code, param, training, momentum,
        )  # fmt: skip

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """A norm has none; torch.nn.SyncBatchNorm.convert_sync_batchnorm asks, having read all that it will keep."""
        if self._fuses and sys._getframe(1).f_code is nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__:  # type: ignore[attr-defined]
            warnings.warn(
                f"convert_sync_batchnorm makes a torch.nn.SyncBatchNorm of a fastnorm.{type(self).__name__} and loses "
                f"its activation, {self.activation!r}: call fastnorm.convert_sync_batchnorm(model), which keeps it",
                stacklevel=3,
            )
        return super().named_children()


class _InstanceNorm(Norm, nn.modules.instancenorm._InstanceNorm):
    _counts_batches = False

    def _fused(self, entry: Entry, x: Tensor, residual: OptTensor, code: int, param: float) -> Tensor:
        self._check_input_dim(x)
        if x.dim() == self._get_no_batch_dim():
            batched = None if residual is None else residual.unsqueeze(0)
            return self._fused(entry, x.unsqueeze(0), batched, code, param).squeeze(0)
        if x.size(1) != self.num_features:
            raise Unsupported(f"x has {x.size(1)} channels, expected {self.num_features}")
        weight, bias, running_mean, running_var, _ = self._tensors()
        use_input_stats = self.training or not self.track_running_stats
        momentum = self.momentum or 0.0
        return fused_instance_norm(
            entry, x, running_mean, running_var, weight, bias, use_input_stats, momentum, self.eps,
            residual, code, param,
        )  # fmt: skip


@_public
class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d with a fused epilogue: x (N, C) or (N, C, L).

    ValueError for another number of dimensions, and in training for a single value per channel or an eps that is not
    positive; RuntimeError for another number of channels. Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167."""


@_public
class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d with a fused epilogue: x (N, C, H, W).

    ValueError for another number of dimensions, and in training for a single value per channel or an eps that is not
    positive; RuntimeError for another number of channels. Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167."""


@_public
class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d with a fused epilogue: x (N, C, D, H, W).

    ValueError for another number of dimensions, and in training for a single value per channel or an eps that is not
    positive; RuntimeError for another number of channels. Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167."""


@_public
class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d with a fused epilogue: x (N, C, L) or (C, L).

    ValueError for another number of dimensions, for another number of channels than affine parameters have, and for a
    single value per channel and sample unless running statistics are used. Ulyanov et al. 2016,
    https://arxiv.org/abs/1607.08022."""


@_public
class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d with a fused epilogue: x (N, C, H, W) or (C, H, W). Keeps channels_last.

    ValueError for another number of dimensions, for another number of channels than affine parameters have, and for a
    single value per channel and sample unless running statistics are used. Ulyanov et al. 2016,
    https://arxiv.org/abs/1607.08022."""


@_public
class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d with a fused epilogue: x (N, C, D, H, W) or (C, D, H, W). Keeps channels_last_3d.

    ValueError for another number of dimensions, for another number of channels than affine parameters have, and for a
    single value per channel and sample unless running statistics are used. Ulyanov et al. 2016,
    https://arxiv.org/abs/1607.08022."""


@_public
class GroupNorm(Norm, nn.GroupNorm):
    """torch.nn.GroupNorm with a fused epilogue: x (N, C, *).

    ValueError, when made, for channels that the groups do not divide; when called, where x has no more values than
    there are groups. RuntimeError for less than two dimensions or another number of channels. Wu & He 2018,
    https://arxiv.org/abs/1803.08494."""

    def _fused(self, entry: Entry, x: Tensor, residual: OptTensor, code: int, param: float) -> Tensor:
        return fused_group_norm(entry, x, self.num_groups, *self._affine(), self.eps, residual, code, param)


@_public
class LayerNorm(Norm, nn.LayerNorm):
    """torch.nn.LayerNorm with a fused epilogue: x (*, *normalized_shape).

    RuntimeError where x does not end in normalized_shape, or that is empty. Ba et al. 2016,
    https://arxiv.org/abs/1607.06450."""

    def _fused(self, entry: Entry, x: Tensor, residual: OptTensor, code: int, param: float) -> Tensor:
        shape: Any = self.normalized_shape
        return fused_layer_norm(entry, x, shape, *self._affine(), self.eps, residual, code, param)
