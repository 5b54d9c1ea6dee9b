"""The facts that every measurement states: processor, versions, commit, date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

import fastnorm
from fastnorm import _C
from fastnorm.__main__ import cpu_model

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CACHE_BYTES = 32 << 20  # a server's share of L3, where the system does not say


def cpu_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_bytes(device: str = "cpu") -> int:
    """Size of the last cache before memory: L3 of the processor, L2 of the GPU."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [0]
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = index.read_text().strip()
        except OSError:
            continue
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes) or DEFAULT_CACHE_BYTES


def busy_cores(seconds: float = 0.25) -> float:
    """The number of cores that other processes keep busy while this one sleeps; 0.0 where the system does not tell."""

    def ticks() -> tuple[int, int]:
        user, nice, system, idle, wait, *_ = map(int, Path("/proc/stat").read_text().split()[1:8])
        return user + nice + system, idle + wait

    try:
        busy, idle = ticks()
        time.sleep(seconds)
        busy, idle = (after - before for after, before in zip(ticks(), (busy, idle), strict=True))
    except (OSError, ValueError):
        return 0.0
    return round((os.cpu_count() or 1) * busy / max(busy + idle, 1), 2)


CLOCK = r"""
#include <stdio.h>
#include <time.h>
#define ADD x += i; __asm__ volatile("" : "+r"(x));
int main(void) {
  double best = 1e18;
  for (int round = 0; round < 9; ++round) {
    struct timespec a, b;
    unsigned long x = 1;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (unsigned long i = 0; i < 2000000; ++i) { ADD ADD ADD ADD ADD ADD ADD ADD }
    clock_gettime(CLOCK_MONOTONIC, &b);
    const double ns = (b.tv_sec - a.tv_sec) * 1e9 + (b.tv_nsec - a.tv_nsec);
    if (ns < best) best = ns;
  }
  printf("%.2f", 16e6 / best);
}
"""


def clock_ghz() -> float | None:
    """Cycles in a nanosecond, by a chain of additions of one cycle each; None where no C compiler is found."""
    with tempfile.TemporaryDirectory() as place:
        source, program = Path(place) / "clock.c", Path(place) / "clock"
        source.write_text(CLOCK)
        try:
            subprocess.run([os.environ.get("CC", "cc"), "-O2", source, "-o", program], check=True, capture_output=True)
            return float(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
        except (OSError, subprocess.CalledProcessError):
            return None


def commit() -> str:
    """The commit of this checkout, with '+' when files differ from it, or 'unknown'."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(device: str) -> dict[str, object]:
    """Machine, versions, commit and date, ready for JSON."""
    machine: dict[str, object] = {
        "cpu": cpu_model(),
        "cores": cpu_cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "cache_bytes": cache_bytes(device),
        "busy_cores": busy_cores(),
        "clock_ghz": clock_ghz(),
        "fastnorm_capability": _C.cpu_capability(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(0)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastnorm": fastnorm.__version__,
    }
    if device == "cuda":
        versions |= {
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "fastnorm_cuda": _C.build_info()["cuda"],
        }
    return {
        "machine": machine,
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def where(machine: Mapping[str, object]) -> str:
    """The device of a run, in words, from `describe`'s machine."""
    host = f"{machine['cpu']}, {machine['threads']} threads, {machine['fastnorm_capability']}"
    return str(machine.get("gpu") or host)


def refusals() -> str:
    """How many launches the GPU has refused in this process. Slower plans replaced them: the times are of those."""
    refused = _C.refused_gangs()
    warning = ": the GPU is shared or partitioned, and slower plans were timed in their place" if refused else ""
    return f"refused launches: {refused}{warning}"
