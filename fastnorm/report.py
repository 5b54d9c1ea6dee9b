"""What fastnorm serves: `report` for a model, layer by layer, or for `fastnorm.enable`; `explain` for one call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from . import modules, ops
from .activations import activation_code
from .convert import has_own_forward, why_not_converted
from .dispatch import carries_metadata, entry_for, is_refusal, reason_of
from .extension import _C
from .fusing.record import REFUSAL, fusion_of, is_norm
from .fusing.ungraph import NOTES
from .images import ImageNormalize

__all__ = ["Report", "Row", "explain", "report"]


@dataclass(frozen=True)
class Row:
    """A norm layer of a model, or one of torch's norms that `fastnorm.enable` is about.

    name, layer: its name in the model and its class; or torch's name of the norm, and the device. status: "served"
    where fastnorm can serve it, else "left"; why: by which kernels, or why it is left. served_calls, left_calls: the
    calls so far that the kernels served, and those that they refused and torch computed: eager calls of a layer; of
    torch's norms forward and backward calls each by itself.
    """

    name: str
    layer: str
    status: Literal["served", "left"]
    why: str
    served_calls: int = 0
    left_calls: int = 0

    @property
    def calls(self) -> str:
        """The calls so far, in words."""
        counts = [f"{self.served_calls} served"] * bool(self.served_calls)
        counts += [f"{self.left_calls} left"] * bool(self.left_calls)
        return ", ".join(counts) or "none"


@dataclass(frozen=True)
class Report:
    """The norm layers of a model, in the order of `model.named_modules()`. Iterate over it, or print it.

    refused_gangs: launches of this process whose blocks wait for each other and which a GPU has refused (it is shared
    or partitioned); their calls were served by other launches, which read x twice.
    """

    rows: tuple[Row, ...]
    refused_gangs: int = 0

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        served = sum(row.status == "served" for row in self.rows)
        summary = f"{served} of {len(self.rows)} norm layers can be served by fastnorm"
        left = sum(row.left_calls for row in self.rows)
        if calls := left + sum(row.served_calls for row in self.rows):
            summary += f"; {calls - left} of {calls} calls so far were"
        if self.refused_gangs:
            summary += f"; the GPU refused {self.refused_gangs} fused launches of this process"
        if not self.rows:
            return summary
        table = [("layer", "class", "status", "calls", "why")]
        table += [(row.name or "(model)", row.layer, row.status, row.calls, row.why) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        return "\n".join([*lines, summary])


def report(model: nn.Module | None = None) -> Report:
    """Which norm layers of `model` fastnorm can serve, by which kernels, and why the others are left as they are; and
    which of their calls so far were served. (Calls under torch.compile are not counted.) AttributeError if `model` is
    neither None nor an nn.Module.

    Without a model: which of torch's own norms `fastnorm.enable` has turned on, and their calls in this process."""
    if model is None:
        return Report(tuple(_aten_rows()), _C.refused_gangs())
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            for node, (function, note) in module.meta.get(NOTES, {}).items():
                place = f"{name}.{node}" if name else node
                rows.append(Row(place, function, "served" if note.startswith("fused") else "left", note))
        if isinstance(module, modules.Norm):
            refusal = _why_unserved(module)
            status: Literal["served", "left"] = "left" if refusal else "served"
            reason = refusal or _kernels(module, _device(module, model))
        elif isinstance(module, ImageNormalize):
            refusal = module.why_unserved()
            status, reason = "left" if refusal else "served", refusal or _device_kernels(_device(module, model))
        elif _is_norm(module) and "parametrizations" not in name.split("."):
            status, reason = "left", why_not_converted(module) or "fastnorm.convert(model) would serve it"
        else:
            continue
        reason += _about_fusion(module)
        counts = (vars(module).get(key, 0) for key in modules.CALL_COUNTS)
        rows.append(Row(name, _class_name(module), status, reason, *counts))
    return Report(tuple(rows), _C.refused_gangs())


