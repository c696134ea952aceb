"""Run functions in two processes, or more, that talk by gloo, and raise what either raises.

Importing torch and its distributed parts costs seconds of each process: a server of forks imports them
once, and every process is a fork of it, with memory of its own.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2

Job = tuple[Callable[..., None], tuple[Any, ...]]


def _start(rank: int, folder: str, world: int, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    # What torchrun sets, for libraries that ask.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", TORCHELASTIC_RUN_ID="none")
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    try:
        for number, (work, args) in enumerate(jobs):
            own = Path(folder) / str(number)
            own.mkdir(exist_ok=True)
            work(rank, own, *args)
    finally:
        dist.destroy_process_group()


def in_two_processes(folder: Path, *jobs: Job) -> None:
    """Run ``work(rank, folder / number, *args)`` of each job, one after the other, in two new processes.

    The functions are those of an importable module; arguments are pickled.
    """
    in_processes(WORLD, folder, *jobs)


def in_processes(world: int, folder: Path, *jobs: Job) -> None:
    """Run the jobs in so many new processes."""
    folder.mkdir(parents=True, exist_ok=True)
    preload = [
        f"tests.{name}"
        for name in ("conftest", "integration.corners", "integration.fused", "integration.tensor_corners")
    ]
    multiprocessing.set_forkserver_preload(preload)
    mp.start_processes(_start, args=(str(folder), world, list(jobs)), nprocs=world, start_method="forkserver")
