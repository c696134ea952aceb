"""A plan that was made on another model, or without a run: the model's own says what is done here."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lora_fx
from tests.by_hand import branched

X = torch.randn(3, 8)


class Plain(nn.Module):
    """Calls its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.proj(x))


class Functional(Plain):
    """Takes the weight out of its layer."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.proj.weight, self.proj.bias))


class OwnLinear(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class OwnForward(Plain):
    """Calls a layer whose forward is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = OwnLinear(8, 8)


def made_on(model: nn.Module, **how: object) -> lora_fx.Plan:
    return lora_fx.plan(model, lora_fx.Policy(lora_fx.Rule(rank=2, **how)), X)


def test_the_audit_says_the_form_that_it_has_here() -> None:
    plan = made_on(Plain())
    assert plan["proj.weight"].form == "branch"
    audit = lora_fx.audit(lora_fx.inject(Functional(), plan, X))
    (row,) = audit.rows
    assert (row.form, row.expected) == ("weight", "weight")
    assert "Functional), which is not a stock forward" in row.form_reason
    assert audit.model == "Functional"
    assert audit.totals.branch_share == 0


def test_the_other_way_round_and_without_a_run() -> None:
    functional, untraced = made_on(Functional()), lora_fx.plan(Plain(), lora_fx.Policy(lora_fx.Rule(rank=2)))
    for plan in (functional, untraced):
        assert plan["proj.weight"].form == "weight"
        model = lora_fx.inject(Plain(), plan, X)
        assert branched(model) == {"proj.weight"}
        (row,) = lora_fx.audit(model).rows
        assert row.form == "branch"
        assert row.expected in {"kept", "merged", "added"}


def test_on_its_own_model_a_plan_is_what_it_was() -> None:
    plan = made_on(Plain())
    audit = lora_fx.audit(lora_fx.inject(Plain(), plan, X))
    assert audit.rows == tuple(replace(row, delta=0.0) for row in lora_fx.audit(plan).rows)
    assert audit.notes == plan.notes


@pytest.mark.parametrize(
    ("how", "why"), [({"compute": "branch"}, "as compute='branch' asks"), ({"dropout": 0.1}, "dropout=0")]
)
def test_what_only_a_branch_can_do_is_refused_where_there_is_none(how: dict[str, object], why: str) -> None:
    plan, model = made_on(Plain(), **how), Functional()
    before = set(vars(model)), type(model)
    with pytest.raises(lora_fx.PolicyError, match=why):
        lora_fx.inject(model, plan, X)
    assert (set(vars(model)), type(model)) == before


def test_without_a_run_what_was_made_of_the_forwards_says_it(tmp_path: Path) -> None:
    source = lora_fx.inject(Plain(), made_on(Plain()), X)
    lora_fx.save_adapter(source, tmp_path / "a.safetensors")
    loaded = lora_fx.load_adapter(OwnForward(), tmp_path / "a.safetensors", base_check="shape")
    injected = lora_fx.inject(OwnForward(), made_on(Plain()))
    for model in (loaded, injected):
        assert branched(model) == set()
        audit = lora_fx.audit(model)
        assert [(row.form, row.expected) for row in audit.rows] == [("weight", "weight")]
        assert (
            audit.rows[0].form_reason == "no forward of this model computes a branch of it: each use reads W"
        )
        assert audit.notes == (
            "the forms are those of a plan for Plain: no run of this OwnForward was recorded",
        )
    same = lora_fx.load_adapter(Plain(), tmp_path / "a.safetensors", base_check="shape")
    assert [row.form for row in lora_fx.audit(same).rows] == ["branch"]
    assert lora_fx.audit(same).notes == ()


def test_a_graph_is_rewritten_where_it_is_the_model_alone() -> None:
    graph = fx.symbolic_trace(Functional())
    (row,) = lora_fx.audit(lora_fx.inject(graph, made_on(fx.symbolic_trace(Functional())))).rows
    assert row.form == "branch"
    inner = nn.Sequential(fx.symbolic_trace(Functional()))
    plan = made_on(inner)
    assert plan["0.proj.weight"].form == "weight"
    assert lora_fx.audit(lora_fx.inject(inner, plan, X)).rows[0].form == "weight"
    with pytest.raises(lora_fx.PolicyError, match="dropout=0, since"):
        made_on(nn.Sequential(fx.symbolic_trace(Functional())), dropout=0.5)


class Fused(nn.Module):
    """An attention with a fused projection, whose thirds play their roles in one order or another."""

    def __init__(self, order: tuple[int, int, int] = (0, 1, 2)) -> None:
        super().__init__()
        self.x, self.o, self.order = nn.Linear(8, 24), nn.Linear(8, 8), order

    def forward(self, x: Tensor) -> Tensor:
        thirds = self.x(x).chunk(3, -1)
        q, k, v = (thirds[place] for place in self.order)
        mixed: Tensor = self.o(torch.softmax(q @ k.mT / 8**0.5, -1) @ v)
        return mixed


def test_the_audit_says_the_roles_that_rows_have_here_and_a_warning_that_they_are_others() -> None:
    plan = lora_fx.plan(Fused(), lora_fx.Policy(lora_fx.Rule(role="qv", rank=2)), X[None])
    assert plan["x.weight"].site.roles["q"] == ((0, 8),)
    other = Fused((2, 0, 1))
    with pytest.warns(UserWarning, match=r"x\.weight is .*q\[0:8\].* in the plan, .*q\[16:24\].* here"):
        lora_fx.inject(other, plan, X[None])
    audit = lora_fx.audit(other)
    row = next(row for row in audit.rows if row.name == "x.weight")
    assert {role: row.roles[role] for role in "qkv"} == {"q": ((16, 24),), "k": ((0, 8),), "v": ((8, 16),)}
    assert row.rows == plan["x.weight"].rows
    assert sum("gives other roles" in note for note in audit.notes) == 1
    lora_fx.verify(other, X[None]).raise_for_failure()


def test_no_word_of_roles_where_they_are_the_same_or_the_plan_saw_no_run() -> None:
    policy = lora_fx.Policy(lora_fx.Rule(rank=2))
    plans = lora_fx.plan(Fused(), policy, X[None]), lora_fx.plan(Fused(), policy)
    for plan in plans:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = lora_fx.inject(Fused(), plan, X[None])
        audit = lora_fx.audit(model)
        assert audit.notes == plan.notes
        assert next(row for row in audit.rows if row.name == "x.weight").roles["v"] == ((16, 24),)
