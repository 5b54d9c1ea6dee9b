"""Innermost loops of kernels, in PTX and in the SASS that was made of it, matched by what they do to memory.

ptxas may unroll a loop again, and it may leave one out. A loop of PTX and one of SASS are the same where they access
memory, exchange between lanes and call the special function unit in the same proportions, and no other loop of the
kernel does so on either side.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from benchmarks.ptx_weights import weighted

Signature = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Loop:
    """The instructions of one round, and how often the round repeats its signature."""

    opcodes: tuple[str, ...]
    signature: Signature
    repeats: int

    @property
    def size(self) -> float:
        """Instructions for one signature's worth of work."""
        return len(self.opcodes) / self.repeats


@dataclasses.dataclass(frozen=True)
class Match:
    kernel: str
    ptx: Loop
    sass: Loop

    @property
    def expected(self) -> float:
        """Machine instructions by the weights of the PTX, where the SASS has sass.size."""
        return weighted(Counter(self.ptx.opcodes)) / self.ptx.repeats

    @property
    def ratio(self) -> float:
        return self.expected / self.sass.size


def make_loop(opcodes: Sequence[str], parts: Iterator[str]) -> Loop:
    found = Counter(parts)
    repeats = math.gcd(*found.values()) or 1
    return Loop(tuple(opcodes), tuple(sorted((part, n // repeats) for part, n in found.items())), repeats)


def innermost(jumps_back: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """jumps_back: places that are jumped to, and from where. Gives the loops that have no other in them."""
    ends: dict[int, int] = {}
    for begin, end in jumps_back:
        ends[begin] = max(end, ends.get(begin, end))
    loops = sorted(ends.items())
    return [
        (begin, end)
        for begin, end in loops
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in loops)
    ]


def without_guard(statement: str) -> str:
    """The statement without the predicate before it."""
    return re.sub(r"^@!?[%\w]+\s+", "", statement)


# ---- PTX ----


def ptx_parts(opcodes: Sequence[str]) -> Iterator[str]:
    """The signature's parts of these instructions, in words that sass_parts() uses too."""
    for opcode in opcodes:
        name, *options = opcode.split(".")
        if name in ("ld", "st") and options[0] in ("global", "shared"):
            vector = next((int(o[1]) for o in options if re.fullmatch(r"v\d", o)), 1)
            bits = re.search(r"\d+$", options[-1])
            assert bits is not None, opcode
            yield f"{name} {options[0]} {vector * int(bits[0]) // 8}"
        elif opcode.startswith("cp.async.c"):  # .ca or .cg, and not .commit_group
            yield "copy"
        elif name in ("shfl", "ex2"):
            yield name
        elif name == "rcp" or opcode.startswith(("div.rn.f32", "div.full")):
            yield "rcp"


def ptx_statements(body: str) -> tuple[list[str], dict[str, int]]:
    """A kernel's instructions without their guards, and the places of its labels."""
    statements: list[str] = []
    labels = {}
    for text in re.sub(r"//.*|^\s*\.loc\s.*", "", body, flags=re.MULTILINE).split(";"):
        text = text.lstrip("{} \t\n")  # scopes, which inline assembly opens
        while label := re.match(r"(\$\w+):[{}\s]*", text):
            labels[label[1]] = len(statements)
            text = text[label.end() :]
        if text and not text.startswith("."):
            statements.append(without_guard(text))
    return statements, labels


def ptx_loops(body: str) -> list[Loop]:
    statements, labels = ptx_statements(body)
    back = []
    for i, statement in enumerate(statements):
        opcode, _, rest = statement.partition(" ")
        if opcode.split(".")[0] == "bra" and labels.get(rest.strip(), i + 1) <= i:
            back.append((labels[rest.strip()], i))
    opcodes = [statement.split()[0] for statement in statements]
    return [make_loop(part, ptx_parts(part)) for begin, end in innermost(back) for part in [opcodes[begin : end + 1]]]


def ptx_kernels(text: str) -> dict[str, list[Loop]]:
    """Loops by the kernel's mangled name."""
    found = {}
    for part in text.split(".entry ")[1:]:
        name = re.match(r"\w+", part)
        assert name is not None
        found[name[0]] = ptx_loops(part[part.index("\n{") :])
    return found


# ---- SASS ----

_SASS_NAMES = {"LDG": "ld global", "STG": "st global", "LDS": "ld shared", "STS": "st shared"}
_SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def sass_parts(opcodes: Sequence[str]) -> Iterator[str]:
    for opcode in opcodes:
        name, *options = opcode.split(".")
        if name in _SASS_NAMES:
            yield f"{_SASS_NAMES[name]} {next((_SASS_BYTES[o] for o in options if o in _SASS_BYTES), 4)}"
        elif name == "LDGSTS":
            yield "copy"
        elif name == "SHFL":
            yield "shfl"
        elif opcode == "MUFU.EX2":
            yield "ex2"
        elif opcode == "MUFU.RCP":
            yield "rcp"


def sass_loops(code: str) -> list[Loop]:
    """Of one kernel's lines of `cuobjdump -sass`. A block that calls is left out: calls are the slow paths of
    divisions, which ordinary numbers do not take."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    statements = [without_guard(text.strip()) for _, text in lines]
    opcodes = [statement.split()[0] for statement in statements]
    targets = {}  # of branches, by the place of the branch
    for i, statement in enumerate(statements):
        found = re.search(r"0x([0-9a-f]+)", statement) if opcodes[i].split(".")[0] == "BRA" else None
        if found and int(found[1], 16) in place:
            targets[i] = place[int(found[1], 16)]
    entered = set(targets.values())
    loops = []
    for begin, end in innermost([(to, i) for i, to in targets.items() if to < i]):
        blocks: list[list[str]] = [[]]
        for i in range(begin, end + 1):
            if i in entered:
                blocks.append([])
            blocks[-1].append(opcodes[i])
            if i in targets:
                blocks.append([])
        executed = [
            opcode
            for block in blocks
            if not any(each.startswith("CALL") for each in block)
            for opcode in block
            if opcode != "NOP"
        ]
        loops.append(make_loop(executed, sass_parts(executed)))
    return loops


def sass_kernels(text: str) -> dict[str, list[Loop]]:
    parts = [part.split("\n", 1) for part in re.split(r"\n\s*Function : ", text)[1:]]
    return {name.strip(): sass_loops(code) for name, code in parts}


# ---- both ----


def match_loops(ptx: str, sass: str) -> list[Match]:
    """The loops that are in both. ptx: a module; sass: what `cuobjdump -sass` says of its cubin."""
    machine = sass_kernels(sass)
    matches = []
    for kernel, loops in ptx_kernels(ptx).items():
        sides: tuple[dict[Signature, list[Loop]], ...] = (defaultdict(list), defaultdict(list))
        for side, found in zip(sides, (loops, machine.get(kernel, [])), strict=True):
            for loop in found:
                side[loop.signature].append(loop)
        for signature, ours in sides[0].items():
            theirs = sides[1].get(signature, [])
            if signature and len(ours) == len(theirs) == 1:
                matches.append(Match(kernel, ours[0], theirs[0]))
    return matches