def _aten_rows() -> Iterator[Row]:
    for norm, device, on, served, left in _C.aten_switches():
        if device not in ops.DEVICES:
            continue
        reasons = "; ".join(f"left {count}: {reason_of(text)}" for text, count in left.items())
        why = _device_kernels(torch.device(device)) if on else "fastnorm.enable() would serve it"
        status: Literal["served", "left"] = "served" if on else "left"
        yield Row(norm, device, status, "; ".join(filter(None, (why, reasons))), served, sum(left.values()))


def explain(x: Tensor, module: nn.Module, residual: Tensor | None = None) -> str:
    """Whether the kernels serve `module(x, residual)`, and which; or why torch's operators do.

    Makes the call, without gradients, on a copy of the running statistics: the answer is what happens. A SyncBatchNorm
    makes it alone, so that one rank may ask. Arguments that no norm takes are an answer too ("torch: ..."): what torch
    would raise of them is not raised. What is no refusal is: a kernel's RuntimeError, or what a mode or a property of
    the module's own raises.
    """
    if isinstance(module, ImageNormalize):
        refusal = module.why_unserved()
        return f"torch: {refusal}" if refusal else f"fastnorm: {_device_kernels(x.device)}"
    if not isinstance(module, modules.Norm):
        reason = why_not_converted(module) or "fastnorm.convert would serve it"
        return f"torch: {reason}"
    if (refusal := _why_unserved(module)) is not None:
        return f"torch: {refusal}"
    trial = object.__new__(type(module))  # copy.copy refuses parametrized modules
    trial.__dict__ = vars(module).copy()
    trial._buffers = module._buffers.copy()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if isinstance(statistic := getattr(module, name, None), Tensor):
            place = vars(trial) if name in vars(trial) else trial._buffers
            place[name] = statistic.clone()
    if isinstance(module, nn.SyncBatchNorm) and torch.distributed.is_available():
        vars(trial)["process_group"] = torch.distributed.GroupMember.NON_GROUP_MEMBER
    if carries_metadata(x):
        x = x.as_subclass(Tensor)
    try:
        with torch.no_grad():
            activation, param = trial._epilogue()
            trial._fused(entry_for(x), x, residual, activation_code(activation), param)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and not is_refusal(error):
            raise
        return f"torch: {reason_of(error)}"
    return f"fastnorm: {_kernels(module, x.device)}"


def _device(*owners: nn.Module) -> torch.device:
    """That of the first parameter or buffer."""
    tensors = (tensor for owner in owners for tensor in (*owner.parameters(), *owner.buffers()))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _kernels(module: modules.Norm, device: torch.device) -> str:
    """Whose kernels serve `module` on `device`."""
    description = _device_kernels(device)
    activation, _ = module._epilogue()
    return description if activation is None else f"{description}, {activation} fused"


def _device_kernels(device: torch.device) -> str:
    if device.type == "cuda":
        return "cuda sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return f"cpu {_C.cpu_capability()}"


def _about_fusion(module: nn.Module) -> str:
    """What `fastnorm.fuse` has done with a norm, or why nothing."""
    if not is_norm(module):
        return ""
    if (fusion := fusion_of(module)) is not None:
        return f"; fused with {fusion.text} from {fusion.place}"
    refusal = vars(module).get(REFUSAL)
    return "" if refusal is None else f"; not fused: {refusal}"


def _is_norm(module: nn.Module) -> bool:
    torch_norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    return isinstance(module, torch_norms) or "norm" in _class_name(module).lower()


def _class_name(module: nn.Module) -> str:
    return module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__


def _why_unserved(module: modules.Norm) -> str | None:
    """Why no call of this module can be served, as far as its tensors tell."""
    if type(module).forward is not modules.Norm.forward or has_own_forward(module):
        return "has a forward of its own"
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name == "num_batches_tracked":
            continue
        if tensor.device.type not in ops.DEVICES:
            return f"{name} is on {tensor.device}, and this build has kernels for {' and '.join(ops.DEVICES)}"
        if tensor.dtype not in ops.PARAMETER_DTYPES:
            return f"{name} has dtype {tensor.dtype}"
    return None
