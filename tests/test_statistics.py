"""functional.moments over any dims, and functional.normalize: values in float64, derivatives, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from fastnorm import functional
from tests.common.cases import DTYPES, to_layout

pytestmark = pytest.mark.emulated

SHAPE = (3, 5, 4, 6)
INF = float("inf")
DIMS: tuple[Any, ...] = (
    None,
    0,
    -1,
    (1,),
    (0, 2, 3),
    (2, 3),
    (1, 2, 3),
    (0,),
    (0, 1, 2, 3),
    (0, 2),
    (1, 3),
    [-1, 0],
    (),
)


def exact_moments(x: Tensor, dim: Any, keepdim: bool, correction: float) -> tuple[Tensor, Tensor]:
    """By the definition, in float64."""
    reduced = (0, 2, 3) if dim is None else tuple(d % 4 for d in ([dim] if isinstance(dim, int) else dim))
    kept = [d for d in range(4) if d not in reduced]
    sets = x.double().permute(*kept, *reduced).reshape(*(x.shape[d] for d in kept), -1)
    mean = sets.mean(-1)
    var = (sets - mean[..., None]).square().sum(-1) / (sets.shape[-1] - correction)
    if keepdim:
        shape = [1 if d in reduced else n for d, n in enumerate(x.shape)]
        mean, var = mean.reshape(shape), var.reshape(shape)
    return mean, var


@pytest.mark.parametrize("layout", ["planar", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("dim", DIMS, ids=str)
def test_moments_over_any_dims(dim: Any, dtype: torch.dtype, layout: str, device: torch.device) -> None:
    x = to_layout((torch.randn(SHAPE) * 2 + 30).to(dtype), layout).to(device)
    expected_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for keepdim, correction in ((False, 0), (True, 0.5)):
        results = functional.moments(x, dim, keepdim, correction)
        for value, exact in zip(results, exact_moments(x, dim, keepdim, correction), strict=True):
            assert value.dtype == expected_dtype and value.shape == exact.shape
            torch.testing.assert_close(value, exact.to(expected_dtype), rtol=2e-6, atol=1e-30)


def test_moments_alias_nothing() -> None:
    """Over no dims the mean has x's values, in memory of its own."""
    x = torch.randn(2, 3)
    mean, _ = functional.moments(x, ())
    mean.zero_()
    assert x.count_nonzero() == 6


@pytest.mark.parametrize("correction", [0, 1, 2, 3])
def test_correction_as_in_torch(correction: int, recwarn: pytest.WarningsRecorder) -> None:
    """Down to no degree of freedom, where the variance is infinite, or NaN for equal values."""
    x = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    expected, mean = torch.var_mean(x, 1, correction=correction)
    ours = functional.moments(x, 1, correction=correction)
    torch.testing.assert_close(ours, (mean, expected), equal_nan=True)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(torch.var_mean(x, 1, correction=correction)[0].sum(), x)
    (of_ours,) = torch.autograd.grad(functional.moments(x, 1, correction=correction)[1].sum(), x)
    torch.testing.assert_close(of_ours, gradient, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)])
def test_empty_is_nan(shape: tuple[int, ...], recwarn: pytest.WarningsRecorder) -> None:
    for value in functional.moments(torch.zeros(shape)):
        assert value.shape == (3,) and bool(value.isnan().all())


def test_moments_of_a_scalar() -> None:
    for dim in ((), 0, -1):
        assert [v.item() for v in functional.moments(torch.tensor(3.0), dim)] == [3.0, 0.0]
    with pytest.raises(IndexError, match="dim has 1, expected -1 to 0"):
        functional.moments(torch.tensor(3.0), 1)


@pytest.mark.fallback(r"make_fx|transform")
@pytest.mark.not_emulated("graphs are made above the kernels")
def test_graphs_of_moments_and_normalize() -> None:
    """torch.fx takes each for a node; make_fx records torch's operators."""

    def centered(x: Tensor) -> Tensor:
        mean, var = functional.moments(x)
        return functional.normalize(x, mean, var)

    x = torch.randn(SHAPE)
    traced = torch.fx.symbolic_trace(centered)
    assert [node.op for node in traced.graph.nodes].count("call_function") == 4  # and two of the pair's items
    torch.testing.assert_close(traced(x), centered(x))
    made = make_fx(centered)(x)
    assert "fastnorm" not in made.code
    torch.testing.assert_close(made(x), centered(x))


