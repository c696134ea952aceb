"""The form that the cost model takes beside both that a rule can ask for, on shapes of either kind."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.benchmarks.arms import Arm
from tests.benchmarks.measure import estimate, take_turns
from tests.benchmarks.table import Figure, Findings

SECONDS, RANK = 12.0, 16
Compute = Literal["auto", "branch", "weight"]


def _mlp(width: int, rows: int) -> tuple[nn.Module, Tensor]:
    layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    return layers, torch.randn(rows, width)


def _convolutions() -> tuple[nn.Module, Tensor]:
    pair = (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
    return nn.Sequential(*pair), torch.randn(4, 64, 28, 28)


def _small() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(12))), torch.randn(8, 32)


SHAPES: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], set[str]]] = {
    "few rows (512 of 768)": (lambda: _mlp(768, 512), {"added"}),
    "many rows (4096 of 128)": (lambda: _mlp(128, 4096), {"merged"}),
    "convolutions (64 channels, 28 x 28)": (_convolutions, {"merged"}),
    "dispatch alone (8 rows of 32)": (_small, {"kept"}),
}


def _arm(name: str, compute: Compute, base: nn.Module, x: Tensor) -> Arm:
    model = copy.deepcopy(base)
    plan = lora_fx.plan(model, lora_fx.Policy(lora_fx.Rule(rank=RANK, compute=compute)), x)
    lora_fx.inject(model, plan, x, seed=0)
    given = x.clone().requires_grad_()
    arm = Arm(name, model, lambda model: model(given).sum())
    arm.trained = list(lora_fx.parameters(model))
    return arm


@pytest.mark.bench
@pytest.mark.parametrize("shape", SHAPES)
def test_no_form_that_can_be_asked_for_is_faster(shape: str, findings: Findings) -> None:
    torch.manual_seed(0)
    make, expected = SHAPES[shape]
    base, x = make()
    policy = lora_fx.Policy(lora_fx.Rule(rank=RANK))
    assert {d.expected for d in lora_fx.plan(base, policy, x).adapted} == expected
    arms = [
        _arm("auto", "auto", base, x),
        _arm("again", "auto", base, x),
        _arm("branch", "branch", base, x),
        _arm("weight", "weight", base, x),
    ]
    take_turns(arms, SECONDS)
    auto, *others = arms

    def over(other: Arm) -> Callable[[list[int]], float]:
        return lambda rounds: statistics.median(auto.seconds[i] / other.seconds[i] for i in rounds)

    ratios = {arm.name: estimate(over(arm), len(auto.seconds)) for arm in others}
    milliseconds = {arm.name: f"{statistics.median(arm.seconds) * 1e3:.2f} ms" for arm in arms}
    print(f"\n{shape}: {milliseconds}, auto over " + ", ".join(f"{n} {r}" for n, r in ratios.items()))
    most = max(1.02, ratios["again"].high)
    for name in ("branch", "weight"):
        what = f"auto over {name}, {shape}: the lower end of its interval"
        findings.check(Figure(what, ratios[name].low, most, "x"))
