"""setup.py: its sentences where something is missing, its build. `python -m fastnorm`: the report, the self-test."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from setuptools import Distribution, Extension

import fastnorm
import fastnorm.__main__ as report
from fastnorm import _C

ROOT = Path(__file__).resolve().parent.parent


def load_setup() -> ModuleType:
    """setup.py as a module: only its definitions run."""
    spec = importlib.util.spec_from_file_location("fastnorm_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_setup()
HERE = setup.Torch(torch.__version__, Path(torch.__path__[0]), True)
SETUP = [path.name for path in ROOT.glob("setup*.py")]
COMPILER = setup.find_compiler()


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def fake_torch(folder: Path, code: str) -> dict[str, str]:
    """An environment in which `import torch` runs `code`."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(code)
    return {**os.environ, "PYTHONPATH": str(folder)}


OLD_TORCH = "__version__ = '2.9.1'\ndef compiled_with_cxx11_abi(): return True\n"
BROKEN_TORCH = "raise OSError('libcudart.so.13: cannot open shared object file')\n"


# One sentence says what is missing.


def sentence_of(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        call(*args, **kwargs)
    assert isinstance(stop.value.code, str)  # Python prints it, and exits with status 1
    return stop.value.code


def assert_sentence(text: str, *parts: str) -> None:
    assert re.fullmatch(r"fastnorm: [^\n]+\.", text)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("check", "argument", "parts"),
    [
        ("check_platform", "win32", ["Linux and macOS", "WSL 2"]),
        ("check_python", (3, 9), ["Python 3.9 is too old", "3.10 or newer"]),
        ("check_torch_version", "2.9.1+cpu", ["torch 2.9.1+cpu is too old", "pip install --upgrade 'torch>=2.10'"]),
        ("cuda_mode", {"FASTNORM_CUDA": "yes"}, ["none of auto, 0 and 1"]),
        ("max_jobs", {"MAX_JOBS": "many"}, ["MAX_JOBS=many", "1 or more"]),
        ("max_jobs", {"MAX_JOBS": "0"}, ["MAX_JOBS=0"]),
        ("find_compiler", {"CXX": "/no/such/g++ -v"}, ["/no/such/g++ -v named by CXX", "apt-get install g++"]),
        ("find_compiler", {"CXX": "false"}, ["does not run"]),
        ("find_python_headers", "/no/such/folder", ["no Python.h in /no/such/folder", "python3-dev"]),
    ],
)
def test_unsuitable(check: str, argument: object, parts: list[str]) -> None:
    assert_sentence(sentence_of(getattr(setup, check), argument), *parts)


@pytest.mark.parametrize("system", ["linux", "darwin"])
@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0+git1234", "main"])
def test_suitable(system: str, version: str) -> None:
    setup.check_platform(system)
    setup.check_torch_version(version)
    for mode in ("auto", "0", "1"):
        assert setup.cuda_mode({"FASTNORM_CUDA": mode}) == mode
    assert setup.cuda_mode({}) == setup.cuda_mode({"FASTNORM_CUDA": ""}) == "auto"
    assert setup.max_jobs({"MAX_JOBS": "3"}) == 3
    assert setup.max_jobs({}) >= 1


def test_no_torch() -> None:
    text = sentence_of(setup.find_torch, [sys.executable, "-I", "-S"])
    assert_sentence(text, "no", "pip install torch numpy ninja pybind11 setuptools", "--no-build-isolation .")


def test_old_torch(tmp_path: Path) -> None:
    assert_sentence(sentence_of(setup.find_torch, env=fake_torch(tmp_path, OLD_TORCH)), "torch 2.9.1 is too old")


def test_broken_torch(tmp_path: Path) -> None:
    text = sentence_of(setup.find_torch, env=fake_torch(tmp_path, BROKEN_TORCH))
    assert_sentence(text, "cannot be imported (OSError: libcudart.so.13")


def test_torch_hidden_by_isolation(tmp_path: Path) -> None:
    # pip isolates a build so: a sitecustomize, found by PYTHONPATH, takes the environment's packages away.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.path = [p for p in sys.path if 'site-packages' not in p]"
    )
    assert setup.find_torch(env={**os.environ, "PYTHONPATH": str(tmp_path)}).root == HERE.root


