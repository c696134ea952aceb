"""Probing and verifying leave no trace, and do as the forward does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.odd_models import Force, Remembering


def test_a_model_that_keeps_what_it_computed_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model, x = Remembering().double(), torch.randn(4, 6, dtype=torch.float64)
    fresh = copy.deepcopy(model)
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x)
    lora_fx.verify(model, x)
    assert not model.memory
    assert model.runs == 0
    with torch.no_grad():
        assert torch.equal(model(x), fresh(x))


def test_a_forward_that_takes_gradients_itself() -> None:
    torch.manual_seed(0)
    model, x = Force(), torch.randn(4, 6)
    plan = lora_fx.plan(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x)
    assert {d.name for d in plan.adapted} >= {"first.weight"}
    lora_fx.inject(model, plan, x, seed=0)
    lora_fx.verify(model, x).raise_for_failure()


WRITES: dict[str, Callable[[nn.Parameter, Tensor], Any]] = {
    "in place": lambda key, query: key.mul_(0.9).add_(query, alpha=0.1),
    "through data": lambda key, query: key.data.mul_(0.9).add_(query, alpha=0.1),
    "other memory": lambda key, query: setattr(key, "data", key.data * 0.9 + query * 0.1),
    "in place, then other memory": lambda key, query: setattr(key, "data", key.mul_(0.9) + query * 0.1),
    "many at once": lambda key, query: torch._foreach_lerp_([key.data], [query], 0.1),
}


class Momentum(nn.Module):
    """In train mode its key weight follows its query weight, as MoCo's and BYOL's does."""

    def __init__(self, write: Callable[[nn.Parameter, Tensor], Any]) -> None:
        super().__init__()
        self.query, self.key, self.write = nn.Linear(6, 6), nn.Linear(6, 6), write

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.write(self.key.weight, self.query.weight.detach())
        return self.query(x) * self.key(x).detach()


@pytest.mark.parametrize("what", sorted(WRITES))
@pytest.mark.parametrize("training", [False, True])
def test_parameters_that_the_forward_writes_are_put_back(what: str, training: bool) -> None:
    torch.manual_seed(0)
    model, x = Momentum(WRITES[what]).double().train(training), torch.randn(4, 6, dtype=torch.float64)
    key, before = model.key.weight, model.key.weight.detach().clone()
    lora_fx.trace(model, x)
    assert torch.equal(key, before)
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(name="query.weight", rank=2)), x, seed=0)
    assert torch.equal(key, before)
    report = lora_fx.verify(model, x)
    assert model.key.weight is key
    assert torch.equal(key, before)
    report.raise_for_failure()
