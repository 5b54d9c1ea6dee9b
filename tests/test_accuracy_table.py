"""benchmarks/results/accuracy.md: the errors of our kernels against float64, beside torch.nn's."""

from __future__ import annotations

import pytest

from benchmarks import accuracy
from tests.common.cases import DATA, PRECISIONS
from tests.conftest import NO_NVCC
from tests.ptx import build
from tests.test_accuracy import NOISE, SIZES, SLACK

CELLS = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in accuracy.SAVED.read_text().splitlines()
    if line.startswith("| ") and line.split("|")[2].strip() in {x for x, _ in PRECISIONS}
]


def errors_of(cell: str) -> list[float]:
    """Of torch.nn, of the CPU kernels, of the CUDA kernels."""
    return [float(number) for number in cell.split(",")]


def test_the_saved_table_is_whole() -> None:
    rows = [[f"{layer.norm}, {layer.label}", *precision] for layer in SIZES for precision in PRECISIONS]
    assert [cells[:3] for cells in CELLS] == rows * len(accuracy.KINDS)
    assert sorted(kind for kinds in accuracy.KINDS.values() for kind in kinds) == sorted(DATA)


def test_no_error_is_above_torchs() -> None:
    """By more than test_accuracy.py allows; of the half types, by a rounding."""
    for cells in CELLS:
        for native, cpu, cuda in map(errors_of, cells[3:]):
            assert cpu <= NOISE * native + (1 if cells[1] != "float64" else 4), cells
            assert cuda <= NOISE * native + (SLACK["ptx"] if cells[1] != "float64" else 4), cells
            assert cells[2] != cells[1] or cells[1] not in ("bfloat16", "float16") or cuda <= 0.55, cells


@pytest.mark.interpreter
@pytest.mark.skipif(build.nvcc() is None, reason=NO_NVCC)
def test_a_row_is_what_is_counted_now() -> None:
    layer, precision = SIZES[-1], ("float32", "float32")
    (saved, _) = (cells[3:] for cells in CELLS if cells[:3] == [f"{layer.norm}, {layer.label}", *precision])
    found = accuracy.cells_of(layer, precision, DATA[:1])
    for was, now in zip(saved, found, strict=True):
        # torch's own sums, and with them the CPU kernels', depend on the processor.
        assert errors_of(now)[2] == pytest.approx(errors_of(was)[2], rel=0.1), "benchmarks/accuracy.py --update"
