"""What check_cuda.py compiles, compares and saves. nvcc is not run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from setup_cuda import CUDA_ARCHS, cuda_objects, file_name, kernel_files
from setup_ninja import Object
from tests import check_cuda
from tests.check_cuda import differences, digest, faults_of, merged, rows_of
from tests.check_sass import MAX_KERNELS, Kernel
from tests.emulator.build import CSRC

CODES = [f"sm_{arch}" for arch in CUDA_ARCHS]
FILES = [Path(o.path).stem for o in cuda_objects(CSRC, ["sm_90"], lines=False, strict=False)]


def kernel(file: str = "rows.float", arch: str = "sm_90", name: str = "fold", **fields: int) -> Kernel:
    return Kernel(file, arch, name, fields.get("registers", 40), {"FADD": fields.get("adds", 7), "LDG.E": 2})


def test_rows_are_of_a_file_and_an_architecture() -> None:
    rows = rows_of([kernel(), kernel(name="other", adds=1), kernel(arch="sm_80"), kernel("columns")])
    assert [(row["file"], row["arch"], row["kernels"], row["registers"], row["instructions"]) for row in rows] == [
        ("columns", "sm_90", 1, 40, 9),
        ("rows.float", "sm_80", 1, 40, 9),
        ("rows.float", "sm_90", 2, 80, 12),
    ]


def test_what_differs_from_the_record_is_named() -> None:
    recorded = rows_of([kernel(), kernel(arch="sm_80")])
    assert differences(rows_of([kernel()]), recorded) == []
    assert differences(rows_of([kernel(arch="sm_75")]), recorded) == []  # which is not recorded
    (changed,) = differences(rows_of([kernel(adds=8)]), recorded)
    assert "has become" in changed and "'instructions': 10" in changed
    (new,) = differences(rows_of([kernel("columns")]), recorded)
    assert new.endswith("is new")


def test_a_record_grows_by_architectures() -> None:
    recorded = rows_of([kernel(), kernel(arch="sm_80"), kernel("columns")])
    found = merged(rows_of([kernel(adds=9), kernel(arch="sm_75")]), recorded)
    assert [(row["file"], row["arch"], row["instructions"]) for row in found] == [
        ("rows.float", "sm_75", 9),
        ("rows.float", "sm_80", 9),
        ("rows.float", "sm_90", 11),
    ]


def test_faults() -> None:
    assert faults_of([kernel()]) == []
    assert len(faults_of([kernel(registers=129)])) == 1
    too_many = [kernel(name=str(i)) for i in range(MAX_KERNELS + 1)]
    assert faults_of(too_many) == [f"sm_90: {MAX_KERNELS + 1} kernels, expected at most {MAX_KERNELS}"]


def test_the_digest_is_of_the_code_alone(tmp_path: Path) -> None:
    def of(text: str, name: str = "cuda/rows.cuh") -> str:
        for place in ("core", "cuda"):
            (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / "cuda" / "rows.cu").write_text('#include "rows.cuh"\n#include "core/types.h"\n#include <vector>\n')
        (tmp_path / name).write_text(text)
        return digest(tmp_path)

    first = of("int f();  // as it was\n")
    assert of("// Moved.\nint\n  f();\n") == first
    assert of("int g();\n") != first
    assert of("int f();\n") == first
    assert of("int x;\n", "core/not_included.h") == first
    with_types = of("int x;\n", "core/types.h")
    assert with_types != first and of("int y;\n", "core/types.h") != with_types


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """Runs main() with a record; returns its status and "FILE ARCH" of all that it would have compiled."""
    found: list[str] = []

    def shipped(quiet: bool) -> list[Path]:
        return [Path(f"{file}:sm_90") for file in FILES]

    def compile_objects(name: str, objects: list[Object], quiet: bool) -> list[Path]:
        return [
            Path(f"{Path(o.path).stem}:{code}")
            for o in objects
            for code in Path(o.path).parts[0].removeprefix("cuda-").split("-")
        ]

    def read(path: Path) -> list[Kernel]:
        file, arch = str(path).split(":")
        found.append(f"{file} {arch}")
        return [kernel(file, arch)]

    monkeypatch.setattr(check_cuda, "build_shipped", shipped)
    monkeypatch.setattr(check_cuda, "compile_objects", compile_objects)
    monkeypatch.setattr(check_cuda, "read_object", read)
    monkeypatch.setattr(check_cuda, "needed_nvcc", lambda: "nvcc")
    monkeypatch.setattr(check_cuda, "toolkit", lambda: "V13.0.1")
    monkeypatch.setattr(check_cuda, "find_cuda_codes", lambda nvcc, gpus: [*CODES, "compute_90"])
    monkeypatch.setattr(check_cuda, "RECORD", tmp_path / "sass.json")

    def run(*words: str, **record: object) -> tuple[int, list[str]]:
        found.clear()
        if record:
            check_cuda.RECORD.write_text(json.dumps({"nvcc": "V13.0.1", "digest": digest(), "rows": [], **record}))
        return check_cuda.main(words), sorted(found)

    return run


def test_all_is_compiled_saved_and_compared(compiled: Callable[..., tuple[int, list[str]]]) -> None:
    everything = sorted(f"{file} {code}" for file in FILES for code in CODES)
    assert compiled("--update", digest="older") == (0, everything)
    assert compiled() == (0, everything)
    saved = json.loads(check_cuda.RECORD.read_text())
    assert len(saved["rows"]) == len(everything) and saved["digest"] == digest()

    status, sample = compiled("--sample")
    assert status == 0
    others = [each for each in sample if not each.endswith("sm_90")]
    assert len(sample) == len(FILES) + len(others)
    assert sorted(each.split()[1] for each in others) == sorted(set(CODES) - {"sm_90"})

    rows = [{**row, "instructions": row["instructions"] + 1} for row in saved["rows"]]
    assert compiled("--sample", rows=rows)[0] == 1


def test_a_sample_is_held_to_what_is_recorded(
    compiled: Callable[..., tuple[int, list[str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The faults of other architectures are told."""

    def spilling(path: Path) -> list[Kernel]:
        file, arch = str(path).split(":")
        return [kernel(file, arch, registers=129 if arch == "sm_80" else 40)]

    monkeypatch.setattr(check_cuda, "read_object", spilling)
    assert compiled("--sample", rows=rows_of([kernel(file) for file in FILES]))[0] == 0
    assert "not recorded: " in capsys.readouterr().out
    assert compiled("--sample", rows=rows_of([kernel(f, arch) for f in FILES for arch in ("sm_80", "sm_90")]))[0] == 1
    assert compiled("--update", rows=[])[0] == 1


def test_a_record_of_other_code_is_refused(
    compiled: Callable[..., tuple[int, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compiled("--sample", digest="older") == (1, [])
    assert "make check-cuda ARGS=--update" in capsys.readouterr().out


def test_what_another_nvcc_makes_is_not_compared(
    compiled: Callable[..., tuple[int, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = compiled("--sample", nvcc="V12.8.93", digest="older", rows=rows_of([kernel(adds=99)]))
    assert status == 0 and len(found) == len(FILES) + len(CODES) - 1
    assert f"not recorded: {', '.join(CODES)}" in capsys.readouterr().out


def test_the_record_is_of_this_code() -> None:
    """Where it is not: make check-cuda ARGS=--update."""
    record = json.loads(check_cuda.RECORD.read_text())
    assert record["digest"] == digest()
    archs = {row["arch"] for row in record["rows"]}
    assert "sm_90" in archs and archs <= set(CODES)
    with_kernels = [file_name(*kernel) for kernel in kernel_files(CSRC)]
    assert {(row["file"], row["arch"]) for row in record["rows"]} == {(f, code) for f in with_kernels for code in archs}
