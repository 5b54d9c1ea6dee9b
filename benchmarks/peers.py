"""The other contestants that `bench.py --vs` names: which are there, why the others are not, and their norms.

Each is used where it can be imported, on the rows that it serves. Nothing here is needed to run the benchmarks.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import onednn
from benchmarks.contestants import Norm, Row, refusing, torch_norm

Contestant = tuple[nn.Module, Norm]  # the parameters, and the call

#: What `--vs` takes. "eager" is torch.nn, in every run: all others are compared with it.
NAMES = ("eager", "compile", "onednn", "cudnn", "liger", "apex", "inplace_abn")
DEFAULT = {"cpu": ("eager", "onednn"), "cuda": ("eager", "cudnn")}


@dataclass(frozen=True)
class Peer:
    """A library with norms of its own.

    module: what to import; package: what to install, and what states the version; devices: those it has kernels for;
    build: its norm of a row, None where it does not serve it.
    """

    module: str
    package: str
    devices: tuple[str, ...]
    build: Callable[[Row], Contestant | None]


def cudnn_norm(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """A batch norm by cuDNN, even where torch.nn would choose another."""

    def run(x: Tensor) -> Tensor:
        running = norm.running_mean, norm.running_var
        return torch.cudnn_batch_norm(x, norm.weight, norm.bias, *running, norm.training, norm.momentum, norm.eps)[0]

    return run


def _cudnn(row: Row) -> Contestant | None:
    """Batch norm of float32 and float16: of bfloat16 torch's call takes no float32 parameters."""
    if not row.layer.norm.startswith("BatchNorm") or row.dtype not in ("float32", "float16"):
        return None
    module = row.layer.build(nn)
    return module, torch_norm(row, cudnn_norm(module))


def _liger(row: Row) -> Contestant | None:
    """Layer norm, and group norm of planar maps: its kernel takes them apart as if they were contiguous."""
    module = row.layer.build(nn)
    if isinstance(module, nn.LayerNorm):
        function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        return module, torch_norm(row, lambda x: function.apply(x, module.weight, module.bias, module.eps))
    if isinstance(module, nn.GroupNorm) and row.layout == "planar":
        function = importlib.import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction
        sizes = module.num_channels, module.num_groups, module.eps
        return module, torch_norm(row, lambda x: function.apply(x, module.weight, module.bias, *sizes))
    return None


def _apex(row: Row) -> Contestant | None:
    """Layer norm, and group norm of channels_last maps with SiLU inside."""
    if row.layer.norm == "LayerNorm":
        module = importlib.import_module("apex.normalization").FusedLayerNorm(*row.layer.args)
        return module, torch_norm(row, module)
    if row.layer.norm != "GroupNorm" or row.layout != "channels_last" or len(row.layer.shape) != 4:
        return None
    inside = row.activation == "silu" and not row.residual
    group_norm = importlib.import_module("apex.contrib.group_norm").GroupNorm
    module = group_norm(*row.layer.args, act="silu" if inside else "")
    return module, (lambda x, _: module(x)) if inside else torch_norm(row, module)


def _inplace_abn(row: Row) -> Contestant | None:
    """Batch norm with LeakyReLU or none. It overwrites its input, which other contestants need: its time has a copy."""
    if not row.layer.norm.startswith("BatchNorm") or row.residual or row.activation not in (None, "leaky_relu"):
        return None
    module = importlib.import_module("inplace_abn").InPlaceABN(*row.layer.args, activation=row.activation or "identity")
    return module, lambda x, _: module(x.clone())


PEERS = {
    "cudnn": Peer("torch.backends.cudnn", "torch", ("cuda",), _cudnn),
    "liger": Peer("liger_kernel", "liger-kernel", ("cuda",), _liger),
    "apex": Peer("apex", "apex", ("cuda",), _apex),
    "inplace_abn": Peer("inplace_abn", "inplace-abn", ("cpu", "cuda"), _inplace_abn),
}


def why_not_imported(module: str, package: str) -> str | None:
    """Why `module`, which `package` has, cannot be imported, or None."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return f"not installed (pip install {package})"
    except Exception as error:  # an extension built for another torch
        return f"cannot be imported: {type(error).__name__}: {error}"
    return None


def why_absent(name: str, device: str) -> str | None:
    """Why `name` cannot take part on `device`, or None."""
    if name in ("eager", "compile"):
        return None
    if name == "onednn":
        if device != "cpu":
            return "its norms run on a CPU"
        return None if onednn.version() else f"not installed (pip install {onednn.PACKAGE})"
    peer = PEERS[name]
    if device not in peer.devices:
        return f"its norms run on {' and '.join(peer.devices)}"
    if name == "cudnn":
        return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"
    return why_not_imported(peer.module, peer.package)


def built(name: str, row: Row) -> Contestant | None:
    """The norm by the library `name`, None where it does not serve the row. Where building it fails, its call does."""
    try:
        return PEERS[name].build(row)
    except Exception as error:
        return row.layer.build(nn), refusing(error)


def why_idle(name: str, rows: Iterable[Row]) -> str | None:
    """Why `name`, which is there, runs in none of `rows`, or None."""
    serves = onednn.serves if name == "onednn" else lambda row: built(name, row) is not None
    if name in ("eager", "compile") or any(map(serves, rows)):
        return None
    return "serves none of these rows"


def contestants(names: Sequence[str], row: Row) -> dict[str, Contestant]:
    """The norms of those of `names` that serve this row. Only names that are not absent."""
    found = ((name, built(name, row)) for name in names if name in PEERS)
    return {name: contestant for name, contestant in found if contestant is not None}


def version(name: str) -> str | None:
    """The version of the library behind `name`, None where it has none of its own."""
    if name == "onednn":
        return onednn.version()
    if name not in PEERS or name == "cudnn":
        return None
    try:
        return importlib.metadata.version(PEERS[name].package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
