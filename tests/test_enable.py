"""fastnorm.enable: torch's own norms on our kernels, with nothing else changed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastnorm
from fastnorm import _C
from tests.common.numerics import assert_alike
from tests.test_torch_suites import dtype_name

aten = torch.ops.aten
ON_CPU = [(torch.float32,) * 2, (torch.float64,) * 2]
ON_CPU += [(half, p) for half in (torch.bfloat16, torch.float16) for p in (half, torch.float32)]


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    yield
    assert not any(on for _, _, on, *_ in _C.aten_switches()), "a test has left a norm enabled"


def row_of(norm: str) -> fastnorm.Row:
    return next(row for row in fastnorm.report() if (row.name, row.layer) == (norm, "cpu"))


def served(norm: str) -> int:
    return row_of(norm).served_calls


def left(norm: str) -> int:
    return row_of(norm).left_calls


# ---- outputs are aten's: dtypes, shapes, strides, and values near enough ----


def layouts() -> dict[str, Callable[[torch.dtype], Tensor]]:
    def new(*shape: int) -> Callable[[torch.dtype], Tensor]:
        return lambda dtype: torch.randn(*shape).to(dtype)

    return {
        "planar": new(3, 6, 5, 7),
        "channels_last": lambda dtype: new(3, 6, 5, 7)(dtype).to(memory_format=torch.channels_last),
        "3d": lambda dtype: new(2, 6, 3, 4, 5)(dtype).to(memory_format=torch.channels_last_3d),
        "1d": new(3, 6, 11),
        "(N, C)": new(9, 24),
        "strided": lambda dtype: new(3, 12, 5, 14)(dtype)[:, ::2, :, ::2],
        "permuted": lambda dtype: new(5, 7, 3, 6)(dtype).permute(2, 3, 0, 1),
        "no samples": new(0, 6, 5, 7),
        "no positions": new(3, 6, 0, 7),
        "one value": new(1, 6, 1, 1),
    }


def described(t: Any) -> Any:
    return (t.dtype, tuple(t.shape), t.stride()) if isinstance(t, Tensor) else t


def outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


def batch_calls(x: Tensor, p: torch.dtype) -> dict[str, Callable[[], Any]]:
    channels = x.shape[1]
    torch.manual_seed(1)
    w, b, mean = (torch.randn(channels).to(p) for _ in range(3))
    var, dy = torch.rand(channels).to(p) + 0.5, torch.randn(x.shape).to(x.dtype)

    def forward(training: bool, affine: bool, tracked: bool) -> Any:
        m, v = (mean.clone(), var.clone()) if tracked else (None, None)
        return *aten.native_batch_norm(x, *((w, b) if affine else (None, None)), m, v, training, 0.1, 1e-5), m, v

    def backward(training: bool, mask: list[bool], weight: Tensor | None = w) -> Any:
        _, m, r, *_ = forward(training, True, True)
        return aten.native_batch_norm_backward(dy, x, weight, mean, var, m, r, training, 1e-5, mask)

    calls: dict[str, Callable[[], Any]] = {}
    for training, affine, tracked in itertools.product((True, False), repeat=3):
        if not training and not tracked:
            continue  # torch's kernel reads a null pointer
        calls[f"forward {training=} {affine=} {tracked=}"] = lambda a=(training, affine, tracked): forward(*a)
    for training, mask in itertools.product((True, False), itertools.product((True, False), repeat=3)):
        if x.numel() == 0:
            continue  # torch's kernel divides by 0
        calls[f"backward {training=} {mask=}"] = lambda a=(training, list(mask)): backward(*a)
    if x.numel() > 0:
        calls["backward, no weight"] = lambda: backward(True, [True, False, False], None)
    calls["legit"] = lambda: aten._native_batch_norm_legit(x, w, b, mean.clone(), var.clone(), True, 0.1, 1e-5)
    calls["legit, no stats"] = lambda: aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-5)
    calls["no training"] = lambda: aten._native_batch_norm_legit_no_training(x, w, b, mean, var, 0.1, 1e-5)
    calls["functional"] = lambda: aten._native_batch_norm_legit_functional(x, w, b, mean, var, True, 0.1, 1e-5)
    return calls


def group_calls(x: Tensor, p: torch.dtype) -> dict[str, Callable[[], Any]]:
    n, c, *spatial = x.shape
    torch.manual_seed(1)
    w, b = torch.randn(c).to(p), torch.randn(c).to(p)
    dy = torch.randn_like(x)  # torch's kernel takes dy to lie in memory as x does
    sizes = (n, c, torch.Size(spatial).numel())

    def forward(groups: int, *affine: Tensor | None) -> Any:
        return aten.native_group_norm(x, *affine, *sizes, groups, 1e-5)

    def backward(groups: int, mask: list[bool], weight: Tensor | None = w) -> Any:
        _, m, r = forward(groups, w, b)
        return aten.native_group_norm_backward(dy, x, m, r, weight, *sizes, groups, mask)

    calls: dict[str, Callable[[], Any]] = {}
    for groups in (1, 3, 6):
        calls[f"forward {groups=}"] = lambda g=groups: forward(g, w, b)
        for mask in itertools.product((True, False), repeat=3):
            if not mask[0] and not x.is_contiguous():
                continue  # torch's kernel writes dx through a null pointer
            calls[f"backward {groups=} {mask=}"] = lambda a=(groups, list(mask)): backward(*a)
    calls["forward, no parameters"] = lambda: forward(2, None, None)
    calls["backward, no weight"] = lambda: backward(2, [True, False, False], None)
    calls["5 groups"] = lambda: forward(5, w, b)
    return calls


def layer_calls(x: Tensor, p: torch.dtype) -> dict[str, Callable[[], Any]]:
    calls: dict[str, Callable[[], Any]] = {}
    for dims in range(1, x.dim()):
        shape = list(x.shape[-dims:])
        torch.manual_seed(1)
        w, b, dy = torch.randn(shape).to(p), torch.randn(shape).to(p), torch.randn(x.shape).to(x.dtype)

        def forward(shape: list[int] = shape, w: Tensor = w, b: Tensor = b) -> Any:
            return aten.native_layer_norm(x, shape, w, b, 1e-5)

        def backward(mask: list[bool], shape: list[int] = shape, w: Tensor = w, b: Tensor = b, dy: Tensor = dy) -> Any:
            _, m, r = aten.native_layer_norm(x, shape, w, b, 1e-5)
            return aten.native_layer_norm_backward(dy, x, shape, m, r, w, b, mask)

        calls[f"forward {dims=}"] = forward
        calls[f"forward {dims=}, no bias"] = lambda f=forward: f(b=None)
        for mask in itertools.product((True, False), repeat=3):
            calls[f"backward {dims=} {mask=}"] = lambda f=backward, m=list(mask): f(m)
    calls["wrong shape"] = lambda: aten.native_layer_norm(x, [4], None, None, 1e-5)
    return calls


CALLS = {"batch_norm": batch_calls, "group_norm": group_calls, "layer_norm": layer_calls}
#: Where torch's backward sums in the type of the elements, ours in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize(("dtype", "p"), ON_CPU, ids=lambda t: dtype_name(t))
@pytest.mark.parametrize("norm", CALLS)
def test_outputs_are_atens(norm: str, dtype: torch.dtype, p: torch.dtype, layout: str) -> None:
    x = layouts()[layout](dtype)
    for name, function in CALLS[norm](x, p).items():
        expected = outcome(function)
        with fastnorm.enabled(norm):
            actual = outcome(function)
        if not isinstance(expected[0], Tensor | None):
            assert actual == expected, name
            continue
        assert list(map(described, actual)) == list(map(described, expected)), name
        for a, e in zip(actual, expected, strict=True):
            if e is not None and e.numel() > 0:
                tolerance = TOLERANCE[dtype] * max(1.0, e.double().nan_to_num(0, 0, 0).abs().max().item())
                torch.testing.assert_close(a.double(), e.double(), rtol=0, atol=tolerance, equal_nan=True, msg=name)


def test_every_ordinary_call_is_served() -> None:
    """The test above would pass if all was left to torch."""
    for norm, calls in CALLS.items():
        before = served(norm), left(norm)
        with fastnorm.enabled(norm):
            for name, function in calls(torch.randn(3, 6, 5, 7), torch.float32).items():
                if name not in ("5 groups", "wrong shape"):
                    function()
        assert served(norm) - before[0] > 20
        assert left(norm) == before[1], fastnorm.report()


# ---- what else people do with a norm ----


class Net(nn.Module):
    """All three norms, by module, by function, and by a subclass of the user's."""

    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.batch, self.group, self.layer = nn.BatchNorm2d(8), nn.GroupNorm(2, 8), Net.LayerNorm2d(8)
        self.instance = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        # The group norm comes first: of a channels_last x torch 2.14's meta function makes contiguous outputs, its CPU
        # kernel channels_last ones, and a compiled net of torch's own fails at the next view of them.
        y = self.layer(torch.relu(self.batch(F.silu(self.group(self.conv(x))))))
        return F.layer_norm(self.instance(y), y.shape[-1:])


