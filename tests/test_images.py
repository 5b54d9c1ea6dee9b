"""ImageNormalize: values, layouts, dtypes and gradients against the formula in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fastnorm
from fastnorm import images
from tests.conftest import Backend

pytestmark = pytest.mark.emulated

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INPUTS = (torch.uint8, torch.float32, torch.float64, torch.bfloat16, torch.float16)
OUTPUTS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMATS = {"planar": torch.contiguous_format, "channels_last": torch.channels_last}
#: 7x9: no pack divides it. 20x33: several tiles on the CPU, packs of 4 on a GPU.
SIZES = ((7, 9), (20, 33), (1, 1))


def batch(dtype: torch.dtype, shape: tuple[int, ...], layout: str = "planar") -> Tensor:
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    x = x if dtype == torch.uint8 else (x.double() / 255).to(dtype)
    return x.to(memory_format=FORMATS[layout])


def exact(x: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    values = x.double() / 255 if x.dtype == torch.uint8 else x.double()
    return (values - values.new_tensor(mean).view(-1, 1, 1)) / values.new_tensor(std).view(-1, 1, 1)


@pytest.mark.parametrize("to", OUTPUTS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("dtype", INPUTS, ids=lambda d: str(d)[6:])
def test_values(dtype: torch.dtype, to: torch.dtype, device: torch.device) -> None:
    for (h, w), x_layout, y_layout in itertools.product(SIZES, FORMATS, FORMATS):
        x = batch(dtype, (3, 3, h, w), x_layout).to(device)
        y = fastnorm.ImageNormalize(MEAN, STD, dtype=to, memory_format=FORMATS[y_layout])(x)
        assert (y.dtype, y.shape) == (to, x.shape)
        assert y.is_contiguous(memory_format=FORMATS[y_layout])
        # Half an ulp of the result, and rounding of terms of the order of mean / std = 2.
        eps = torch.finfo(torch.float64 if torch.float64 in (dtype, to) else torch.float32).eps
        error = (y.double() - exact(x)).abs()
        assert (error <= 0.5 * torch.finfo(to).eps * exact(x).abs().clamp_min(1e-3) + 4 * eps * 2.7).all()


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 32])
def test_numbers_of_channels(channels: int, device: torch.device) -> None:
    mean = tuple(i / channels for i in range(channels))
    std = tuple(0.5 + i / channels for i in range(channels))
    for x_layout, y_layout in itertools.product(FORMATS, FORMATS):
        x = batch(torch.uint8, (2, channels, 12, 130), x_layout).to(device)
        y = fastnorm.ImageNormalize(mean, std, memory_format=FORMATS[y_layout])(x)
        torch.testing.assert_close(y.double(), exact(x, mean, std), rtol=0, atol=2e-6)


def test_strides_and_single_images(device: torch.device) -> None:
    norm = fastnorm.ImageNormalize(MEAN, STD)
    hwc = torch.randint(0, 256, (2, 6, 8, 3), dtype=torch.uint8, device=device)
    interleaved = hwc.permute(0, 3, 1, 2)
    assert norm(interleaved).is_contiguous(memory_format=torch.channels_last), "the input's format is preserved"
    one = norm(interleaved[0])
    assert torch.equal(one, norm(interleaved)[0])
    assert one.stride() == (interleaved[0] * 1.0).stride()
    assert norm(interleaved[:1]).stride() == norm(interleaved[0][None]).stride() == (144, 1, 24, 3)
    every_other = batch(torch.float32, (2, 3, 12, 16)).to(device)[:, :, ::2, ::2]
    torch.testing.assert_close(norm(every_other).double(), exact(every_other), rtol=0, atol=2e-6)
    assert norm(torch.empty(0, 3, 4, 4, dtype=torch.uint8, device=device)).shape == (0, 3, 4, 4)


def test_special_values(device: torch.device) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], device=device).expand(1, 3, 1, 4)
    for to in OUTPUTS:
        y = fastnorm.ImageNormalize(MEAN, STD, dtype=to)(x)
        assert torch.equal(y.double().isnan(), x.isnan())
        assert torch.equal(y.double().isinf(), x.isinf())


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_gradient_has_the_inputs_dtype_and_format(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    x = batch(dtype, (2, 3, 6, 5), layout).to(device).requires_grad_()
    norm = fastnorm.ImageNormalize(MEAN, STD, dtype=torch.float32, memory_format=torch.channels_last)
    dy = torch.randn(2, 3, 6, 5, device=device)
    (dx,) = torch.autograd.grad(norm(x), x, dy)
    assert dx.dtype == dtype
    assert dx.is_contiguous(memory_format=FORMATS[layout])
    expected = dy.double() / dy.new_tensor(STD).double().view(-1, 1, 1)
    torch.testing.assert_close(dx.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_gradcheck(device: torch.device) -> None:
    x = torch.rand(2, 2, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    norm = fastnorm.ImageNormalize((0.1, 0.2), (0.5, 2.0), memory_format=torch.channels_last)
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradgradcheck(norm, x)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="mean and std have 2 and 3 numbers"):
        fastnorm.ImageNormalize((0.1, 0.2), STD)
    with pytest.raises(ValueError, match=r"std has 0\.0, expected finite numbers of at least 1e-30"):
        fastnorm.ImageNormalize((0.1, 0.2), (1, 0))
    with pytest.raises(TypeError, match=r"dtype is torch\.int8, expected None or one of torch\.float32"):
        fastnorm.ImageNormalize(MEAN, STD, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"memory_format is torch\.channels_last_3d"):
        fastnorm.ImageNormalize(MEAN, STD, memory_format=torch.channels_last_3d)
    with pytest.raises(TypeError, match="mean must be a number for each channel, but got float"):
        fastnorm.ImageNormalize(0.5, STD)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mean has nan"):
        fastnorm.ImageNormalize((0.5, float("nan"), 0.5), STD)
    norm = fastnorm.ImageNormalize(MEAN, STD)
    with pytest.raises(TypeError, match="images must be a Tensor, but got list"):
        norm([1, 2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"images have dtype torch\.int64, expected uint8"):
        norm(torch.zeros(3, 4, 4, dtype=torch.int64))
    for shape in ((4, 4), (2, 4, 5, 5), (1, 2, 3, 4, 5)):
        with pytest.raises(ValueError, match=r"images have shape .* with C = 3"):
            norm(torch.zeros(shape))


def test_the_operator_refuses_before_it_allocates(device: torch.device) -> None:
    x, two = batch(torch.uint8, (2, 3, 4, 4)).to(device), [1.0, 2.0]
    numbers = [*two, 3.0]
    for args, reason in (
        ((x[0], numbers, numbers, torch.float32, torch.contiguous_format), r"x has shape \[3, 4, 4\]"),
        ((x, two, numbers, torch.float32, torch.contiguous_format), "offset and scale have 2 and 3 numbers"),
        ((x.long(), numbers, numbers, torch.float32, torch.contiguous_format), "x has dtype Long"),
        ((x, numbers, numbers, torch.int32, torch.contiguous_format), "the output has dtype Int"),
        ((x, numbers, numbers, torch.float32, torch.channels_last_3d), "memory_format is"),
    ):
        with pytest.raises((NotImplementedError, RuntimeError), match=reason):
            images.normalize_images(*args)


@pytest.mark.fallback(r"x has 33 channels|transform")
def test_what_is_left_to_torch(backend: Backend) -> None:
    if backend.name != "cpu":
        pytest.skip("the answer is torch's on every backend")
    many = batch(torch.uint8, (2, 33, 4, 4), "channels_last")
    y = fastnorm.ImageNormalize((0.5,) * 33, (0.25,) * 33)(many)
    assert y.is_contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(fastnorm.ImageNormalize((0.5,) * 33, (0.25,) * 33), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(many), y)
    torch.testing.assert_close(y.double(), exact(many, (0.5,) * 33, (0.25,) * 33), rtol=0, atol=2e-6)
    x = batch(torch.float32, (4, 2, 3, 5, 5))
    norm = fastnorm.ImageNormalize(MEAN, STD)
    each = torch.func.vmap(norm)(x)
    torch.testing.assert_close(each, torch.stack([norm(one) for one in x]))


def test_values_far_from_zero(device: torch.device) -> None:
    """Of a scanner: the mean is taken away before anything is rounded by it."""
    x = 30000 + torch.randn(2, 1, 9, 8, device=device) * 7
    y = fastnorm.ImageNormalize((30000.0,), (7.0,))(x)
    torch.testing.assert_close(y.double(), exact(x, (30000.0,), (7.0,)), rtol=2e-7, atol=1e-9)


@pytest.mark.fallback(r"make_fx")
def test_graphs(backend: Backend) -> None:
    """torch.fx takes it for a node; make_fx records torch's operators."""
    if backend.name != "cpu":
        pytest.skip("graphs are made above the kernels")
    norm, x = fastnorm.ImageNormalize(MEAN, STD), torch.rand(2, 3, 4, 5)
    traced = torch.fx.symbolic_trace(norm)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_function", "output"]
    made = make_fx(norm)(x)
    assert "fastnorm" not in made.code
    for graph in (traced, made):
        torch.testing.assert_close(graph(x), norm(x))


