"""setup.py and CUDA: the toolkit it finds, its targets, its check mode. nvcc is a shell script here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_install import assert_sentence, load_setup, make_tools, run, sentence_of
from tests.test_install import toy as toy  # a fixture

setup = load_setup()
cuda = setup.sys.modules["setup_cuda"]

# It "compiles" by copying, and writes ptxas's lines to stderr.
NVCC = """#!/bin/sh
case "$*" in
    *--version*) echo "Cuda compilation tools, release VERSION, V0.0.0"; exit ;;
    *--list-gpu-code*) printf "sm_75\\nsm_80\\nsm_86\\nsm_90\\nsm_100\\nsm_120\\n"; exit ;;
    *--dryrun*) echo '#$ LIBRARIES=  "-LFOLDER/lib/stubs" "-LFOLDER/lib"' >&2; exit ;;
esac
while [ $# -gt 0 ]; do
    case "$1" in -o) out=$2 ;; -MF) dep=$2 ;; *.cu) src=$1 ;; esac
    shift
done
if grep -q broken "$src"; then echo "error: broken" >&2; exit 1; fi
cp "$src" "$out"
echo "$out: $(echo "$src" | sed 's/ /\\\\ /g')" > "$dep"
grep -o '__global__' "$src" | sed 's/.*/ptxas info    : Compiling entry function/' >&2
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
        ("", (), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120"),
        ("", ("9.0", "8.0", "9.0"), "sm_80 sm_90"),
        ("9.0", ("8.0",), "sm_90"),
        ("7.5;9.0a+PTX", (), "sm_75 sm_90 compute_90"),
        (" 8.6 12.0+PTX ", (), "sm_86 sm_120 compute_120"),
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
    for mode, torch_cuda in (("auto", "12.8"), ("1", ""), ("check", "")):
        assert cuda.find_cuda(mode, torch_cuda, env=env).nvcc == f"{toolkit}/bin/nvcc"
    monkeypatch.setattr(cuda, "find_nvcc", lambda env: None)
    assert cuda.find_cuda("auto", "13.0", env=env) is None
    assert "no CUDA kernels" in capsys.readouterr().out
    for mode in ("1", "check"):
        assert_sentence(sentence_of(cuda.find_cuda, mode, env=env), f"FASTNORM_CUDA={mode}", "install a CUDA toolkit")


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


DTYPES = ("float", "double", "BFloat16", "Float16")


def test_objects_with_cuda(cuda_toy: Path, toolkit: Path) -> None:
    """Kernels are compiled once per storage type; the two files that report the build get its targets as a macro."""
    tools = make_tools({"baseline": []})
    env = {"CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}
    plain = {o.path: o.flags for o in setup.plan_objects(cuda_toy, tools, "1")}
    objects = setup.plan_objects(cuda_toy, tools._replace(cuda=cuda.find_cuda("1", env=env)), "1")
    flags = {o.path: o.flags for o in objects}
    kernels = {"cuda_fold.o", *(f"cuda_forward.{dtype}.o" for dtype in DTYPES)}
    assert set(flags) - set(plain) == {"cuda_dispatch.o", *kernels}
    assert {o.path for o in objects if o.rule == "nvcc"} == kernels
    for name in kernels:
        assert flags[name].count("-gencode=arch=compute_80,code=sm_80") == 1
        assert flags[name].count("-gencode=arch=compute_90,code=compute_90") == 1
        assert ("-DFASTNORM_DTYPE=Float16" in flags[name]) == (name == "cuda_forward.Float16.o")
    told = {name for name in plain if flags[name] != plain[name]}
    assert told == {"torch_module.o", "torch_backend_cuda.o"}
    assert '-DFASTNORM_CUDA_BUILD="13.0 sm_80 sm_90 compute_90"' in flags["torch_module.o"]


def test_lines_are_for_development(cuda_toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed has no line numbers, which more than double it."""
    monkeypatch.delenv("FASTNORM_LINEINFO", raising=False)
    assert not any("-lineinfo" in o.flags for o in setup.plan_cuda_objects(cuda_toy, []))
    monkeypatch.setenv("FASTNORM_LINEINFO", "1")
    assert all("-lineinfo" in o.flags for o in setup.plan_cuda_objects(cuda_toy, []))


@pytest.fixture
def checked(cuda_toy: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that check mode writes to, for the toy and the toolkit."""
    monkeypatch.setattr(setup, "ROOT", cuda_toy.parent)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("MAX_JOBS", "1")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return cuda_toy.parent / "build" / "cuda-check"


def cubins(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.cubin")}


def test_check(checked: Path, capfd: pytest.CaptureFixture[str]) -> None:
    setup.check_cuda()
    kernels = ("cuda_fold", *(f"cuda_forward.{dtype}" for dtype in DTYPES))
    assert cubins(checked) == {f"{k}.sm_{arch}.cubin" for k in kernels for arch in cuda.CUDA_ARCHS}
    printed = capfd.readouterr().out
    assert printed.index("sm_90.cubin") < printed.index("sm_75.cubin")
    assert "5 kernels, at most 300 are allowed" in printed.splitlines()[-1]
    assert all(f"sm_{arch}" in printed.splitlines()[-1] for arch in cuda.CUDA_ARCHS)

    setup.check_cuda()
    assert "compile " not in capfd.readouterr().out
    fold = checked.parent.parent / "csrc" / "cuda" / "fold.cu"
    os.utime(fold)
    setup.check_cuda()
    assert capfd.readouterr().out.count("compile ") == len(cuda.CUDA_ARCHS)
    fold.unlink()
    setup.check_cuda()
    assert not any("fold" in name for name in cubins(checked))


def test_check_of_one_architecture(checked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0+PTX")
    setup.check_cuda()
    assert len(cubins(checked)) == 5 and all(".sm_80." in name for name in cubins(checked))


def test_check_refuses(checked: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(setup, "KERNEL_BUDGET", 4)
    assert_sentence(sentence_of(setup.check_cuda), "more than 4 kernels")
    (checked.parent.parent / "csrc" / "cuda" / "fold.cu").write_text("broken")
    assert_sentence(sentence_of(setup.check_cuda), "do not compile")
    assert "error: broken" in capfd.readouterr().out


@pytest.mark.parametrize("command", ["build_ext", "dist_info"])
def test_check_installs_nothing(command: str, toolkit: Path, tmp_path: Path) -> None:
    """Check mode refuses pip, which would make a package without the extension; only build_ext runs the check."""
    if command == "build_ext":
        env: dict[str, Any] = {"CUDA_HOME": "/no/such/folder"}
        expected = "/no/such/folder has no bin/nvcc"
    else:
        env, expected = {"CUDA_HOME": str(toolkit)}, "FASTNORM_CUDA=check installs nothing"
    options = ["--output-dir", tmp_path] if command == "dist_info" else []
    done = run("setup.py", "--quiet", command, *options, FASTNORM_CUDA="check", **env)
    assert done.returncode == 1
    assert_sentence(done.stderr.strip().splitlines()[-1], expected)


def test_torch_tells_of_cuda() -> None:
    found = setup.find_torch()
    assert found.cuda == (torch.version.cuda or "")
    assert len(found.gpus) == torch.cuda.device_count()
