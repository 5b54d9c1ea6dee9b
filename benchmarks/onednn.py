"""oneDNN's batch and layer norm as a contestant, by its C interface.

The library is that of the package `onednn-cpu-gomp`, which only benchmarks need: where it is not installed, or is of
another major version, there is no contestant. It serves what oneDNN has fast code for: batch norm of channels_last
tensors, with or without ReLU, and layer norm. Its time is that of the primitives and of allocating their outputs: no
autograd, no running statistics.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p

import torch
from torch import Tensor, nn

from benchmarks.contestants import Row, incoming

PACKAGE, LIBRARY, MAJOR = "onednn-cpu-gomp", "libdnnl.so.3", 3

# Constants of oneDNN 3 (dnnl_types.h).
CPU, IN_ORDER = 1, 1
TYPES = {torch.float32: 3, torch.bfloat16: 2}
FORWARD_TRAINING, FORWARD_INFERENCE, BACKWARD = 64, 96, 128
GLOBAL_STATS, SCALE, SHIFT, FUSED_RELU = 1, 2, 4, 8
WORKSPACE_MD = 135
ARGUMENTS = {
    "x": 1, "y": 17, "mean": 49, "var": 50, "weight": 51, "bias": 52, "workspace": 64,
    "dx": 129, "dy": 145, "dweight": 255, "dbias": 256,
}  # fmt: skip


class _Argument(ctypes.Structure):
    _fields_ = (("index", c_int), ("memory", c_void_p))


class OneDnnError(RuntimeError):
    """A function of oneDNN has failed."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where the package is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [str(file.locate()) for file in files if file.name == LIBRARY]
    try:
        return ctypes.CDLL(found[0]) if found else None
    except OSError:
        return None


def version() -> str | None:
    """The package's version, or None."""
    return importlib.metadata.version(PACKAGE) if library() else None


def serves(row: Row) -> bool:
    """Whether oneDNN can run this row."""
    if library() is None or row.residual or getattr(torch, row.dtype) not in TYPES:
        return False
    if row.layer.norm == "LayerNorm":
        return row.activation is None
    return row.layer.norm == "BatchNorm2d" and row.layout == "channels_last" and row.activation in (None, "relu")


def _call(name: str, *arguments: object) -> None:
    loaded = library()
    assert loaded is not None
    status = getattr(loaded, f"dnnl_{name}")(*arguments)
    if status != 0:
        raise OneDnnError(f"dnnl_{name} failed with status {status}")


def _create(name: str, *arguments: object) -> c_void_p:
    handle = c_void_p()
    _call(f"{name}_create", byref(handle), *arguments)
    return handle


@functools.cache
def _engine_and_stream() -> tuple[c_void_p, c_void_p]:
    engine = _create("engine", c_int(CPU), c_size_t(0))
    return engine, _create("stream", engine, c_uint(IN_ORDER))


