"""The largest errors against float64: of torch.nn on the CPU, of the CPU kernels, and of the CUDA kernels as nvcc's PTX
executed on the CPU.

    python benchmarks/accuracy.py              print the tables
    python benchmarks/accuracy.py --update     save them: benchmarks/results/accuracy.md

The layers and the measure are those of tests/test_accuracy.py: epsilons of a result's dtype, times the size of the
terms that it is a sum of; the largest of all elements, and of both layouts. Needs nvcc and no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

# Run as a file, only its own folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.progress import track

from benchmarks.tune_report import Table, as_markdown, as_text
from tests.common.cases import DATA, PRECISIONS, Case, Layer
from tests.common.numerics import compare
from tests.conftest import CPU, PTX, Backend
from tests.test_accuracy import SIZES

SAVED = Path(__file__).with_name("results") / "accuracy.md"
QUANTITIES = ("y", "dx", "dweight", "dbias")
KINDS = {"normal": DATA[:1], "offset, heavy-tailed and denormal": DATA[1:]}
"""Of data, and what they are called."""

HEAD = """# Errors against float64

`python benchmarks/accuracy.py --update` writes this. In epsilons of a result's dtype, times the size of the terms that
it is a sum of: the largest error of torch.nn on the CPU; of the CPU kernels; and of the CUDA kernels, as nvcc's PTX
(sm_90) executed on the CPU, planned for an H200 and for a device of few multiprocessors, with the errors that the PTX
manual allows its approximations. The dtypes are those of x and of the parameters.

torch.nn's large ones: its GroupNorm takes a channels_last variance as the mean of squares less the square of the mean,
and its LayerNorm rounds the gradients of float32 parameters to x's dtype.
"""


def largest(
    layer: Layer, precision: tuple[str, str], kinds: Sequence[str], backends: Sequence[Backend]
) -> dict[str, tuple[float, float]]:
    """Of each quantity, the largest error of torch.nn and of the backends' kernels."""
    found = dict.fromkeys(QUANTITIES, (0.0, 0.0))
    for backend, layout, data in itertools.product(backends, layer.layouts, kinds):
        with backend.active():
            for error in compare(Case(layer, layout, precision), backend.device, data):
                if error.name in found:
                    native, ours = found[error.name]
                    found[error.name] = (max(native, error.native), max(ours, error.ours))
    return found


def cells_of(layer: Layer, precision: tuple[str, str], kinds: Sequence[str]) -> list[str]:
    """For each quantity "torch.nn, CPU, CUDA"."""
    cpu, cuda = (largest(layer, precision, kinds, backends) for backends in ((CPU,), PTX))
    return [", ".join(f"{e:.2g}" for e in (cpu[q][0], cpu[q][1], cuda[q][1])) for q in QUANTITIES]


def table(kinds: Sequence[str], name: str) -> Table:
    heads = ("x", "parameters", *(f"{q}: torch.nn, CPU, CUDA" for q in QUANTITIES))
    rows = [(layer, precision) for layer in SIZES for precision in PRECISIONS]
    return heads, [
        (f"{layer.norm}, {layer.label}", [*precision, *cells_of(layer, precision, kinds)])
        for layer, precision in track(rows, name)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help=f"save {SAVED.name}")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tables = {name: table(kinds, name) for name, kinds in KINDS.items()}
    for name, each in tables.items():
        print(f"\nData: {name}", as_text(each), sep="\n")
    if args.update:
        SAVED.write_text(HEAD + "".join(f"\n## Data: {name}\n\n{as_markdown(each)}" for name, each in tables.items()))


if __name__ == "__main__":
    main()