@pytest.mark.parametrize("standard", ["c++17", "none"])
def test_old_compiler(standard: str, tmp_path: Path) -> None:
    """One compiler knows only C++17, the other does not know -std=c++20."""
    old = tmp_path / "old-compiler"
    swap = f'set -- $(echo "$*" | sed s/c++20/{standard}/)' if standard == "c++17" else "exit 1"
    old.write_text(f'#!/bin/sh\ncase "$*" in *c++20*) {swap};; esac\nexec {" ".join(COMPILER.command)} "$@"\n')
    old.chmod(0o755)
    text = sentence_of(setup.find_compiler, {"CXX": str(old)})
    assert_sentence(text, COMPILER.version, "C++20", "g++ 11 or newer", "set CXX")


def test_no_ninja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert setup.find_ninja() == ["/usr/bin/ninja"]
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    assert_sentence(sentence_of(setup.find_ninja), "ninja is missing", "pip install ninja")


def test_no_pybind11(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert setup.find_pybind11(HERE) == HERE.root / "include"
    without = HERE._replace(root=tmp_path)
    assert_sentence(sentence_of(setup.find_pybind11, without), "pybind11 is missing", "pip install pybind11")


@pytest.mark.parametrize("command", [["build_ext"], ["dist_info"]], ids=" ".join)
@pytest.mark.parametrize("missing", ["compiler", "torch", "cuda"])
def test_no_traceback(command: list[str], missing: str, tmp_path: Path) -> None:
    """pip calls setup.py by two commands: both end with the sentence alone."""
    no_cuda = {"FASTNORM_CUDA": "1", "CUDA_HOME": "/no/such/folder"}
    env = {"compiler": {"CXX": "no-such-compiler"}, "cuda": no_cuda}.get(missing, {})
    if missing == "torch":
        env["PYTHONPATH"] = fake_torch(tmp_path, OLD_TORCH)["PYTHONPATH"]
    place = ["--build-lib", tmp_path] if command == ["build_ext"] else ["--output-dir", tmp_path]
    result = run("setup.py", "--quiet", *command, *place, **env)
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert_sentence(result.stderr.strip().splitlines()[-1])


# How it builds.


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Sources in the folders that setup.py knows, below one whose name has to be quoted."""
    sources = {
        "plan/grid.cpp": '#include "grid.h"\nint plan() { return kPlan; }\n',
        "plan/grid.h": "constexpr int kPlan = 1;\n",
        "cpu/dispatch.cpp": "int dispatch() { return 2; }\n",
        "cpu/kernels.cpp": "namespace FASTNORM_CPU_CAPABILITY { int run() { return 3; } }\n",
        "torch/ops.cpp": "int ops() { return 4; }\n",
        "torch/module.cpp": "const char* version() { return FASTNORM_VERSION FASTNORM_COMPILER; }\n",
    }
    csrc = tmp_path / "a folder: $x" / "csrc"
    for name, text in sources.items():
        (csrc / name).parent.mkdir(parents=True, exist_ok=True)
        (csrc / name).write_text(text)
    return csrc


def make_tools(capabilities: dict[str, list[str]]) -> Any:
    compiler = setup.find_compiler()
    return setup.Tools(HERE, compiler, capabilities, setup.find_ninja(), Path("/pybind11"), Path("/python"), 2)


CAPABILITIES = {"baseline": [], **setup.X86_CAPABILITIES}


def test_objects(toy: Path) -> None:
    objects = setup.plan_objects(toy, make_tools(CAPABILITIES), "1.2.3")
    names = [Path(o.path).name for o in objects]
    assert sorted(names[:4]) == ["cpu_dispatch.o", "plan_grid.o", "torch_module.o", "torch_ops.o"]
    assert names[4:] == ["cpu_kernels.baseline.o", "cpu_kernels.avx2.o", "cpu_kernels.avx512.o"]
    flags = {Path(o.path).name: o.flags for o in objects}
    for name in names:
        assert any(flag.startswith("-mavx") for flag in flags[name]) == ("avx" in name)
        assert ("-ffp-contract=off" in flags[name]) == ("kernels" in name)
        assert (f"-isystem{HERE.root / 'include'}" in flags[name]) == (name == "torch_ops.o")
        assert ("-isystem/pybind11" in flags[name]) == (name == "torch_module.o")
    assert "-DFASTNORM_CPU_CAPABILITY=avx512" in flags["cpu_kernels.avx512.o"]
    assert {"-DFASTNORM_HAVE_AVX2", "-DFASTNORM_HAVE_AVX512"} <= set(flags["cpu_dispatch.o"])


def test_objects_of_other_processors(toy: Path) -> None:
    objects = setup.plan_objects(toy, make_tools({"baseline": []}), "1.2.3")
    assert [o.path for o in objects if "cpu_kernels" in o.path] == ["kernels/cpu_kernels.baseline.o"]
    assert not any(flag.startswith(("-DFASTNORM_HAVE", "-mavx")) for o in objects for flag in o.flags)


def test_capabilities(tmp_path: Path) -> None:
    """setup.py leaves out an instruction set that the compiler does not know."""
    compiler = setup.find_compiler()
    assert list(setup.find_capabilities(compiler, "aarch64")) == ["baseline"]
    old = tmp_path / "old-compiler"
    old.write_text('#!/bin/sh\ncase "$*" in *avx512*) exit 1;; esac\n')
    old.chmod(0o755)
    assert list(setup.find_capabilities(compiler._replace(command=[str(old)]), "x86_64")) == ["baseline", "avx2"]


def test_incremental_build(toy: Path, tmp_path: Path) -> None:
    tools = make_tools({"baseline": []})
    objects = setup.plan_objects(toy, tools, 'a "quoted" $version')
    build = toy.parent
    rules = setup.ninja_file("toy.so", objects, tools.compiler.command, ["-shared"])
    (build / "build.ninja").write_text(rules)

    def compiled() -> list[str]:
        done = subprocess.run([*tools.ninja, "-C", str(build)], capture_output=True, text=True, check=True)
        return sorted(re.findall(r"\] (?:compile|link) (.*)", done.stdout))

    assert len(compiled()) == len(objects) + 1
    assert compiled() == []
    (toy / "plan" / "grid.h").write_text("constexpr int kPlan = 5;\n")
    assert compiled() == ["kernels/plan_grid.o", "toy.so"]
    assert b'a "quoted" $version' in (build / "toy.so").read_bytes()


def test_change_of_torch(toy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Another torch compiles its binding alone; going back to one compiles nothing, and gives the library that was
    built for it."""
    (toy / "torch" / "module.cpp").write_text("const char* torch() { return FASTNORM_TORCH_VERSION; }\n")
    tools = make_tools({"baseline": []})
    monkeypatch.setattr(setup, "ROOT", toy.parent)
    monkeypatch.chdir(toy.parent)
    (toy.parent / "fastnorm").mkdir()
    of_torch = ["torch_module.o", "torch_ops.o"]
    of_all = ["cpu_dispatch.o", "cpu_kernels.baseline.o", "plan_grid.o", *of_torch]
    for version, compiled in (("2.13.0", of_all), ("2.14.1", of_torch), ("2.13.0", [])):
        named = tools._replace(torch=HERE._replace(version=version))
        monkeypatch.setattr(setup, "find_tools", lambda named=named: named)
        distribution = Distribution(
            {"name": "toy", "version": "1", "packages": ["fastnorm"], "ext_modules": [Extension("fastnorm._C", [])]}
        )
        command = setup.BuildWithNinja(distribution)
        command.inplace = True
        command.ensure_finalized()
        command.run()
        (library,) = (toy.parent / "fastnorm").glob("_C.*")
        assert version.encode() in library.read_bytes()
        assert sorted(Path(name).name for name in re.findall(r"\] compile (.*)", capfd.readouterr().out)) == compiled


def test_source_distribution(tmp_path: Path) -> None:
    done = run("setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = [p for p in ROOT.glob("csrc/**/*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    needed += [*ROOT.glob("fastnorm/*.py"), *ROOT.glob("tests/*.py")]
    assert {str(p.relative_to(ROOT)) for p in needed} <= names
    assert {"fastnorm/py.typed", "fastnorm/_C.pyi", "LICENSE", "README.md", "pyproject.toml"} <= names
    assert set(SETUP) <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_make_builds_for_the_torch_and_the_environment_named(tmp_path: Path) -> None:
    """There is one library: make builds it when torch or the environment changes, and else does nothing."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("csrc/a.cpp", "tests/b.h", "requirements-dev.txt", *SETUP, "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    log = tmp_path / "log"
    for venv in (".venv", "other"):
        python = tmp_path / venv / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\necho "$*" >> "{log}"\n')
        python.chmod(0o755)

    # `make test TORCH=2.14.1` would pass its own variables on.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "TORCH", "VENV")}

    def done(*arguments: str) -> list[str]:
        log.write_text("")
        subprocess.run(["make", "--silent", "build", *arguments], cwd=tmp_path, env=env, check=True, timeout=60)
        return re.findall(r"torch==\S+|build_ext", log.read_text())

    assert done() == ["torch==2.13.0", "build_ext"]
    assert done() == []
    newest = ("TORCH=2.14.1", "VENV=other")
    assert done(*newest) == ["torch==2.14.1", "build_ext"]
    assert done(*newest) == []
    assert done() == ["build_ext"]
    assert done("TORCH=2.14.1") == ["torch==2.14.1", "build_ext"]
    assert done() == ["torch==2.13.0", "build_ext"]
    os.utime(tmp_path / "csrc/a.cpp", (time.time() + 9, time.time() + 9))
    assert done() == ["build_ext"]


# Facts written in several places are the same in all.


def test_version() -> None:
    version = fastnorm.__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert _C.build_info()["version"] == version


def test_continuous_integration_installs_as_readme_says() -> None:
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in re.findall(r"^(?:pip install|python -m fastnorm)[^`\n]*$", readme, re.MULTILINE):
        assert command in script


# python -m fastnorm


def test_report(tmp_path: Path) -> None:
    done = run("-m", "fastnorm", cwd=tmp_path, PYTHONPATH=str(ROOT), FASTNORM_CPU="baseline")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in (
        fastnorm.__version__,
        torch.__version__,
        "baseline in use of",
        "FASTNORM_CPU=baseline",
        "no CUDA kernels" if _C.build_info()["cuda"] == "none" else "kernels for sm_",
    ):
        assert part in done.stdout
    assert done.stdout.count("all agree.\n") == done.stdout.count("Self-test on ") / 2 >= 1
    assert done.stderr == ""


def test_report_of_wrong_values(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(report.LIMITS, torch.float16, 0.0)
    assert report.main() == 1
    printed = capsys.readouterr().out
    assert "FAIL LayerNorm 21x70 float16: differs" in printed
    assert "float32: differs" not in printed


def test_report_of_another_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        _C, "build_info", lambda: {"compiler": "g++", "torch": "2.10.0", "cpu_capabilities": "avx2", "cuda": "none"}
    )
    assert report.main() == 1
    assert f"WARNING: fastnorm was built for torch 2.10.0, and {torch.__version__} runs" in capsys.readouterr().out


@pytest.mark.parametrize("torch_cuda", [None, "13.0"])
@pytest.mark.parametrize("built", ["none", "13.0 sm_80 sm_90 compute_90"])
def test_report_of_cuda(built: str, torch_cuda: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    kernels, torchs = report.cuda(built).split("; ")
    assert kernels == (
        "no CUDA kernels in this build" if built == "none" else "kernels for sm_80 sm_90 compute_90 by CUDA 13.0"
    )
    assert torchs == ("torch has CUDA 13.0, devices: NVIDIA T4 (sm_75)" if torch_cuda else "torch has no CUDA")


def test_stream() -> None:
    """fastnorm finds torch's CUDA streams wherever torch has CUDA, even in a build without CUDA kernels."""
    assert _C.has_stream() == (torch.version.cuda is not None)


def test_report_of_kernels_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastnorm, "explain", lambda *args: "torch: why not")
    assert report.run_trial(next(report.trials()), torch.float32).why == "torch: why not"


def test_unknown_kernels() -> None:
    done = run("-c", "import fastnorm", FASTNORM_CPU="sse9")
    assert done.returncode != 0
    assert "FASTNORM_CPU=sse9" in done.stderr
    assert "baseline" in done.stderr.strip().splitlines()[-1]
