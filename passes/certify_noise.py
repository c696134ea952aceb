"""What noise in the last place does to the outputs of a torch model, as a whole and element by element.

An output may join rows that are chosen by rounding to others that are not: the first excuse anything of
the whole. So where an output is excused, its steady elements, which no noisy run moved by more than
rounding, are compared by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fx.passes.onnx_parity import Outputs, distance, distances
from lora_fx.passes.onnx_state import evaluating
from lora_fx.passes.onnx_subject import State
from lora_fx.passes.preserve import preserved
from lora_fx.passes.rounding_noise import RoundingNoise

NOISES = 4
"""Runs with noise in the last place: a choice that one of them makes alike, another may not."""
SHARE = 0.05
"""The least part of an output that counts as steady: where noise moves all of it, chance leaves a little."""
SLACK = 3
"""How many times as many elements may move in a further run as one run moves that no other one does."""


Run = Callable[[nn.Module], list[Outputs]]
"""What a model gives, per set of inputs."""


@dataclass(frozen=True)
class Noise:
    """The outputs of a model in one state, per set of inputs, and those of its noisy runs."""

    plain: Sequence[Outputs]
    noisy: Sequence[Sequence[Outputs]]

    @classmethod
    def of(cls, state: State, run: Run, plain: Sequence[Outputs]) -> Noise:
        """Run a model in some state with noise, several times; ``plain`` is what it gives without."""
        noisy: list[list[Outputs]] = []
        for seed in range(NOISES):
            with state() as model, evaluating(model), preserved(model), RoundingNoise(seed):
                noisy.append(run(model))
        return cls(plain, noisy)

    def moved(self) -> list[float]:
        """Return how far noise moves each output, on any of the inputs."""
        runs = (zip(run, self.plain, strict=True) for run in self.noisy)
        each = [distances(found, reference) for run in runs for found, reference in run]
        return [max(over) for over in zip(*each, strict=True)]

    def alone(self, output: int, least: float) -> float:
        """Return the largest share of an output, on any inputs, that one run moves and no other does."""
        found = [self._moves(case, output, least) for case in range(len(self.plain))]
        return max((_alone(moves) for moves in found if moves is not None), default=0.0)

    def steady(self, case: int, output: int, least: float, alone: float = 0.0) -> Steady | None:
        """Return the elements of an output that no run moves by more than ``least`` of its mean size.

        ``alone`` is the share that one run moves and no other does elsewhere: on other inputs, or with other
        weights. None where they are too few to tell, or where a run gives another shape.
        """
        moves = self._moves(case, output, least)
        if moves is None:
            return None
        mask = ~moves.any(0)
        slack = round(SLACK * max(alone, _alone(moves)) * mask.numel())
        steady = Steady(mask, slack)
        return steady if steady.count > slack and steady.share >= SHARE else None

    def _moves(self, case: int, output: int, least: float) -> Tensor | None:
        """Return which elements each run moves, or None where a run gives another shape."""
        reference = self.plain[case][output]
        runs = [run[case][output] for run in self.noisy]
        if not reference.numel() or any(run.shape != reference.shape for run in runs):
            return None
        gaps = torch.stack([_gap(run, reference) for run in runs])
        return ~(gaps <= least * _size(reference))


@dataclass(frozen=True)
class Steady:
    """Elements that noise leaves alone, but for so many that may move all the same."""

    mask: Tensor
    slack: int

    @property
    def count(self) -> int:
        """How many elements there are."""
        return int(self.mask.sum())

    @property
    def share(self) -> float:
        """Which part of the output they are."""
        return self.count / self.mask.numel()

    def distance(self, found: Tensor, reference: Tensor) -> float:
        """Return the distance over these elements alone, without the worst of them that may move."""
        if found.shape != reference.shape:
            return math.inf
        found, reference = found[self.mask], reference[self.mask]
        kept = _gap(found, reference).argsort()[: self.count - self.slack]
        return distance([found[kept]], [reference[kept]])


def _alone(moves: Tensor) -> float:
    """Return the largest share of the elements that one run moves and no other does."""
    alone = moves & (moves.sum(0) == 1)
    return float(alone.flatten(1).double().mean(1).max())


def _gap(found: Tensor, reference: Tensor) -> Tensor:
    """Return how far elements lie apart; infinitely, where only one is a number or they are no floats."""
    equal = (found == reference) | (found.isnan() & reference.isnan())
    if not reference.is_floating_point():
        return torch.where(equal, 0.0, math.inf)
    gap = (found.double() - reference.double()).abs().nan_to_num(math.inf, math.inf)
    return torch.where(equal, 0.0, gap)


def _size(reference: Tensor) -> float:
    """Return the root mean square of the finite elements."""
    finite = reference.double()[reference.isfinite()]
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0
