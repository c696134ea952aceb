"""Which elements of an output noise leaves alone, and how far a run lies from another over these."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_fx.passes.certify_noise import Noise

LEAST = 1e-3
PLAIN = torch.linspace(1, 2, 100)


def noise_of(*runs: Tensor, plain: Tensor = PLAIN) -> Noise:
    return Noise([[plain]], [[[run]] for run in runs])


def moved(*elements: int, by: float = 0.5) -> Tensor:
    out = PLAIN * (1 + 1e-7)
    out[list(elements)] += by
    return out


def test_what_no_run_moves_is_compared_alone() -> None:
    steady = noise_of(moved(3, 7), moved(3, 7), moved(7, 3)).steady(0, 0, LEAST)
    assert steady is not None
    assert (steady.count, steady.slack) == (98, 0)
    assert steady.share == pytest.approx(0.98)
    assert steady.distance(moved(3), PLAIN) < 1e-6
    one = moved(3, 50, by=1e-3)
    assert steady.distance(one, PLAIN) == pytest.approx(1e-3 / float(PLAIN.norm()), rel=0.05)
    assert steady.distance(PLAIN[:50], PLAIN) == math.inf


def test_as_many_may_move_in_a_further_run_as_one_moves_alone() -> None:
    steady = noise_of(moved(3, 7), moved(3, 9), moved(3)).steady(0, 0, LEAST)
    assert steady is not None
    assert (steady.count, steady.slack) == (97, 3)
    assert steady.distance(moved(20, 21, 22), PLAIN) < 1e-6
    assert steady.distance(moved(20, 21, 22, 23), PLAIN) > 1e-2


def test_a_not_a_number_that_is_new_is_no_agreement() -> None:
    steady = noise_of(moved(3)).steady(0, 0, LEAST)
    assert steady is not None
    other = moved()
    other[10:20] = math.nan
    assert steady.distance(other, PLAIN) == math.inf


def test_what_noise_moves_everywhere_has_no_steady_part() -> None:
    few = noise_of(*[moved(*range(4, 100))] * 4)
    assert few.steady(0, 0, LEAST) is None
    generator = torch.Generator().manual_seed(0)
    chaotic = [PLAIN + torch.randn(100, generator=generator) * 2e-3 for _ in range(4)]
    assert noise_of(*chaotic).steady(0, 0, LEAST) is None
    assert noise_of(PLAIN[:99]).steady(0, 0, LEAST) is None


def test_whole_numbers_are_alike_or_not() -> None:
    counts = torch.arange(100)
    other = counts.clone()
    other[5] += 1
    steady = noise_of(counts, counts, plain=counts).steady(0, 0, LEAST)
    assert steady is not None
    assert steady.distance(counts, counts) == 0
    assert steady.distance(other, counts) == 0.01


def test_as_many_may_move_as_one_run_moves_alone_on_other_inputs() -> None:
    """A near tie that no run of these inputs broke may be broken by the runtime, as one was on others."""
    plain = [[PLAIN], [PLAIN]]
    noise = Noise(plain, [[[moved(3, 4)], [moved()]], [[moved()], [moved()]]])
    alone = noise.alone(0, LEAST)
    assert alone == pytest.approx(0.02)
    steady = noise.steady(1, 0, LEAST, alone)
    assert steady is not None
    assert (steady.count, steady.slack) == (100, 6)
    assert steady.distance(moved(20, 21), PLAIN) < 1e-6
    assert steady.distance(moved(*range(20, 27)), PLAIN) > 1e-2
