"""Made: a plan as it was carried out, for a model in which no run was recorded.

A plan that was made on another model, or read from a file, may say branch where this model's forward is
not one that insertion rewrites: then the weight is read as W, and the plan kept with the model says so.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from lora_fx.passes.expect import read_anew
from lora_fx.plans import Decision, Plan

_NO_BRANCH = "no forward of this model computes a branch of it: each use reads W"


def as_made(plan: Plan, branched: Collection[str], model: str) -> Plan:
    """Return the plan with the weight form wherever it says branch and none was made.

    ``branched`` are the weights, by any of their names, that some rewritten forward computes a branch of.
    A plan for another class than ``model`` says in a note that its forms are taken on trust.
    """
    decisions = tuple(_as_made(d, branched) for d in plan.decisions)
    note = f"the forms are those of a plan for {plan.model}: no run of this {model} was recorded"
    notes = plan.notes if plan.model in ("", model) or note in plan.notes else (*plan.notes, note)
    return replace(plan, decisions=decisions, notes=notes)


def _as_made(decision: Decision, branched: Collection[str]) -> Decision:
    if decision.action != "adapt" or decision.form not in ("branch", "mixed"):
        return decision
    if any(name in branched for name in (decision.name, *decision.site.names)):
        return decision
    made = replace(decision, form="weight", form_reason=_NO_BRANCH)
    if not decision.expected:
        return made
    how, why = read_anew(decision)
    return replace(made, expected=how, expected_reason=why)