def _describe(sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> c_void_p:
    array = c_int64 * len(sizes)
    handle = c_void_p()
    kind = c_int(TYPES[dtype])
    _call(
        "memory_desc_create_with_strides", byref(handle), c_int(len(sizes)), array(*sizes), kind, array(*strides)
    )  # fmt: skip
    return handle


class _Primitive:
    """One direction of a norm, and the memory of its arguments by name."""

    def __init__(self, descriptor: c_void_p, descriptions: dict[str, c_void_p]) -> None:
        self.engine, self.stream = _engine_and_stream()
        self.primitive = _create("primitive", descriptor)
        self.memory = {name: _create("memory", md, self.engine, c_void_p()) for name, md in descriptions.items()}
        self.arguments = (_Argument * len(self.memory))(
            *(_Argument(ARGUMENTS[name], memory) for name, memory in self.memory.items())
        )

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        for name, memory in self.memory.items():
            _call("memory_set_data_handle", memory, c_void_p(tensors[name].data_ptr()))
        _call("primitive_execute", self.primitive, self.stream, c_int(len(self.arguments)), self.arguments)
        _call("stream_wait", self.stream)


class OneDnnNorm:
    """The norm of a row on x: y = forward(x), then dx = backward(x, dy); the parameters' gradients beside it."""

    def __init__(self, row: Row, x: Tensor, training: bool) -> None:
        engine, _ = _engine_and_stream()
        self.layer = row.layer.norm == "LayerNorm"
        channels = x.shape[-1] if self.layer else x.shape[1]
        sets = x.shape[0] if self.layer else channels
        relu = row.activation == "relu"
        given = not training and not self.layer  # batch norm takes running statistics; layer norm takes its own
        flags = SCALE | SHIFT | (FUSED_RELU if relu else 0) | (GLOBAL_STATS if given else 0)
        self.tensors = {
            "mean": torch.zeros(sets), "var": torch.ones(sets),
            "weight": torch.ones(channels), "bias": torch.zeros(channels),
            "dweight": torch.empty(channels), "dbias": torch.empty(channels),
        }  # fmt: skip
        data = _describe(x.shape, x.stride(), x.dtype)
        vector = _describe((channels,), (1,), torch.float32)
        statistics = _describe((sets,), (1,), torch.float32)
        kind = "layer_normalization" if self.layer else "batch_normalization"
        shared = (statistics,) if self.layer else ()
        eps = c_float(1e-5)
        forward = _create(
            f"{kind}_forward_primitive_desc", engine, c_int(FORWARD_TRAINING if training else FORWARD_INFERENCE),
            data, data, *shared, eps, c_uint(flags), None,
        )  # fmt: skip
        described = {"x": data, "y": data, "weight": vector, "bias": vector}
        if training or given:
            described |= {"mean": statistics, "var": statistics}
        backward = {"dx": data, "dy": data, "x": data, "weight": vector, "dweight": vector, "dbias": vector}
        backward |= {"mean": statistics, "var": statistics}
        if self.layer:
            backward["bias"] = vector
        if relu and training:
            workspace = self._query(forward, WORKSPACE_MD)
            described["workspace"] = backward["workspace"] = workspace
            self.tensors["workspace"] = torch.empty(self._bytes(workspace), dtype=torch.uint8)
        self._forward = _Primitive(forward, described)
        if training:
            self._backward = _Primitive(
                _create(
                    f"{kind}_backward_primitive_desc", engine, c_int(BACKWARD),
                    data, data, data, *shared, eps, c_uint(flags), forward, None,
                ),
                backward,
            )  # fmt: skip

    @staticmethod
    def _query(descriptor: c_void_p, what: int) -> c_void_p:
        loaded = library()
        assert loaded is not None
        loaded.dnnl_primitive_desc_query_md.restype = c_void_p
        return c_void_p(loaded.dnnl_primitive_desc_query_md(descriptor, c_int(what), c_int(0)))

    @staticmethod
    def _bytes(description: c_void_p) -> int:
        loaded = library()
        assert loaded is not None
        loaded.dnnl_memory_desc_get_size.restype = c_size_t
        return int(loaded.dnnl_memory_desc_get_size(description))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        self._forward(self.tensors | {"x": x, "y": y})
        return y

    def backward(self, x: Tensor, dy: Tensor) -> Tensor:
        dx = torch.empty_like(x)
        self._backward(self.tensors | {"x": x, "dy": dy, "dx": dx})
        return dx


def mode_call(row: Row, mode: str, x: Tensor, module: nn.Module | None = None) -> Callable[[], object]:
    """One call in `mode`, as contestants.mode_call makes for the others. module: whose running statistics to take."""
    data = x.detach()
    norm = OneDnnNorm(row, data, mode != "eval")
    if mode == "eval" and isinstance(module, nn.BatchNorm2d):
        norm.tensors |= {"mean": module.running_mean.clone(), "var": module.running_var.clone()}
    if mode != "step":
        return lambda: norm.forward(data)
    dy = incoming(data)

    def step() -> Tensor:
        norm.forward(data)
        return norm.backward(data, dy)

    return step
