"""Kernels with one barrier, or one part of a barrier, taken out of their PTX."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

SYNC = re.compile(
    r"\s*(?:@!?%p\d+\s+)?(bar\.sync|barrier\.sync|bar\.warp\.sync|cp\.async\.wait_group|cp\.async\.wait_all)\b"
)
CLUSTER = re.compile(r"\s*barrier\.cluster\.(arrive|wait)\b")
Place = tuple[Path, int]
"""A file and a line."""

LOCATION = re.compile(r"\s*\.loc\s+(\d+) (\d+) (\d+)(?:.*inlined_at (\d+) (\d+) (\d+))?")
ORDERS = {"atom.add.release.gpu": "atom.add.relaxed.gpu", "ld.acquire.gpu": "ld.relaxed.gpu"}


def is_changed(text: str) -> bool:
    """Whether an instruction, or its opcode, has a mutant. A cluster's barrier has one, at its arrival."""
    cluster = CLUSTER.match(text)
    return bool(SYNC.match(text) or (cluster and cluster[1] == "arrive") or any(strong in text for strong in ORDERS))


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
        self.located: dict[str, dict[int, tuple[Place, ...]]] = {}
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

    def reached(self, kernel: str, issued: Sequence[tuple[str, int]]) -> set[int]:
        """The lines of the mutants whose instruction was executed; issued: as the interpreter has counted."""
        start, end = self.kernels[kernel]
        lines = [i + 1 for i in range(start, end) if is_changed(self.lines[i])]
        counts = [count for opcode, count in issued if is_changed(opcode)]
        assert not counts or len(lines) == len(counts), kernel
        return {line for line, count in zip(lines, counts, strict=bool(counts)) if count > 0}

    def places(self, line: int) -> tuple[Place, ...]:
        """The lines of csrc/cuda, but for platform.cuh, that an instruction comes of, from the innermost call."""
        (kernel,) = (name for name, (start, end) in self.kernels.items() if start < line <= end)
        if kernel not in self.located:
            self.located[kernel] = dict(self.locate(kernel))
        return self.located[kernel][line]

    def locate(self, kernel: str) -> Iterator[tuple[int, tuple[Place, ...]]]:
        """The line and the places of all instructions of a kernel that mutants lack."""
        outer: dict[tuple[str, ...], tuple[str, ...]] = {}
        current: tuple[str, ...] = ()
        start, end = self.kernels[kernel]
        for number, text in enumerate(self.lines[start:end], start + 1):
            if found := LOCATION.match(text):
                current = found.groups()[:3]
                outer[current] = found.groups()[3:]
            elif SYNC.match(text) or CLUSTER.match(text) or any(strong in text for strong in ORDERS):
                yield number, tuple(self.places_of(current, outer))

    def places_of(self, at: tuple[str, ...], outer: dict[tuple[str, ...], tuple[str, ...]]) -> Iterator[Place]:
        for _ in range(60):
            if not at or at[0] is None:
                return
            path = Path(self.files[at[0]])
            if path.parent.name == "cuda" and path.name != "platform.cuh" and path.is_file():
                yield path, int(at[1])
            at = outer.get(at, ())


def site_of(places: tuple[Place, ...]) -> str:
    """ "sync < exchange < fused_forward_rows": the functions that an instruction lies in, to the kernel."""
    names: list[str] = []
    for path, number in places:
        name = function_at(path, number)
        names += [name] * (not names or names[-1] != name)
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
