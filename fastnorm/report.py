"""What fastnorm serves: `report` for a model, layer by layer; `explain` for one call."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import _C, modules, ops
from .autograd import require_plain
from .convert import why_left
from .functional import FAILURES, REFUSALS, why

__all__ = ["Report", "Row", "explain", "report"]


@dataclass(frozen=True)
class Row:
    """A norm layer of a model: name, class, "served" or "left", and by which kernels or why it is left."""

    name: str
    layer: str
    status: str
    why: str


@dataclass(frozen=True)
class Report:
    """The norm layers of a model, in the order of `model.named_modules()`. Iterate over it, or print it."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        served = sum(row.status == "served" for row in self.rows)
        summary = f"{served} of {len(self.rows)} norm layers served by fastnorm"
        if not self.rows:
            return summary
        table = [("layer", "class", "status", "why")]
        table += [(row.name or "(model)", row.layer, row.status, row.why) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        return "\n".join([*lines, summary])


def report(model: nn.Module) -> Report:
    """Which norm layers of `model` fastnorm serves, by which kernels, and why the others are left as they are."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, modules.Norm):
            refusal = _why_unserved(module)
            status, reason = ("left", refusal) if refusal else ("served", _kernels(module, _device(module, model)))
        elif _is_norm(module) and "parametrizations" not in name.split("."):
            status, reason = "left", why_left(module) or "fastnorm.convert(model) would serve it"
        else:
            continue
        rows.append(Row(name, _class_name(module), status, reason))
    return Report(tuple(rows))


def explain(x: Tensor, module: nn.Module, residual: Tensor | None = None) -> str:
    """Whether the kernels serve `module(x, residual)`, and which; or why torch's operators do.

    Makes the call, without gradients, on a copy of the running statistics: the answer is what happens.
    """
    if not isinstance(module, modules.Norm):
        reason = why_left(module) or "fastnorm.convert would serve it"
        return f"torch: {reason}"
    trial = copy.copy(module)
    trial._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    try:
        require_plain(x)
        with torch.no_grad():
            trial._serve(x, residual, ops.activation_code(module.activation))
    except FAILURES:
        raise
    except (*REFUSALS, ValueError) as refusal:
        return f"torch: {why(refusal)}"
    return f"fastnorm: {_kernels(module, x.device)}"


def _device(*owners: nn.Module) -> torch.device:
    """That of the first parameter or buffer."""
    tensors = (tensor for owner in owners for tensor in (*owner.parameters(), *owner.buffers()))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _kernels(module: modules.Norm, device: torch.device) -> str:
    """Whose kernels serve `module` on `device`."""
    description = f"cpu {_C.cpu_capability()}"
    if device.type == "cuda":
        description = "cuda sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return description if module.activation is None else f"{description}, {module.activation} fused"


def _is_norm(module: nn.Module) -> bool:
    torch_norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    return isinstance(module, torch_norms) or "norm" in _class_name(module).lower()


def _class_name(module: nn.Module) -> str:
    return module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__


def _why_unserved(module: modules.Norm) -> str | None:
    """Why no call of this module can be served, as far as its tensors tell."""
    if type(module).forward is not modules.Norm.forward or "forward" in vars(module):
        return "has a forward of its own"
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name == "num_batches_tracked":
            continue
        if tensor.device.type not in ops.DEVICES:
            return f"{name} is on {tensor.device}, and this build has kernels for {' and '.join(ops.DEVICES)}"
        if tensor.dtype not in ops.PARAMETER_DTYPES:
            return f"{name} has dtype {tensor.dtype}"
    return None
