"""Run a function in two processes that talk by gloo, and raise what either raises."""

from __future__ import annotations

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


def _start(rank: int, folder: str, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    store = dist.FileStore(str(Path(folder) / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    try:
        for number, (work, args) in enumerate(jobs):
            own = Path(folder) / str(number)
            own.mkdir(exist_ok=True)
            work(rank, own, *args)
    finally:
        dist.destroy_process_group()


def in_two_processes(folder: Path, *jobs: Job) -> None:
    """Run ``work(rank, folder / number, *args)`` of each job, one after the other, in two new processes.

    The functions are those of an importable module. Starting a process costs seconds: share them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_start, args=(str(folder), list(jobs)), nprocs=WORLD)
