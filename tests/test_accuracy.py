"""The numerics contract: no quantity is further from float64 than torch.nn's plus one ulp, on unkind data too."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import fastnorm
from tests.common.cases import DATA, PRECISIONS, TYPICAL, Case, Layer
from tests.common.numerics import build, compare, make_inputs, run
from tests.conftest import Backend

# Two correct roundings of a mean of 1e6 to float32 differ in their last digits, and both errors are large.
NOISE = 1.02
# In epsilons; what docs/numerics.md says of the kernels for CUDA, which sum in float32.
SLACK = {"cpu": 1.0, "cuda": 3.0, "emulated": 3.0, "ptx": 3.0}
# Large enough that sums are long, small enough that torch.nn in float64 is quick.
SIZES = (
    Layer("sums of 3136", "BatchNorm2d", (4, 24, 28, 28), (24,)),
    Layer("sums of 7840", "GroupNorm", (2, 40, 28, 28), (4, 40)),
    Layer("sums of 784", "InstanceNorm2d", (2, 24, 28, 28), (24,), (("affine", True),)),
    Layer("sums of 768", "LayerNorm", (50, 768), (768,)),
)


@pytest.mark.emulated
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("precision", PRECISIONS, ids="-".join)
@pytest.mark.parametrize("layer", SIZES, ids=lambda layer: layer.norm)
def test_error_is_at_most_torchs(
    layer: Layer, precision: tuple[str, str], data: str, device: torch.device, backend: Backend
) -> None:
    for layout in layer.layouts:
        case = Case(layer, layout, precision)
        # Where there is nothing wider to sum in the size of the terms counts: in float64, whose truth is rounded as
        # well; on a GPU, in float32. (What is emulated is compared with torch's CPU kernels, which have doubles.)
        wider = backend.name == "cpu" and case.dtype != torch.float64
        errors = compare(case, device, data, plain=wider)
        slack = 4 if case.dtype == torch.float64 else SLACK[backend.name]
        too_large = [f"{layout} {error}" for error in errors if not error.ours <= NOISE * error.native + slack]
        assert not too_large


# Beyond the caches: split sets, tiles, several blocks of a sum, memory asked for in huge pages.
LARGE = (
    Layer("64 sets", "BatchNorm2d", (12, 64, 56, 56), (64,)),
    Layer("few sets", "BatchNorm3d", (1, 2, 64, 64, 80), (2,)),
    Layer("wide", "BatchNorm2d", (8, 1024, 7, 7), (1024,)),
    Layer("sums of 81920", "GroupNorm", (1, 640, 32, 32), (8, 640)),
    Layer("sums of 262144", "InstanceNorm3d", (1, 4, 64, 64, 64), (4,), (("affine", True),)),
    Layer("many rows", "LayerNorm", (25088, 96), (96,)),
    Layer("long rows", "LayerNorm", (3, 300000), (300000,)),
)


@pytest.mark.parametrize("precision", PRECISIONS[1:3], ids="-".join)
@pytest.mark.parametrize("layer", LARGE, ids=lambda layer: layer.id)
def test_large(layer: Layer, precision: tuple[str, str], device: torch.device, backend: Backend) -> None:
    torch.set_num_threads(2)
    for layout in layer.layouts:
        case = Case(layer, layout, precision, "relu", residual=True)
        errors = compare(case, device, plain=False)
        slack = SLACK[backend.name]
        assert not [f"{layout} {error}" for error in errors if not error.ours <= NOISE * error.native + slack]


@pytest.mark.parametrize(
    ("namespace", "message", "answers"),
    [
        (torch.nn, "expected scalar type BFloat16 but found Float", True),
        (fastnorm, "expected scalar type BFloat16 but found Float", False),
        (torch.nn, "CUDA error", False),
    ],
)
def test_torchs_cpu_kernels_answer_where_its_others_refuse(namespace: ModuleType, message: str, answers: bool) -> None:
    """As its group norm refuses parameters of another dtype on a GPU; ours may not."""
    case, cpu = Case(TYPICAL[1], precision=("bfloat16", "float32")), torch.device("cpu")
    inputs, module, errors = make_inputs(case, cpu), build(case, namespace, cpu), [RuntimeError(message)]

    def refuse_once(*_: object) -> None:
        if errors:
            raise errors.pop()

    module.register_forward_pre_hook(refuse_once)
    if answers:
        expected = run(case, build(case, namespace, cpu), inputs)
        torch.testing.assert_close(run(case, module, inputs), expected, rtol=0, atol=0)
    else:
        with pytest.raises(RuntimeError, match=message):
            run(case, module, inputs)
