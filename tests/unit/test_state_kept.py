"""Probing and verifying leave no trace, and do as the forward does."""

from __future__ import annotations

import copy

import torch

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
