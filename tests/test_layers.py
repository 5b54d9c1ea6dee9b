"""The layering: rules for includes and imports, held against the files themselves."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FASTNORM = ROOT / "fastnorm"

# Room -> the rooms and files that its files may include.
ROOMS = {
    "core": ("core/",),
    "plan": ("core/", "plan/"),
    "cpu": ("core/", "cpu/", "plan/cpu.h"),
    "cuda": ("core/", "cuda/", "plan/types.h"),
    "torch": ("core/", "cpu/api.h", "cuda/api.h", "plan/", "torch/"),
}
# Headers of other projects. Every file may include the C++ library: names without dot and slash.
STANDARD = r"[a-z_0-9]+"
FOREIGN = {
    "cpu/pack.h": r"immintrin\.h",
    "cuda/platform.cuh": r"cooperative_groups\.h|cuda_\w+\.h",
    "torch/module.cpp": r"pybind11/.*",  # without torch's headers it compiles in seconds
    "torch/eager_norm.h": r"Python\.h",
    "torch/": r"(ATen|c10)/(?!cuda).*|torch/.*|sys/mman\.h",
}
EMULATED = {"cuda/platform.cuh": "emulator.h"}  # platform.cuh includes it instead of CUDA's headers
# The CUDA planner, lowest layer first: a file may include the layers before it, and its own header.
PLANNER = ("types", "text", "grid", "instructions", "cost", "choices", "cuda")

# A module may import those before it. A new module needs a place in this list.
MODULES = (
    "_C",
    "extension",
    "activations",
    "settings",
    "ops",
    "reference",
    "autograd",
    "dispatch",
    "images",
    "plain",
    "unfused",
    "statistics",
    "skip_init",
    "functional",
    "calibrate",
    "sync",
    "modules",
    "layers",
    "fusing.patterns",
    "fusing.calls",
    "fusing.record",
    "fusing.ungraph",
    "convert",
    "freeze",
    "enable",
    "fusing.source",
    "fusing.settings",
    "fusing.read",
    "fusing.usage",
    "fusing.flow",
    "fusing.fresh",
    "fusing.effects",
    "fusing.match",
    "fusing.containers",
    "fusing.edit",
    "fusing.graph",
    "fuse",
    "reverted",
    "sync_batch_norm",
    "report",
    "cuda",
    "__init__",
    "__main__",
)
APART = ({"functional", "modules"}, {"convert", "functional"}, {"cuda", "report"})

MOST_LINES = 430
Include = tuple[str, bool]  # name, and whether it stands in angle brackets


# csrc


def sources() -> dict[str, list[Include]]:
    """File -> its includes. A file of csrc appears by its path in csrc."""
    found = {}
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")):
        includes: list[Include] = []
        for bracket, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', path.read_text(), re.MULTILINE):
            beside = path.parent / name
            includes.append((str(beside.relative_to(CSRC)) if beside.is_file() else name, bracket == "<"))
        found[str(path.relative_to(CSRC))] = includes
    return found


SOURCES = sources()


def forbidden(path: str, include: Include) -> bool:
    name, angled = include
    room = path.partition("/")[0]
    if angled:
        foreign = FOREIGN.get(path) or FOREIGN.get(f"{room}/", "$")
        return re.fullmatch(f"{STANDARD}|{foreign}", name) is None
    if EMULATED.get(path) == name:
        return False
    if room == "plan" and name.startswith("plan/"):
        own, other = Path(path).stem, Path(name).stem
        if own != other and (own == "cpu" or other == "cpu" or PLANNER.index(other) >= PLANNER.index(own)):
            return True
    return not name.startswith(ROOMS[room])


def reached(path: str) -> set[str]:
    """All files of csrc that `path` includes, directly or not; `path` itself where there is a circle."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        for name, angled in SOURCES.get(waiting.pop(), []):
            if not angled and name not in found:
                found.add(name)
                waiting.append(name)
    return found


def test_every_include_is_allowed() -> None:
    assert {path.partition("/")[0] for path in SOURCES} == set(ROOMS)
    assert [f"{path}: {include[0]}" for path in SOURCES for include in SOURCES[path] if forbidden(path, include)] == []


def test_every_include_of_ours_is_there() -> None:
    names = {(path, name) for path, includes in SOURCES.items() for name, angled in includes if not angled}
    assert {(path, name) for path, name in names if name not in SOURCES} == set(EMULATED.items())


