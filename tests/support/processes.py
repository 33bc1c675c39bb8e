"""A fresh interpreter, and a function in several processes that form a process group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

#: glibc maps blocks of their own, which return to the system when they are freed, from a size on that grows with what
#: was freed before: with this it stays, so that the memory of a process is what the process holds
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run_python(script: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Any:
    """What a fresh interpreter prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def distributed(function: Callable[..., Any], *arguments: Any, folder: Path, world: int = 2) -> list[Any]:
    """What function(*arguments) returns on every rank: numbers, tensors, and lists and dicts of them."""
    running = torch.multiprocessing.spawn(_run, (world, folder, function, arguments), nprocs=world, join=False)
    deadline = time.monotonic() + 240
    while not running.join(timeout=1):
        if time.monotonic() > deadline:
            for process in running.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} is still running in {world} processes")
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(world)]


def _run(rank: int, world: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(function(*arguments), folder / str(rank))
    torch.distributed.barrier()
    # Taking a group down joins its threads, which may be waiting for Python's lock: now and then it hangs
    os._exit(0)
