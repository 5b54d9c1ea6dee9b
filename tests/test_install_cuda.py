"""setup.py and CUDA: the toolkit it finds, its targets, its objects. nvcc is a shell script here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.test_install import ROOT, assert_sentence, load_setup, make_tools, sentence_of
from tests.test_install import toy as toy  # a fixture

setup = load_setup()
cuda = setup.sys.modules["setup_cuda"]

# It compiles nothing.
NVCC = """#!/bin/sh
case "$*" in
    *--version*) echo "Cuda compilation tools, release VERSION, V0.0.0"; exit ;;
    *--list-gpu-code*) printf "sm_75\\nsm_80\\nsm_86\\nsm_90\\nsm_100\\nsm_120\\n"; exit ;;
    *--dryrun*) echo '#$ LIBRARIES=  "-LFOLDER/lib/stubs" "-LFOLDER/lib"' >&2; exit ;;
esac
exit 1
"""


def make_toolkit(folder: Path, version: str = "13.0") -> Path:
    for name in ("bin", "lib"):
        (folder / name).mkdir(parents=True)
    (folder / "lib" / "libcudart_static.a").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(NVCC.replace("VERSION", version).replace("FOLDER", str(folder)))
    nvcc.chmod(0o755)
    return folder


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    return make_toolkit(tmp_path / "toolkit")


# The toolkit.


def test_nvcc(tmp_path: Path) -> None:
    """The order: the toolkit that a variable names, the newest in /usr/local, nvcc on PATH, which may be a wrapper."""
    local = tmp_path / "local"
    on_path, named, other = (make_toolkit(tmp_path / name) for name in ("path", "named", "other"))
    env = {"PATH": f"{on_path}/bin"}
    assert cuda.find_nvcc({"PATH": ""}, local) is None
    assert cuda.find_nvcc(env, local) == f"{on_path}/bin/nvcc"
    make_toolkit(local / "cuda-9.2")
    newest = make_toolkit(local / "cuda-12.8")
    assert cuda.find_nvcc(env, local) == f"{newest}/bin/nvcc"
    (local / "cuda").symlink_to("cuda-9.2")
    assert cuda.find_nvcc(env, local) == f"{local}/cuda/bin/nvcc"
    assert cuda.find_nvcc({**env, "CUDA_PATH": str(other)}, local) == f"{other}/bin/nvcc"
    assert cuda.find_nvcc({"CUDA_PATH": str(other), "CUDA_HOME": str(named)}, local) == f"{named}/bin/nvcc"
    sentence = sentence_of(cuda.find_nvcc, {"CUDA_HOME": "/no/such/folder"}, local)
    assert_sentence(sentence, "CUDA_HOME=/no/such/folder has no bin/nvcc")


@pytest.mark.parametrize(
    ("listed", "gpus", "codes"),
    [
        ("", (), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_90"),
        ("", ("9.0", "8.0", "9.0"), "sm_80 sm_90"),
        ("9.0", ("8.0",), "sm_90"),
        ("7.5;9.0a+PTX", (), "sm_75 sm_90 compute_90"),
        (" 8.6 12.0+PTX ", (), "sm_86 sm_120 compute_90"),
        ("8.6+PTX;8.0+PTX", (), "sm_86 sm_80 compute_80"),
    ],
)
def test_architectures(listed: str, gpus: tuple[str, ...], codes: str, toolkit: Path) -> None:
    env = {"CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": listed}
    found = cuda.find_cuda("auto", "13.0", gpus, env)
    assert str(found) == f"13.0 {codes}"
    assert found.link == [f"-L{toolkit}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


@pytest.mark.parametrize(
    ("listed", "parts"), [("Hopper", ["has Hopper in it", "9.0;12.0+PTX"]), ("7.0", ["compute capability 7.0"])]
)
def test_unknown_architecture(listed: str, parts: list[str], toolkit: Path) -> None:
    env = {"CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": listed}
    assert_sentence(sentence_of(cuda.find_cuda, "1", env=env), *parts)


def test_modes(toolkit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """auto builds CUDA kernels where torch has CUDA and there is an nvcc, else says that there is none; 1 insists."""
    env = {"CUDA_HOME": str(toolkit)}
    assert cuda.find_cuda("0", "13.0", env=env) is None
    assert cuda.find_cuda("auto", "", env=env) is None
    assert capsys.readouterr().out == ""
    for mode, torch_cuda in (("auto", "12.8"), ("1", "")):
        assert cuda.find_cuda(mode, torch_cuda, env=env).nvcc == f"{toolkit}/bin/nvcc"
    monkeypatch.setattr(cuda, "find_nvcc", lambda env: None)
    assert cuda.find_cuda("auto", "13.0", env=env) is None
    assert "no CUDA kernels" in capsys.readouterr().out
    assert_sentence(sentence_of(cuda.find_cuda, "1", env=env), "FASTNORM_CUDA=1", "install a CUDA toolkit")
    assert_sentence(sentence_of(cuda.cuda_mode, {"FASTNORM_CUDA": "check"}), "check is none of auto, 0 and 1")


def test_unsuitable_toolkit(toolkit: Path, tmp_path: Path) -> None:
    old = make_toolkit(tmp_path / "old", "11.8")
    assert_sentence(sentence_of(cuda.find_cuda, "1", env={"CUDA_HOME": str(old)}), "not of CUDA 12.0 or newer")
    (toolkit / "lib" / "libcudart_static.a").unlink()
    assert_sentence(sentence_of(cuda.find_cuda, "1", env={"CUDA_HOME": str(toolkit)}), "no libcudart_static.a")


# The build.


@pytest.fixture
def cuda_toy(toy: Path, tmp_path: Path) -> Path:
    """The toy of test_install with two CUDA sources, five kernels in all. (nvcc takes no $ in a path.)"""
    toy = toy.parent.rename(tmp_path / "a folder") / toy.name
    (toy / "cuda").mkdir()
    (toy / "cuda" / "forward.cu").write_text("FASTNORM_DTYPE __global__\n")
    (toy / "cuda" / "fold.cu").write_text("__global__\n")
    (toy / "cuda" / "dispatch.cpp").write_text("int cuda_dispatch() { return 5; }\n")
    (toy / "torch" / "backend_cuda.cpp").write_text("int backend() { return 6; }\n")
    return toy


def test_machine_code_is_made_from_the_ptx_of_its_generation() -> None:
    codes = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_90"]
    assert cuda.gencode_flags(codes) == [
        "-gencode=arch=compute_75,code=[sm_75]",
        "-gencode=arch=compute_80,code=[sm_80,sm_86]",
        "-gencode=arch=compute_90,code=[sm_90,sm_100,sm_120,compute_90]",
    ]
    assert cuda.gencode_flags(["sm_86"]) == ["-gencode=arch=compute_80,code=[sm_86]"]
    assert cuda.gencode_flags(["sm_70"]) == ["-gencode=arch=compute_70,code=[sm_70]"]
    # All that the sources tell apart are among them.
    text = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").iterdir()))
    told_apart = {int(number) // 10 for number in re.findall(r"__CUDA_ARCH__ [<>]=? (\d+)", text)}
    assert told_apart < set(cuda.GENERATIONS) and str(cuda.GENERATIONS[0]) == cuda.CUDA_ARCHS[0]


def test_objects_with_cuda(cuda_toy: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled once per storage type; the two files that report the build get its targets as a macro."""
    monkeypatch.delenv("FASTNORM_LINEINFO", raising=False)
    tools = make_tools({"baseline": []})
    env = {"CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}
    plain = {o.path: o.flags for o in setup.plan_objects(cuda_toy, tools, "1")}
    objects = setup.plan_objects(cuda_toy, tools._replace(cuda=cuda.find_cuda("1", env=env)), "1")
    flags = {o.path: o.flags for o in objects}
    place = "cuda-sm_80-sm_90-compute_90"
    kernels = {f"{place}/fold.o", *(f"{place}/forward.{dtype}.o" for dtype in cuda.STORAGE_TYPES)}
    assert set(flags) - set(plain) == {"kernels/cuda_dispatch.o", *kernels}
    assert {o.path for o in objects if o.rule == "nvcc"} == kernels
    for name in kernels:
        assert flags[name].count("-gencode=arch=compute_80,code=[sm_80]") == 1
        assert flags[name].count("-gencode=arch=compute_90,code=[sm_90,compute_90]") == 1
        assert ("-DFASTNORM_DTYPE=Float16" in flags[name]) == name.endswith("forward.Float16.o")
        assert "-lineinfo" not in flags[name]
    told = {Path(name).name for name in plain if flags[name] != plain[name]}
    assert told == {"torch_module.o", "torch_backend_cuda.o"}
    (module,) = (flags[name] for name in flags if name.endswith("torch_module.o"))
    assert '-DFASTNORM_CUDA_BUILD="13.0 sm_80 sm_90 compute_90"' in module


def test_lines_are_for_development(cuda_toy: Path) -> None:
    """What is installed has no line numbers, which more than double it."""
    assert not cuda.with_lines({}) and cuda.with_lines({"FASTNORM_LINEINFO": "1"})
    for lines in (False, True):
        objects = cuda.cuda_objects(cuda_toy, ["sm_90"], lines=lines, strict=False)
        assert all(("-lineinfo" in o.flags) == o.path.startswith("cuda-sm_90-lines/") == lines for o in objects)
        strict = cuda.cuda_objects(cuda_toy, ["sm_90"], lines=lines, strict=True)
        assert all("--Werror=all-warnings" in o.flags for o in strict)


def test_torch_tells_of_cuda() -> None:
    found = setup.find_torch()
    assert found.cuda == (torch.version.cuda or "")
    assert len(found.gpus) == torch.cuda.device_count()
