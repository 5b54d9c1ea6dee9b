"""Processes of one torch.distributed group (gloo, on this machine), which call functions together.

    with ranks(4) as world:
        results = world.call(function, *args)     # function(*args) on every rank at the same time

The processes stay for the next test: to start one takes as long as to import torch.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WAIT_S = 180  # for an answer: the first call of torch.compile takes its time


class RankError(AssertionError):
    """A function raised on some ranks. args: their tracebacks, by rank."""


class World:
    """`size` processes that wait for functions to call."""

    def __init__(self, size: int, timeout_s: float = 60) -> None:
        self.size = size
        self.alive = True
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = context.Process(target=_serve, args=(rank, size, store, timeout_s, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(*args) of every rank, by rank. RankError where it raises."""
        results, failures = self.try_call(function, *args)
        if failures:
            self.close()  # the others may wait for what never comes
            raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return results

    def try_call(self, function: Callable[..., Any], *args: Any) -> tuple[list[Any], dict[int, str]]:
        """The same: results (None where there is none), and the tracebacks of the ranks where it raised."""
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        results: list[Any] = [None] * self.size
        failures: dict[int, str] = {}
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(WAIT_S):
                    raise EOFError(f"no answer within {WAIT_S} s")
                results[rank], failure = pickle.loads(pipe.recv_bytes())
            except EOFError as error:
                failure = f"the process is gone or stuck: {error}"
            if failure is not None:
                failures[rank] = failure
        return results, failures

    def close(self) -> None:
        self.alive = False
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, timeout_s: float, pipe: Connection) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            torch.manual_seed(rank)
            answer = function(*args), None
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


_worlds: dict[int, World] = {}


@contextlib.contextmanager
def ranks(size: int) -> Iterator[World]:
    """The world of this size, started where there is none."""
    world = _worlds.get(size)
    if world is None or not world.alive:
        world = _worlds[size] = World(size)
    yield world


def close_all() -> None:
    for world in _worlds.values():
        if world.alive:
            world.close()
    _worlds.clear()