def test_report_and_explain() -> None:
    model = torch.nn.Sequential(fastnorm.ImageNormalize(MEAN, STD), fastnorm.ImageNormalize((0.5,) * 33, (0.25,) * 33))
    served, left = fastnorm.report(model)
    assert (served.status, left.status) == ("served", "left") and "33 channels" in left.why
    assert fastnorm.explain(torch.rand(2, 3, 4, 4), model[0]).startswith("fastnorm: ")
    assert "33 channels" in fastnorm.explain(torch.rand(2, 33, 4, 4), model[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.fallback(r"torch\.jit\.trace")
def test_jit_trace(backend: Backend) -> None:
    if backend.name != "cpu":
        pytest.skip("a trace holds torch's operators")
    norm, x = fastnorm.ImageNormalize(MEAN, STD), torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    traced = torch.jit.trace(norm, x)
    torch.testing.assert_close(traced(x), norm(x))


def test_compile_and_opcheck(backend: Backend) -> None:
    if backend.name != "cpu":
        pytest.skip("torch.compile sees no backend")
    x = batch(torch.uint8, (2, 3, 6, 7), "channels_last")
    norm = fastnorm.ImageNormalize(MEAN, STD, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), norm(x))
    args = (x.float().requires_grad_(), [0.0, 1.0, 2.0], [1.0, 2.0, 3.0], torch.float32, torch.channels_last)
    torch.library.opcheck(images.normalize_images, args)


def test_same_bits_for_any_number_of_threads(backend: Backend) -> None:
    if backend.name != "cpu":
        pytest.skip("threads of the CPU")
    x, norm = batch(torch.uint8, (2, 3, 300, 301), "channels_last"), fastnorm.ImageNormalize(MEAN, STD)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(norm(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, results[0]) for y in results)
