"""cuobjdump, from the package index: what is inside the objects that nvcc compiles."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path

TOOLS = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"


def cuobjdump(*arguments: str, cwd: Path | None = None) -> str:
    """What it prints. It finds nvdisasm on PATH."""
    env = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}
    command = [str(TOOLS / "cuobjdump"), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=True).stdout


def extract_ptx(obj: Path, ptx: Path) -> None:
    """Writes the object's PTX, which is of one architecture, to a file, unless the file is newer."""
    if ptx.is_file() and ptx.stat().st_mtime_ns > obj.stat().st_mtime_ns:
        return
    ptx.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ptx.parent) as folder:
        cuobjdump("-xptx", "all", str(obj), cwd=Path(folder))
        (found,) = Path(folder).glob("*.ptx")
        os.utime(found)
        found.replace(ptx)
