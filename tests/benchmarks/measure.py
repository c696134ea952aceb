"""What is measured of a training step: time in turns, operations, FLOPs, saved and peak bytes."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.arms import Arm

_DRAWS = 1000


def take_turns(arms: list[Arm], seconds: float, rounds: int = 9) -> None:
    """Run the arms in turns until ``seconds`` of CPU are used up.

    Each round has an order of its own: in any fixed one, an arm would always find the caches as the same
    neighbour left them.
    """
    draw = random.Random(0)
    for arm in arms:
        for _ in range(3):
            arm.step()
    gc.collect()
    gc.disable()
    try:
        end, done = time.process_time() + seconds, 0
        while done < rounds or time.process_time() < end:
            for arm in draw.sample(arms, len(arms)):
                arm.seconds.append(_timed(arm))
            done += 1
    finally:
        gc.enable()


def _timed(arm: Arm) -> float:
    """The seconds of one step: the process's on the CPU, between two events on a GPU."""
    if arm.device == "cpu":
        started = time.process_time()
        arm.step()
        return time.process_time() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    arm.step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Interval:
    """A median and its 95% bootstrap interval over the rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(figure: Callable[[list[int]], float], rounds: int) -> Interval:
    """Return a figure of the rounds whose numbers it is given, over all of them and over redrawn ones."""
    draw = random.Random(0)
    every = range(rounds)
    found = sorted(figure(draw.choices(every, k=rounds)) for _ in range(_DRAWS))
    return Interval(figure(list(every)), found[_DRAWS // 40], found[-_DRAWS // 40])


@dataclass(frozen=True)
class Times:
    """The seconds of every arm, round by round; the floor of a round is the mean of its two runs."""

    seconds: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        return len(self.seconds["floor"])

    def control(self) -> Interval:
        """The floor over the floor: how far from 1 it is says what can be seen."""
        return self._ratio("floor again", "floor")

    def over_floor(self, name: str) -> Interval:
        return estimate(lambda rounds: self._median_over_floor(name, rounds), self.rounds)

    def over_peft(self) -> Interval:
        return self._ratio("lora_fx", "peft")

    def quotient(self) -> Interval:
        """lora_fx's overhead over peft's."""

        def figure(rounds: list[int]) -> float:
            ours, theirs = (self._median_over_floor(name, rounds) - 1 for name in ("lora_fx", "peft"))
            return ours / max(theirs, 1e-9)

        return estimate(figure, self.rounds)

    def excess(self, limit: float) -> Interval:
        """lora_fx's overhead less ``limit`` times peft's, in units of the floor."""

        def figure(rounds: list[int]) -> float:
            ours, theirs = (self._median_over_floor(name, rounds) - 1 for name in ("lora_fx", "peft"))
            return ours - limit * theirs

        return estimate(figure, self.rounds)

    def _ratio(self, name: str, other: str) -> Interval:
        pairs = [a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True)]
        return estimate(lambda rounds: statistics.median(pairs[i] for i in rounds), self.rounds)

    def _median_over_floor(self, name: str, rounds: list[int]) -> float:
        arm, floor, again = (self.seconds[n] for n in (name, "floor", "floor again"))
        return statistics.median(2 * arm[i] / (floor[i] + again[i]) for i in rounds)


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


def _added(y: Any, left: Any, right: Any, **options: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


_IN_PLACE = {torch.ops.aten.addmm_: _added}
"""torch's own counter passes over products that are added in place."""


def flops(arm: Arm) -> int:
    """The floating-point operations of one step's products and convolutions, those in place too."""
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
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


def peak_bytes(arm: Arm) -> int:
    """The most bytes that one step holds at once, on top of the model and its input."""
    if arm.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arm.step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        arm.step()
    kineto: Any = profiled.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
