"""fastnorm.enable: torch's own norms on our kernels, with nothing else changed.

test_enable_contexts.py: under torch.func, autocast, fake tensors. test_enable_switches.py: the switches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastnorm
from fastnorm import _C
from tests.common.aten_calls import CALLS, LAYOUTS, Counted, described, make_x, outcome, row_of
from tests.common.numerics import assert_alike
from tests.test_torch_suites import dtype_name

aten = torch.ops.aten
CPU = torch.device("cpu")
DTYPES = [(torch.float32,) * 2, (torch.float64,) * 2]
DTYPES += [(half, p) for half in (torch.bfloat16, torch.float16) for p in (half, torch.float32)]


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    yield
    assert not any(on for _, _, on, *_ in _C.aten_switches()), "a test has left a norm enabled"


def served(norm: str, device: str = "cpu") -> int:
    return row_of(norm, device).served_calls


# ---- outputs are aten's: dtypes, shapes, strides, and values near enough ----


OPERATORS = {norm: {f"native_{norm}", f"native_{norm}_backward"} for norm in CALLS}
OPERATORS["batch_norm"] |= {
    f"_native_batch_norm_legit{suffix}" for suffix in ("", "_no_training", "_functional")
}  # no_stats is an overload
#: Where torch's backward sums in the type of the elements, ours in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def skip_what_torch_cannot(norm: str, x: Tensor, p: torch.dtype) -> None:
    if x.is_cuda and x.numel() == 0:
        pytest.skip("torch's CUDA kernels leave statistics of no elements as the memory was")
    if x.is_cuda and x.dtype != p and norm != "batch_norm":
        pytest.skip("torch's CUDA kernels want parameters of x's dtype")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "p"), DTYPES, ids=lambda t: dtype_name(t))
@pytest.mark.parametrize("norm", CALLS)
def test_outputs_are_atens(norm: str, dtype: torch.dtype, p: torch.dtype, layout: str, device: torch.device) -> None:
    x = make_x(layout, dtype, device)
    skip_what_torch_cannot(norm, x, p)
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


@pytest.mark.parametrize("norm", CALLS)
def test_every_ordinary_call_is_served(norm: str, device: torch.device) -> None:
    """The test above would pass if all was left to torch, or all but one of the operators."""
    calls = CALLS[norm](make_x("planar", torch.float32, device), torch.float32)
    ordinary = [function for name, function in calls.items() if name not in ("5 groups", "wrong shape")]
    with fastnorm.enabled(norm), Counted() as counted:
        for function in ordinary:
            function()
    assert not +counted.left, fastnorm.report()
    backwards = sum(name.startswith("backward") for name in calls)
    assert counted.served[f"native_{norm}_backward"] == backwards >= 9
    # Every backward call makes a forward one; "legit" and its like are operators of their own.
    assert counted.served.total() == len(ordinary) + backwards
    assert set(+counted.served) == OPERATORS[norm]


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


def trained(
    run: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda net: net, device: torch.device = CPU
) -> list[Tensor]:
    """Outputs, gradients and state of two steps and an evaluation of the net that `run` makes of it."""
    torch.manual_seed(0)
    net, x = Net().to(device), torch.randn(4, 3, 9, 9).to(device)
    results = []
    for _ in range(2):
        y = run(net)(x)
        y.square().mean().backward()
        results += [y.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]
    results.append(run(net.eval())(x).detach())
    return [*results, *net.state_dict().values()]


def test_a_net_trains_and_evaluates_alike(device: torch.device) -> None:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):  # the convolution, on a GPU
        expected = trained(device=device)
        before = [served(norm, device.type) for norm in CALLS]
        with fastnorm.enabled():
            actual = trained(device=device)
    # Batch and instance norm: two forwards and backwards and an evaluation each. The layer norms are two as well.
    assert [served(norm, device.type) - b for norm, b in zip(CALLS, before, strict=True)] == [10, 5, 10]
    assert_alike(actual, expected)


def test_autograds_graph_is_torchs(device: torch.device) -> None:
    x = torch.randn(2, 8, 3, 3, device=device, requires_grad=True)
    graphs = []
    for context in (contextlib.nullcontext(), fastnorm.enabled()):
        with context:
            y = nn.BatchNorm2d(8, device=device)(x)
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
