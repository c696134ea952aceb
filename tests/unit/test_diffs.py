"""Plans compared with each other, saved, and held against a model's sites."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.diffs import refuse_misfit
from lora_fx.errors import PlanError
from lora_fx.plans import Plan
from lora_fx.policy import Policy, Rule, Skip, Train
from tests.unit.site_builders import WEIGHT, fused, plan, site, transformer

BIAS = {"head.bias": ((8,), "float32")}


def parameters_of(sites, extra=BIAS):
    return {s.name: (s.shape, s.dtype) for s in sites} | extra


def test_a_plan_does_not_differ_from_itself_or_by_its_words():
    made = plan(transformer(2, 8), Policy(Rule(rank=2)))
    assert not made.diff(made)
    assert str(made.diff(made)) == "no difference"
    same = plan(transformer(2, 8), Policy(Rule(kind="linear", rank=2)))
    assert same != made
    assert not made.diff(same)


def test_differences_are_found_and_grouped():
    sites = transformer(12, 8)
    before = plan(sites, Policy(Rule(role="qv", rank=4)))
    after = plan(sites, Policy(Rule(role="q", rank=2), Rule(role="k", rank=4)))
    diff = before.diff(after)
    facts = {(c.name.split(".")[3], c.what, c.before, c.after) for c in diff.changes}
    assert ("query", "rank", "4", "2") in facts
    assert ("value", "decision", "adapt", "skip") in facts
    assert ("key", "decision", "skip", "adapt") in facts
    assert not any(c.name.endswith("output.weight") for c in diff.changes)
    assert "layers.{0-11}.attention.query.weight" in str(diff)
    assert len(str(diff).splitlines()) < 25


@pytest.mark.parametrize(
    ("policy", "what", "before", "after"),
    [
        (Policy(Rule(rank=4, alpha=8)), "scale", "1", "2"),
        (Policy(Rule(rank=4, dropout=0.5)), "dropout", "0", "0.5"),
        (Policy(Rule(rank=4, dora=True)), "form", "branch", "weight"),
        (Policy(Rule(rank=4, init="pissa")), "init", "kaiming", "pissa"),
        (Policy(Rule(role="q", rank=4)), "rows", "all", "0:8"),
        (Policy(Rule(rank=4), norm_stats="train"), "norm_stats", "freeze", "train"),
        (Policy(Rule(rank=4), bias="all"), "parameter", "frozen", "trained, 8"),
    ],
)
def test_every_option_counts(policy, what, before, after):
    left = plan([fused()], Policy(Rule(rank=4)), parameters=BIAS)
    right = plan([fused()], policy, parameters=BIAS)
    found = [(c.before, c.after) for c in left.diff(right).changes if c.what == what]
    assert found == [(before, after)]
    assert [(c.after, c.before) for c in right.diff(left).changes if c.what == what] == found


def test_weights_that_only_one_plan_knows():
    left, right = [site("a.weight"), site("b.weight")], [site("a.weight"), site("c.weight")]
    diff = plan(left, Policy(Rule())).diff(plan(right, Policy(Rule())))
    assert [(c.name, c.before, c.after) for c in diff.changes] == [
        ("b.weight", "adapt", "not there"),
        ("c.weight", "not there", "adapt"),
    ]


def test_a_plan_is_saved_and_loaded(tmp_path):
    made = plan([fused(), site("b.weight", uses=(WEIGHT,))], Policy(Rule(rank=2)), parameters=BIAS)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "bad.json")


# --- against a model ---


def made_for(sites):
    return plan(sites, Policy(Train(name="head.*"), Skip(name="skipped.*"), Rule(rank=2)), parameters=BIAS)


SITES = [site("a.weight", (8, 4)), site("head.weight"), site("skipped.weight")]


def test_a_plan_fits_the_same_architecture():
    refuse_misfit(made_for(SITES), SITES, parameters_of(SITES))
    in_bf16 = [replace(s, dtype="bfloat16") for s in SITES if s.name != "skipped.weight"]
    new = [*in_bf16, site("new.weight")]
    refuse_misfit(made_for(SITES), new, parameters_of(new))


@pytest.mark.parametrize(
    ("sites", "extra", "message"),
    [
        (SITES[1:], BIAS, r"a\.weight is not there"),
        (SITES[1:], {**BIAS, "a.weight": ((8, 4), "float32")}, "a parameter, but no weight"),
        ([site("a.weight", (8, 5)), *SITES[1:]], BIAS, "a.weight is 8x5, 8x4 in the plan"),
        ([site("a.weight", (8, 4), kind="embedding"), *SITES[1:]], BIAS, "another matrix"),
        (
            [site("a.weight", (8, 4), names=("a.weight", "b")), *SITES[1:]],
            BIAS,
            "tied to b, in the plan to nothing",
        ),
        ([site("a.weight", (8, 4), unfit="quantised"), *SITES[1:]], BIAS, "cannot be adapted: quantised"),
        (SITES, {}, r"head\.bias \(8 in the plan\) is not there"),
        (SITES, {"head.bias": ((9,), "float32")}, "has the shape 9"),
    ],
)
def test_a_misfit_says_exactly_where(sites, extra, message):
    with pytest.raises(PlanError, match=message):
        refuse_misfit(made_for(SITES), sites, parameters_of(sites, extra))


def test_moving_statistics_count():
    still = made_for(SITES)
    moving = replace(still, buffers=("bn.running_mean",))
    [change] = still.diff(moving).changes
    assert (change.name, change.what, change.before, change.after) == (
        "bn.running_mean",
        "buffer",
        "left alone",
        "moves",
    )
    with pytest.raises(PlanError, match=r"buffer bn\.running_mean is not there"):
        refuse_misfit(moving, SITES, parameters_of(SITES))
    refuse_misfit(moving, SITES, parameters_of(SITES), {"bn.running_mean"})


def test_a_trained_weight_needs_no_form_and_no_fitness():
    sites = [SITES[0], site("head.weight", kind="embedding", unfit="quantised"), SITES[2]]
    refuse_misfit(made_for(SITES), sites, parameters_of(sites))


def test_sites_without_a_run_do_not_tell_the_form():
    sites = [site("a.weight", (8, 4), kind="embedding"), *SITES[1:]]
    refuse_misfit(made_for(SITES), sites, parameters_of(sites), traced=False)


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.mark.parametrize("examples", [None, torch.ones(2, 4)])
def test_inject_says_where_a_plan_does_not_fit(examples):
    made = lora_fx.plan(net(5), Policy(Rule(rank=2)), torch.ones(2, 4))
    other = net(6)
    with pytest.raises(PlanError, match=r"0\.weight is 6x4, 5x4 in .*; 2\.weight is 3x6, 3x5 in"):
        lora_fx.inject(other, made, examples)
    assert type(other[0]) is nn.Linear
    lora_fx.inject(net(5), made, examples)


def test_many_misfits_are_counted():
    sites = transformer(8, 8)
    with pytest.raises(PlanError, match="and 24 more"):
        refuse_misfit(plan(sites, Policy(Rule(rank=2))), [], {})
