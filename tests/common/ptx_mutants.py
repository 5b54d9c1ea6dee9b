"""Kernels with one barrier, or one part of a barrier, taken out of their PTX."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

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
        outside = [line for line in self.lines[: starts[0]] if not line.lstrip().startswith("//")]
        self.around = [*outside, *(line for line in self.lines[ends[-1] + 1 :] if line.lstrip().startswith(".file"))]

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
        """Of the instruction in a line: "gang.cuh:61", the innermost line of ours outside of platform.cuh, and the line
        that calls it."""
        files = dict(re.findall(r'\.file\s+(\d+) "[^"]*?([\w.]+)"', "\n".join(self.around)))
        numbers = r"(\d+) (\d+) (\d+)"
        outer: dict[tuple[str, ...], tuple[str, ...]] = {}
        current: tuple[str, ...] = ()
        start = max(first for first, _ in self.kernels.values() if first < line)
        for text in self.lines[start : line - 1]:
            if found := re.match(rf"\s*\.loc\s+{numbers}(?:.*inlined_at {numbers})?", text):
                current = found.groups()[:3]
                outer[current] = found.groups()[3:]
        names = []
        while current and current[0] is not None and len(names) < 20:
            names.append(f"{files.get(current[0], '?')}:{current[1]}")
            current = outer.get(current, ())
        ours = [name for name in names if re.search(r"\.cu?h?:", name) and not name.startswith("platform.cuh")]
        return " < ".join(name for name in ours if ".cuh" in name or ".cu:" in name)