def trained(run: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda net: net) -> list[Tensor]:
    """Outputs, gradients and state of two steps and an evaluation of the net that `run` makes of it."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 3, 9, 9)
    results = []
    for _ in range(2):
        y = run(net)(x)
        y.square().mean().backward()
        results += [y.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]
    results.append(run(net.eval())(x).detach())
    return [*results, *net.state_dict().values()]


def test_a_net_trains_and_evaluates_alike() -> None:
    expected = trained()
    before = [served(norm) for norm in CALLS]
    with fastnorm.enabled():
        actual = trained()
    # Batch and instance norm: two forwards and backwards and an evaluation each. The layer norms are two as well.
    assert [served(norm) - b for norm, b in zip(CALLS, before, strict=True)] == [10, 5, 10]
    assert_alike(actual, expected)


def test_autograds_graph_is_torchs() -> None:
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    graphs = []
    for context in (contextlib.nullcontext(), fastnorm.enabled()):
        with context:
            y = nn.BatchNorm2d(8)(x)
        node = y.grad_fn
        assert node is not None
        saved = {name: described(getattr(node, name)) for name in dir(node) if name.startswith("_saved_")}
        graphs.append((node.name(), [next_.name() for next_, _ in node.next_functions if next_], saved))
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_torch_compile(compiler: str) -> None:
    def run(net: nn.Module) -> Callable[[Tensor], Tensor]:
        return torch.compile(net, backend=compiler, fullgraph=True)

    expected = trained()
    with fastnorm.enabled():
        assert_alike(trained(run), expected)


def test_export_and_make_fx_record_torchs_operators() -> None:
    net, x = Net().eval(), torch.randn(2, 3, 9, 9)
    graphs = []
    for context in (contextlib.nullcontext(), fastnorm.enabled()):
        with context:
            exported = torch.export.export(net, (x,))
            traced = make_fx(torch.func.functionalize(net))(x)
            assert_alike(exported.module()(x), net(x))
        graphs.append([str(node.target) for graph in (exported.graph, traced.graph) for node in graph.nodes])
    assert graphs[0] == graphs[1]


def test_functorch_is_served() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(8), torch.randn(5, 3, 8)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return F.layer_norm(x, (8,), w).square().sum()

    def everything() -> list[Tensor]:
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x)
        forward = torch.func.jvp(lambda w: loss(w, x), (w,), (torch.ones_like(w),))
        return [per_sample, *forward, torch.func.hessian(lambda w: loss(w, x))(w)]

    expected, before = everything(), served("layer_norm")
    with fastnorm.enabled():
        actual = everything()
    assert served("layer_norm") - before >= 3
    assert_alike(actual, expected)


def test_fake_and_meta_tensors() -> None:
    def described_outputs() -> list[object]:
        y = nn.BatchNorm2d(4, device="meta")(torch.empty(2, 4, 3, 3, device="meta"))
        with FakeTensorMode():
            z = nn.GroupNorm(2, 4)(torch.empty(2, 4, 3, 3).to(memory_format=torch.channels_last))
        return [described(y), described(z)]

    expected = described_outputs()
    with fastnorm.enabled():
        assert described_outputs() == expected


def test_autocast_and_inference_mode() -> None:
    net, x = Net().eval(), torch.randn(2, 3, 9, 9)
    for context in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.no_grad()):
        with context:
            expected = net(x)
            with fastnorm.enabled():
                actual = net(x)
        assert described(actual) == described(expected)
        assert_alike(actual.float(), expected.float()) if actual.dtype == torch.float32 else None


def test_other_kinds_of_tensors_are_torchs() -> None:
    x, nested = torch.randn(2, 3).to_mkldnn(), torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    for function in (lambda: F.batch_norm(x, torch.zeros(3), torch.ones(3)), lambda: F.layer_norm(nested, (4,))):
        expected = outcome(function)
        with fastnorm.enabled():
            actual = outcome(function)
        assert type(actual) is type(expected)


def test_a_reserve_that_is_ours_is_answered_by_ours() -> None:
    """cuDNN's backward wants what its forward has reserved. Ours reserves nothing, and answers though switched off."""
    x, w = torch.randn(3, 4, 5), torch.randn(4)
    dy = torch.randn_like(x)
    with fastnorm.enabled():
        _, mean, rstd, reserve = aten.cudnn_batch_norm(x, w, w, None, None, True, 0.1, 1e-5)
    assert reserve.shape == (0,)
    ours = aten.cudnn_batch_norm_backward(x, dy, w, None, None, mean, rstd, 1e-5, reserve)
    torchs = aten.native_batch_norm_backward(dy, x, w, None, None, mean, rstd, True, 1e-5, [True] * 3)
    assert_alike(ours, torchs)
