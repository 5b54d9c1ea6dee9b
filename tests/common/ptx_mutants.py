"""Kernels with one barrier, or one part of a barrier, taken out of their PTX."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

SYNC = re.compile(
    r"\s*(?:@!?%p\d+\s+)?(bar\.sync|barrier\.sync|bar\.warp\.sync|cp\.async\.wait_group|cp\.async\.wait_all)\b"
)
CLUSTER = re.compile(r"\s*barrier\.cluster\.(arrive|wait)\b")
ORDERS = {"atom.add.release.gpu": "atom.add.relaxed.gpu", "ld.acquire.gpu": "ld.relaxed.gpu"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    kernel: str
    what: str
    """The instruction that is gone or weaker."""
    line: int
    """Of the module."""
    text: str
    """A module with this kernel alone."""


class Module:
    """The text that nvcc made of a file."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        starts = [i for i, line in enumerate(self.lines) if ".entry " in line]
        ends = [next(i for i in range(start, len(self.lines)) if self.lines[i] == "}") for start in starts]
        self.kernels = {
            re.search(r"\.entry (\w+)", self.lines[start])[1]: (start, end + 1)  # type: ignore[index]
            for start, end in zip(starts, ends, strict=True)
        }
        self.files = dict(re.findall(r'\.file\s+(\d+) "([^"]*)"', text))
        outside = [line for line in self.lines[: starts[0]] if not line.lstrip().startswith("//")]
        self.around = [*outside, *(f'.file {number} "{path}"' for number, path in self.files.items())]

    def alone(self, kernel: str, changed: dict[int, str] | None = None) -> str:
        start, end = self.kernels[kernel]
        body = [(changed or {}).get(i, self.lines[i]) for i in range(start, end)]
        return "\n".join([*self.around, *body, ""])

    def mutants(self, kernel: str) -> Iterator[Mutant]:
        start, end = self.kernels[kernel]
        for i in range(start, end):
            line = self.lines[i]
            if found := SYNC.match(line):
                yield Mutant(kernel, found[1], i + 1, self.alone(kernel, {i: ""}))
            elif (found := CLUSTER.match(line)) and found[1] == "arrive":
                wait = next(j for j in range(i, end) if (at := CLUSTER.match(self.lines[j])) and at[1] == "wait")
                yield Mutant(kernel, "barrier.cluster", i + 1, self.alone(kernel, {i: "", wait: ""}))
            for strong, weak in ORDERS.items():
                if strong in line:
                    yield Mutant(kernel, strong, i + 1, self.alone(kernel, {i: line.replace(strong, weak)}))

    def site(self, line: int) -> str:
        """Of the instruction in a line: "sync < exchange < fused_forward_rows", the functions of ours that it lies in,
        from the innermost outside of platform.cuh to the kernel."""
        numbers = r"(\d+) (\d+) (\d+)"
        outer: dict[tuple[str, ...], tuple[str, ...]] = {}
        current: tuple[str, ...] = ()
        start = max(first for first, _ in self.kernels.values() if first < line)
        for text in self.lines[start : line - 1]:
            if found := re.match(rf"\s*\.loc\s+{numbers}(?:.*inlined_at {numbers})?", text):
                current = found.groups()[:3]
                outer[current] = found.groups()[3:]
        names: list[str] = []
        while current and current[0] is not None and len(names) < 30:
            path = Path(self.files[current[0]])
            if path.parent.name == "cuda" and path.name != "platform.cuh" and path.is_file():
                name = function_at(path, int(current[1]))
                names += [name] * (not names or names[-1] != name)
            current = outer.get(current, ())
        return " < ".join(names)


@functools.cache
def function_names(path: Path) -> list[str]:
    """For every line of a file of csrc/cuda, the function that begins at or before it."""
    names, name, kernel = [], "", False
    for line in path.read_text().splitlines():
        if kernel:
            name, kernel = line.split("(")[0], False
        if line.startswith("FASTNORM_KERNEL"):
            kernel = True
        elif found := re.match(r"\s*(?:friend )?FASTNORM_DEVICE [^=;(]*?(\w+)\(", line):
            name = found[1]
        names.append(name)
    return names


def function_at(path: Path, line: int) -> str:
    return function_names(path)[line - 1]


def family_of(kernel: str) -> str:
    """fused_forward_rows of _ZN8fastnorm4cuda18fused_forward_rowsIf..."""
    rest = kernel.removeprefix("_ZN8fastnorm4cuda")
    length = re.match(r"\d+", rest)
    assert length, kernel
    return rest[len(length[0]) :][: int(length[0])]
