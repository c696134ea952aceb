"""Expect: what the cost model says of every adapted weight at the sizes of the recorded run.

Nothing is decided here: a branch asks the cost model again at the sizes of every call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from lora_fx.adapter_file import FROZEN_STARTS
from lora_fx.kinds import BY_OP
from lora_fx.kinds.base import Call, shape_of
from lora_fx.kinds.expected import HALVES, Expected, Work
from lora_fx.matrix import row_count
from lora_fx.passes.trace import Trace
from lora_fx.plans import Decision, Plan
from lora_fx.sites import Use

_TOLD = 3
"""Of so many uses at different sizes the reasons are told."""


def expect(plan: Plan, trace: Trace) -> Plan:
    """Return the plan with what is expected of each adapted weight, and why."""
    nodes = {node.name: node for node in trace.graph.nodes}
    return replace(plan, decisions=tuple(_expected(d, plan, nodes) for d in plan.decisions))


def _expected(decision: Decision, plan: Plan, nodes: Mapping[str, fx.Node]) -> Decision:
    if decision.action != "adapt":
        return decision
    uses, twin = decision.site.uses, decision.site.twin
    if not uses and twin is not None and twin in plan:
        uses = plan[twin].site.uses
    found = list(dict.fromkeys(_of_use(use, decision, nodes) for use in uses))
    hows = list(dict.fromkeys(one.how for one in found))
    whys = [one.why if len(hows) == 1 else f"{one.how}, {one.why}" for one in found]
    more = [f"and {len(whys) - _TOLD} more sizes"] if len(whys) > _TOLD else []
    return replace(decision, expected=", ".join(hows), expected_reason="; ".join([*whys[:_TOLD], *more]))


def _of_use(use: Use, decision: Decision, nodes: Mapping[str, fx.Node]) -> Expected:
    if not use.branch or decision.dora or (decision.form == "weight" and decision.compute != "weight"):
        return read_anew(decision)
    cheapest = _of_branch(use, decision, nodes)
    beside = f"without compute={decision.compute!r} {cheapest.how}, {cheapest.why}"
    if decision.compute == "weight":
        read = read_anew(decision)
        return Expected(read.how, f"{read.why}; {beside}")
    if decision.compute == "branch" and cheapest.how.startswith(("kept", "merged")):
        return Expected("added", f"thin products; {beside}")
    return cheapest


def _of_branch(use: Use, decision: Decision, nodes: Mapping[str, fx.Node]) -> Expected:
    node = nodes[use.node]
    kind = BY_OP[use.op]
    place = kind.branch_weight.get(use.op, 1)
    weight = node.args[place] if len(node.args) > place else node.kwargs["weight"]
    call = Call(use.op, node.args, node.kwargs, shape_of(node))
    return kind.expected(call, shape_of(weight), work_of(decision))


def work_of(decision: Decision) -> Work:
    """Return what a decision asks of a branch."""
    terms = 2 if decision.init in FROZEN_STARTS else 1
    return Work(
        ranks=tuple(part.rank for part in decision.parts for _ in range(terms)),
        dtype=decision.site.dtype,
        rows=any(part.rows is not None for part in decision.parts),
        dropout=decision.dropout > 0,
    )


def read_anew(decision: Decision) -> Expected:
    """Return what reading W costs."""
    form = decision.site.form
    rows = sum(part.rank * row_count(part.rows, form) for part in decision.parts)
    products = (form.experts or 1) * form.in_features * rows
    size = f"{math.prod(decision.site.shape):,} elements by {products:,} multiplications"
    cast = f", rounded to {decision.site.dtype}" if decision.site.dtype in HALVES else ""
    return Expected("weight", f"W is computed in every training step, {size}{cast}")
