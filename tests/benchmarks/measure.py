"""What is measured of a training step: CPU time in turns, operations, FLOPs, saved bytes."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.arms import Arm


def take_turns(arms: list[Arm], seconds: float, rounds: int = 5) -> None:
    """Run the arms in turns, the order reversed every other time, at least ``rounds`` times."""
    for arm in arms:
        arm.step()
        arm.step()
    gc.collect()
    gc.disable()
    try:
        end, done = time.perf_counter() + seconds, 0
        while done < rounds or time.perf_counter() < end:
            for arm in arms if done % 2 else arms[::-1]:
                started = time.process_time()
                arm.step()
                arm.seconds.append(time.process_time() - started)
            done += 1
    finally:
        gc.enable()


def ratio(arm: Arm, floor: Arm) -> tuple[float, float, float]:
    """Return the median of the paired ratios of time, and its 95% bootstrap interval."""
    pairs = [a / f for a, f in zip(arm.seconds, floor.seconds, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(1000))
    return statistics.median(pairs), medians[25], medians[974]


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(arm: Arm) -> int:
    """The aten operations of one step, views included."""
    with _Counter() as counter:
        arm.step()
    return counter.count


def flops(arm: Arm) -> int:
    """The floating-point operations of one step's products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        arm.step()
    return counter.get_total_flops()


def saved_bytes(arm: Arm) -> int:
    """The bytes of distinct storages that the forward keeps for the backward, parameters left out."""
    return saved_by(lambda: arm.loss(arm.model), arm.model)


def saved_by(run: Callable[[], Tensor], model: nn.Module) -> int:
    """The bytes of distinct storages that ``run`` keeps, the model's parameters and buffers left out."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    del kept
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())