@pytest.mark.parametrize("wants_grad", [False, True])
def test_normalize_by_infinite_statistics(wants_grad: bool, device: torch.device) -> None:
    """Values are those of the formula, whether mean and var want gradients or not."""
    mean = torch.tensor([0.0, 0.0, INF, -INF, 1.0], device=device)
    var = torch.tensor([INF, 1.0, 1.0, 1.0, 4.0], device=device)
    x = torch.full((2, 5, 3), 2.0, device=device)
    expected = (x - mean[:, None]) * var.rsqrt()[:, None]
    mean.requires_grad_(wants_grad), var.requires_grad_(wants_grad)
    y = functional.normalize(x, mean, var, eps=0.0)
    torch.testing.assert_close(y.detach(), expected)
    if wants_grad:
        finite = [0, 1, 4]
        for gradient in torch.autograd.grad(y[:, finite].sum(), (mean, var)):
            assert gradient[finite].isfinite().all()


@pytest.mark.fallback(r"dtype Long")
def test_moments_of_integers() -> None:
    mean, var = functional.moments(torch.arange(6), 0)
    assert (mean.item(), var.item()) == (2.5, pytest.approx(35 / 12))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"dim": 4}, IndexError, "dim has 4, expected -4 to 3"),
        ({"dim": (0, -4)}, ValueError, "twice"),
        ({"dim": "0"}, TypeError, "dim is '0', expected an integer"),
        ({"dim": 1.5}, TypeError, r"dim is 1\.5, expected an integer"),
        ({"correction": "1"}, TypeError, "correction must be a number, but got str"),
    ],
)
def test_moments_refuses(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.moments(torch.randn(SHAPE), **kwargs)


@pytest.mark.not_emulated("derivatives are formulas of torch's operators")
@pytest.mark.parametrize("dim", [None, (2,), (0,), (0, 1, 2), (0, 1), (0, 2)], ids=str)
def test_gradients_of_moments(dim: Any) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: functional.moments(x, dim, True, 1), x)
    assert gradgradcheck(lambda x: functional.moments(x, dim, False, 0), x)