@pytest.mark.parametrize(
    ("path", "include"),
    [
        ("core/geometry.h", ("ATen/core/Tensor.h", True)),
        ("core/args.h", ("plan/types.h", False)),
        ("plan/types.h", ("plan/grid.h", False)),
        ("plan/grid.cpp", ("plan/cost.h", False)),
        ("plan/cost.h", ("plan/cuda.h", False)),
        ("plan/cpu.h", ("plan/types.h", False)),
        ("plan/cuda.cpp", ("cuda/api.h", False)),
        ("cpu/api.h", ("plan/types.h", False)),
        ("cpu/task.h", ("c10/util/Exception.h", True)),
        ("cpu/task.h", ("immintrin.h", True)),
        ("cuda/api.h", ("plan/cuda.h", False)),
        ("cuda/rows.cuh", ("cuda_runtime.h", True)),
        ("torch/backend_cuda.cpp", ("cuda_runtime.h", True)),
        ("torch/backend_cuda.cpp", ("c10/cuda/CUDAStream.h", True)),
        ("torch/backend_cpu.cpp", ("cpu/task.h", False)),
        ("torch/ops.h", ("pybind11/pybind11.h", True)),
        ("torch/module.cpp", ("torch/library.h", True)),
    ],
)
def test_forbidden_includes_are_seen(path: str, include: Include) -> None:
    assert path in SOURCES and forbidden(path, include)


def test_no_circle_of_includes() -> None:
    assert [path for path in SOURCES if path in reached(path)] == []


def test_what_must_not_come_along() -> None:
    """A change of the CUDA planner's heuristics recompiles no kernel; and neither traversal needs the other."""
    assert "plan/cpu.h" in reached("cpu/kernels.cpp") and "plan/types.h" in reached("cuda/forward_rows.cu")
    for path in SOURCES:
        if path.startswith("cpu/"):
            assert not {f"plan/{name}.h" for name in PLANNER} & reached(path), path
        if path.startswith("cuda/"):
            assert not {"plan/grid.h", "plan/cost.h", "plan/cuda.h", "plan/cpu.h"} & reached(path), path
    assert "cuda/rows.cuh" not in reached("cuda/columns.cuh")
    assert "cuda/columns.cuh" not in reached("cuda/rows.cuh")


# fastnorm


def imports(source: str, folder: str = "") -> Iterator[tuple[str, str]]:
    """All imports of a module, those inside functions too: (package, module of fastnorm or ""). folder: where in
    fastnorm the module lies."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, module = alias.name.partition(".")
                yield package, (module or "__init__") if package == "fastnorm" else ""
        elif isinstance(node, ast.ImportFrom):
            beside = f"{folder}." * (folder != "" and node.level == 1)
            name = f"fastnorm.{beside}{node.module or ''}" if node.level else node.module or ""
            package, _, module = name.partition(".")
            if package != "fastnorm":
                yield package, ""
            elif module:
                yield package, module
            else:
                yield from ((package, alias.name if alias.name in MODULES else "__init__") for alias in node.names)


def imported_by(module: str) -> set[str]:
    if module == "_C":
        return set()
    path = FASTNORM / f"{module.replace('.', '/')}.py"
    folder = "fusing" * module.startswith("fusing.")
    return {name for package, name in imports(path.read_text(), folder) if package == "fastnorm"}


def test_imports_are_read() -> None:
    text = (
        "import torch.nn, fastnorm\nfrom . import ops, report, f\nfrom .ops import x\ndef f():\n import fastnorm.cuda\n"
    )
    assert list(imports(text + " from fastnorm import _C\n from torch.nn import functional\n")) == [
        *(("torch", ""), ("fastnorm", "__init__")),
        *(("fastnorm", name) for name in ("ops", "report", "__init__")),
        *(("fastnorm", name) for name in ("ops", "cuda", "_C")),
        ("torch", ""),
    ]


def test_every_module_has_a_place() -> None:
    paths = [path.relative_to(FASTNORM).with_suffix("") for path in FASTNORM.rglob("*.py")]
    names = {".".join(path.parts) for path in paths} - {"fusing.__init__"}  # which is a docstring
    assert names | {"_C"} == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_those_before_it(module: str) -> None:
    """So there is no circle: autograd does not know dispatch, modules do not know convert."""
    assert imported_by(module) <= set(MODULES[: MODULES.index(module)])


@pytest.mark.parametrize("apart", APART, ids=lambda apart: "-".join(sorted(apart)))
def test_modules_that_stand_apart(apart: set[str]) -> None:
    for module in apart:
        assert not imported_by(module) & apart


def test_only_torch_and_the_standard_library() -> None:
    """And tqdm, which draws a bar where it is installed."""
    for path in FASTNORM.rglob("*.py"):
        allowed = {"torch", "fastnorm", *sys.stdlib_module_names} | ({"tqdm"} if path.stem == "calibrate" else set())
        assert {package for package, _ in imports(path.read_text())} <= allowed, path.name


def test_the_extension_has_one_door() -> None:
    """extension.py loads it and says what to do where that fails; __main__ runs only after that."""
    assert {module for module in MODULES if "_C" in imported_by(module)} == {"extension", "__main__"}


# Everything


def test_files_are_short() -> None:
    folders: Sequence[Path] = [ROOT / name for name in ("csrc", "fastnorm", "tests", "benchmarks", "examples")]
    suffixes = (".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".sh")
    paths = [p for folder in folders for p in folder.rglob("*") if p.suffix in suffixes] + [*ROOT.glob("setup*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert len(lines) > 100
    assert {path: count for path, count in lines.items() if count >= MOST_LINES} == {}
