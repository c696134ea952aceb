"""Probing and verifying leave no trace, and do as the forward does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.passes.examples import own_copy
from tests.by_hand import randomise
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


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "in place": lambda key, query: key.mul_(0.9).add_(query, alpha=0.1),
    "through data": lambda key, query: key.data.mul_(0.9).add_(query, alpha=0.1),
    "other memory": lambda key, query: setattr(key, "data", key.data * 0.9 + query * 0.1),
    "in place, then other memory": lambda key, query: setattr(key, "data", key.mul_(0.9) + query * 0.1),
    "many at once": lambda key, query: torch.ops.aten._foreach_lerp_.Scalar([key.data], [query], 0.1),
}


class Momentum(nn.Module):
    """In train mode its key weight follows its query weight, as MoCo's and BYOL's does."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any]) -> None:
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


class Writing(nn.Module):
    """A forward that writes into its first input, and takes the second out of a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
        x *= 2
        return self.last(torch.tanh(self.first(x))) + more.pop("x") + more["tail"].sum()


def test_example_inputs_that_the_forward_writes_into_are_left() -> None:
    torch.manual_seed(0)
    model, x = Writing().double(), torch.randn(4, 6, dtype=torch.float64)
    examples, before = (x, {"x": x, "tail": x[1:]}), x.clone()
    lora_fx.trace(model, examples)
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), examples, seed=0)
    lora_fx.verify(model, examples).raise_for_failure()
    assert torch.equal(x, before)
    assert x._version == 0
    assert sorted(examples[1]) == ["tail", "x"]


def test_copies_of_inputs_share_memory_as_the_inputs_do() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    rows = x.detach()[1:]
    (y, again, tail), named = own_copy((x, x, rows), {"ids": [torch.arange(3)]})
    assert y is again
    assert y.is_leaf
    assert y.requires_grad
    tail.zero_()
    assert not y[1:].any()
    assert x[1:].all()
    assert torch.equal(named["ids"][0], torch.arange(3))


class Running(nn.Module):
    """It subtracts a running mean that it moves in train mode, and keeps a count that is not saved."""

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            self.count.add_(1)
        return self.last(self.norm(self.first(x - self.mean)))


def test_state_that_is_in_no_adapter_file_is_told_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, policy = torch.randn(4, 6), lora_fx.Policy(lora_fx.Rule(rank=2))
    model = lora_fx.inject(Running().eval(), policy, x)
    report = lora_fx.verify(model, x)
    assert [n for n in report.notes if n.startswith("train: the forward itself writes into mean:")]
    randomise(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_fx.save_adapter(model, tmp_path / "still.safetensors")
    model.train()(x)
    with pytest.warns(UserWarning, match="moved its own buffers mean: no adapter file holds"):
        lora_fx.save_adapter(model, tmp_path / "moved.safetensors")


def test_inject_tells_of_state_that_a_forward_in_train_mode_moves() -> None:
    model, x = Running().train(), torch.randn(4, 6)
    plan = lora_fx.plan(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x)
    assert any("writes into mean:" in note for note in plan.notes)
    with pytest.warns(UserWarning, match="writes into mean:"):
        lora_fx.inject(model, plan, x)


class Decaying(Momentum):
    """What is written is multiplied with as any weight is."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return self.query(x) * self.key(x)


def test_a_forward_that_writes_an_adapted_weight_is_refused_by_its_name() -> None:
    model, x = Decaying(WRITES["in place"]).eval(), torch.randn(4, 6)
    before = model.key.weight.detach().clone()
    plan = lora_fx.plan(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x)
    model.train()
    with pytest.raises(lora_fx.WeightWriteError, match=r"^key\.weight: .*Skip\(name='key\.weight'\)"):
        lora_fx.inject(model, plan, x)
    assert torch.equal(model.key.weight, before)
    assert type(model.key) is nn.Linear


class Counting(nn.Module):
    """Counts its runs in tensors that are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.steps = nn.Linear(6, 6), torch.zeros(())
        self.more = [torch.zeros(()), torch.zeros(2)]

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        self.more[1][0] += 1  # through a view
        return self.inner(x) + self.steps + self.more[1].sum()


def test_counters_that_are_no_buffers_are_put_back() -> None:
    torch.manual_seed(0)
    model, x = Counting(), torch.randn(4, 6)
    outer = nn.Sequential(model, nn.Linear(6, 2))
    lora_fx.inject(outer, lora_fx.Policy(lora_fx.Rule(rank=2)), x)
    lora_fx.verify(outer, x).raise_for_failure()
    assert float(model.steps) == 0
    assert not torch.cat(model.more[1:]).any()
    outer(x)
    assert float(model.steps) == 1


class Sizing(nn.Module):
    """Makes its buffer as large as it takes at its first run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.register_buffer("scale", torch.zeros(0))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.scale.resize_(x.shape[-1]).fill_(1)
        return self.inner(x) + self.scale


def test_a_buffer_that_the_forward_resizes_has_its_size_again() -> None:
    torch.manual_seed(0)
    model, x = Sizing(), torch.randn(4, 6)
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x)
    assert model.scale.shape == (0,)
    lora_fx.verify(model, x).raise_for_failure()
    assert model.scale.shape == (0,)
    lora_fx.unload(model)
    assert type(model) is Sizing