@pytest.mark.parametrize("layout", ["planar", "channels_last"])
@pytest.mark.parametrize("which", ["mean", "var", "both"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_gradient_values_of_moments(dtype: torch.dtype, which: str, layout: str, device: torch.device) -> None:
    """dx of the kernel, which is not the formula that is differentiated again."""
    x = to_layout((torch.randn(SHAPE) + 3).to(dtype), layout).to(device).requires_grad_()
    exact = x.detach().double().requires_grad_()
    weights = torch.randn(2, 5, dtype=torch.float64, device=device)
    pick = {"mean": (1, 0), "var": (0, 1), "both": (1, 1)}[which]

    def loss(moments: tuple[Tensor, Tensor]) -> Tensor:
        return sum((w * m).sum() for w, m, used in zip(weights, moments, pick, strict=True) if used)  # type: ignore[return-value]

    (dx,) = torch.autograd.grad(loss(functional.moments(x)), x)
    (expected,) = torch.autograd.grad(loss(exact_moments(exact, None, False, 0)), exact)
    assert dx.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(dx.double(), expected, rtol=bound, atol=bound * float(expected.abs().max()))


@pytest.mark.not_emulated("compiles")
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("dim", [None, (1, 2, 3), (0, 2)], ids=str)
def test_compiled(dim: Any, correction: int) -> None:
    """One graph, forward and backward; training by moments and normalize, as in TensorFlow."""

    def f(x: Tensor, weight: Tensor) -> Tensor:
        mean, var = functional.moments(x, dim, keepdim=True, correction=correction)
        return functional.normalize(x, mean, var, weight).square().sum() + (x * mean).sin().sum()

    x, weight = torch.randn(SHAPE, requires_grad=True), torch.randn(5, requires_grad=True)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for run in (f, compiled):
        loss = run(x, weight)
        results = (loss, *torch.autograd.grad(loss, (x, weight)))
        if run is f:
            expected = results
    torch.testing.assert_close(results, expected)


@pytest.mark.fallback(r"torch.func|forward-mode")
def test_transforms() -> None:
    """vmap, jvp and grad of torch.func."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    each = [functional.moments(sample)[1] for sample in x]
    torch.testing.assert_close(torch.func.vmap(lambda t: functional.moments(t)[1])(x), torch.stack(each))
    tangent = torch.randn_like(x)
    expected = torch.func.jvp(lambda t: torch.var(t, (0, 2, 3), correction=0), (x,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(lambda t: functional.moments(t)[1], (x,), (tangent,)), expected)


# normalize


def statistics(shapes: tuple[tuple[int, ...] | None, ...], dtype: torch.dtype) -> list[Tensor | None]:
    made = [None if shape is None else torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    assert made[1] is not None
    made[1] = made[1].abs() + 0.5
    return made


def exact_normalize(x: Tensor, tensors: list[Tensor | None], eps: float) -> Tensor:
    channels = x.shape[1]
    wide = [
        None if t is None else t.double().view(channels, 1, 1) if t.shape == (channels,) else t.double()
        for t in tensors
    ]
    mean, var, weight, bias = wide
    y = (x.double() - mean) / (var + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


VECTOR, WIDE = (5,), (1, 5, 1, 1)
SHAPES = (
    (VECTOR, VECTOR, VECTOR, VECTOR),
    (VECTOR, VECTOR, None, None),
    (WIDE, WIDE, VECTOR, None),
    ((5, 1, 1), WIDE, None, VECTOR),
    ((3, 1, 1, 1), (3, 1, 1, 1), (5, 4, 6), (1, 6)),
    ((3, 5, 1, 1), (3, 5, 1, 1), VECTOR, VECTOR),
    ((), (), None, None),
    ((1,), (1,), VECTOR, (1,)),
)


@pytest.mark.parametrize("layout", ["planar", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_normalize(
    shapes: tuple[tuple[int, ...] | None, ...], dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    x = to_layout((torch.randn(SHAPE) * 3).to(dtype), layout).to(device)
    tensors = [None if t is None else t.to(device) for t in statistics(shapes, dtype)]
    for eps in (0.0, 1e-3):
        y = functional.normalize(x, *tensors, eps=eps)
        expected = exact_normalize(x, tensors, eps)
        assert y.dtype == dtype and y.shape == x.shape
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * 15)


def test_moments_and_normalize_are_a_norm(device: torch.device) -> None:
    """Batch norm in training, layer norm, instance norm: gradients too, through the statistics."""
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    dy = torch.randn(SHAPE, device=device)
    for dim, norm in (
        (None, lambda: functional.batch_norm(x, None, None, training=True)),
        ((1, 2, 3), lambda: functional.layer_norm(x, SHAPE[1:])),
        ((2, 3), lambda: functional.instance_norm(x)),
    ):
        y = functional.normalize(x, *functional.moments(x, dim, keepdim=True))
        torch.testing.assert_close(y, norm())
        torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(norm(), x, dy))


@pytest.mark.not_emulated("derivatives are formulas of torch's operators")
@pytest.mark.parametrize(
    "shapes", [((3,), (3,), (3,), (3,)), ((1, 3, 1), (3,), None, None), ((2, 1, 1), (2, 1, 1), (3,), (1, 4))]
)
def test_gradients_of_normalize(shapes: tuple[tuple[int, ...] | None, ...]) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    tensors = [None if t is None else t.requires_grad_() for t in statistics(shapes, torch.float64)]
    given = [t for t in tensors if t is not None]

    def f(x: Tensor, *given: Tensor) -> Tensor:
        left = iter(given)
        return functional.normalize(x, *(None if t is None else next(left) for t in tensors), eps=1e-2)  # type: ignore[arg-type]

    assert gradcheck(f, (x, *given))
    assert gradgradcheck(f, (x, *given))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.arange(6).view(2, 3)}, TypeError, "x has dtype torch.int64"),
        ({"x": None}, TypeError, "x must be a Tensor, but got NoneType"),
        ({"mean": 0.5}, TypeError, "mean must be a Tensor, but got float"),
        ({"var": None}, TypeError, "var must be a Tensor, but got NoneType"),
        ({"bias": torch.zeros(5, dtype=torch.complex64)}, TypeError, "bias has dtype torch.complex64"),
        ({"eps": -1e-5}, ValueError, "eps is -1e-05, expected 0 or more"),
        ({"mean": torch.zeros(6)}, ValueError, r"\(6,\), expected \(5,\) or one that .* dimension 1$"),
        ({"var": torch.ones(3, 1, 1)}, ValueError, r"var has shape \(3, 1, 1\)"),
        ({"weight": torch.ones(1, 1, 5, 1, 1)}, ValueError, "weight has shape"),
        ({"bias": torch.ones(2)}, ValueError, "bias has shape"),
    ],
)
def test_normalize_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """A vector is dimension 1's, though one of 6 would broadcast against the last."""
    kwargs: dict[str, Any] = {"x": torch.randn(SHAPE), "mean": torch.zeros(5), "var": torch.ones(5)}
    with pytest.raises(error, match=message):
        functional.normalize(**kwargs | change)


def test_moments_of_no_real_number() -> None:
    with pytest.raises(TypeError, match=r"x has dtype torch\.complex64, expected a real one"):
        functional.moments(torch.ones(2, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="correction is nan, expected a finite number"):
        functional.moments(torch.ones(2, 3), correction=float("nan"))
