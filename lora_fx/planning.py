"""Policy -> Plan: pure decisions about sites; nothing here touches a module.

1. Facts: a site that the run did not reach takes roles, depth and uses from its structural twin.
2. Claims: the first rule that matches decides, row by row (``claims.py``).
3. Decisions: one per site, with a reason of the closed list; ranks capped at what a matrix holds.
4. Extras: parameters that are no sites and are trained in full: biases, norms under a ``Train``.
5. Budget: ranks scaled until everything fits (``budgets.py``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lora_fx.budgets import Budget, fit_ranks, parse_budget
from lora_fx.claims import claim_rows
from lora_fx.decisions import decide, form_of
from lora_fx.errors import PolicyError
from lora_fx.extras import Parameters, bias_extras, train_extras
from lora_fx.inventory import describe_sites
from lora_fx.matrix import row_count
from lora_fx.notices import warn_user
from lora_fx.other_roles import other_roles
from lora_fx.plans import Decision, Extra, Part, Plan, Reason, adapter_itemsize
from lora_fx.policy import Policy, Skip
from lora_fx.rule_checks import check_rules, refuse_dataflow
from lora_fx.sites import Site


def make_plan(
    sites: Sequence[Site],
    policy: Policy,
    *,
    traced: bool,
    model: str,
    examples: str | None,
    parameters: Parameters,
    base_parameters: int,
    owners: Mapping[str, str] | None = None,
) -> Plan:
    """Decide every site by the first rule that matches it.

    ``traced`` says whether the sites come from a recorded run; ``parameters`` are all parameters of
    the model as name -> (shape, dtype); ``owners`` maps module paths to class names, so that a
    ``Train(module=...)`` finds modules without sites by class.

    Raises:
        PolicyError: a rule needs a recorded run and there is none, matches nothing, asks for dropout
            or a branch where an adapter is computed as an effective weight, two rules meet in one
            weight with different scales, or the budget leaves nothing.
    """
    if not traced:
        refuse_dataflow(policy)
    facts = _with_twins(sites) if traced else {site.name: site for site in sites}
    claims = {site.name: claim_rows(facts[site.name], policy.rules) for site in sites}
    decisions = tuple(decide(site, facts[site.name], claims[site.name], traced=traced) for site in sites)
    trained, by_rule = train_extras(policy.rules, claims, parameters, owners or {}, decisions)
    extras = bias_extras(policy.bias, decisions, parameters, trained)
    notes = check_rules(policy, list(facts.values()), claims, by_rule, list(parameters), decisions)
    _refuse_dropout(decisions)
    _refuse_branch(decisions, traced=traced)
    if policy.budget is not None:
        budget = parse_budget(policy.budget)
        decisions, arithmetic = _fit(decisions, extras, budget, base_parameters)
        notes += arithmetic
        # A weight that lost its adapter to the budget loses its bias too.
        extras = bias_extras(policy.bias, decisions, parameters, trained)
    decisions = tuple(map(_remarked, decisions))
    notes += _large_weights(decisions)
    plan = Plan(
        decisions=decisions,
        model=model,
        examples=examples,
        extras=extras,
        norm_stats=policy.norm_stats,
        notes=tuple(notes),
        base_parameters=base_parameters,
    )
    _refuse_nothing(plan, policy, list(facts.values()))
    return plan


def restate(plan: Plan, sites: Sequence[Site], model: str, examples: str) -> Plan:
    """Return a plan that was made elsewhere with the forms and roles that a recorded run of this model shows.

    Warns of an adapted weight whose rows play other roles here: what is adapted is the plan's rows.

    Raises:
        PolicyError: dropout or a branch is asked for where an adapter is an effective weight here.
    """
    here = {name: site for site in sites for name in (site.name, *site.names)}
    facts = _with_twins(sites)

    def restated(decision: Decision) -> Decision:
        if decision.action != "adapt":
            return decision
        found = here[decision.name]
        form, why = form_of(facts[found.name], compute=decision.compute, dora=decision.dora)
        roles = found.roles if found.uses else decision.site.roles
        site = replace(decision.site, uses=found.uses, twin=found.twin, roles=roles)
        return replace(decision, site=site, form=form, form_reason=why)

    decisions = tuple(map(restated, plan.decisions))
    _refuse_dropout(decisions)
    _refuse_branch(decisions, traced=True)
    other = other_roles(plan, here, model)
    if other:
        warn_user(f"{other}.")
    notes = (*plan.notes, other) if other and other not in plan.notes else plan.notes
    return replace(plan, decisions=decisions, model=model, examples=plan.examples or examples, notes=notes)


def _with_twins(sites: Sequence[Site]) -> dict[str, Site]:
    """Give sites that the run did not reach the dataflow facts of their twins."""
    by_name = {name: site for site in sites for name in (site.name, *site.names)}
    facts: dict[str, Site] = {}
    for site in sites:
        twin = by_name.get(site.twin or "")
        if not site.uses and twin is not None and twin.uses:
            same = twin.form.out_features == site.form.out_features
            facts[site.name] = replace(
                site, roles=twin.roles if same else {}, depth=twin.depth, block=twin.block, uses=twin.uses
            )
        else:
            facts[site.name] = site
    return facts


def _refuse_dropout(decisions: Sequence[Decision]) -> None:
    bad = [d for d in decisions if d.dropout > 0 and d.form in ("weight", "mixed")]
    if bad:
        first = bad[0]
        raise PolicyError(
            _and_more(bad),
            expected="dropout=0, since dropout acts on the input of a branch",
            got=f"dropout={first.dropout:g} where the adapter takes the {first.form} form "
            f"({first.form_reason})",
            advice=f"Leave dropout or compute='weight' out of {first.rule}."
            if first.compute == "weight"
            else f"Put Rule({_filter_of(bad, decisions)}, ...) without dropout before {first.rule}, "
            "or leave dropout out.",
        )


def _refuse_branch(decisions: Sequence[Decision], *, traced: bool) -> None:
    bad = [d for d in decisions if d.compute == "branch" and d.form in ("weight", "mixed")]
    if bad:
        first = bad[0]
        before = f"Put Rule({_filter_of(bad, decisions)}, ...) without compute before {first.rule}"
        raise PolicyError(
            _and_more(bad),
            expected="a branch at every use, as compute='branch' asks",
            got=f"the {first.form} form ({first.form_reason})",
            advice=f"{before}, or leave compute out." if traced else "Pass example_inputs.",
        )


def _and_more(bad: Sequence[Decision]) -> str:
    return bad[0].name + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")


def _filter_of(bad: Sequence[Decision], decisions: Sequence[Decision]) -> str:
    """Return a rule's filter for all of these decisions: their kinds, where these hold no others."""
    kinds = sorted({d.site.kind for d in bad})
    names = [d.name for d in bad]
    if len(names) > 1 and all(d in bad for d in decisions if d.action == "adapt" and d.site.kind in kinds):
        return f"kind={_one_or_all(kinds)!r}"
    return f"name={_one_or_all(names)!r}"


def _one_or_all(values: Sequence[str]) -> str | tuple[str, ...]:
    return values[0] if len(values) == 1 else tuple(values)


def _remarked(decision: Decision) -> Decision:
    """Say of a decision whose A and B hold more numbers than what they change that they do."""
    remarks = [text for part in decision.parts if (text := _outgrown(decision.site, part))]
    if not remarks:
        return decision
    return replace(decision, detail="; ".join(filter(None, [decision.detail, *remarks])))


def _outgrown(site: Site, part: Part) -> str:
    rows, columns = row_count(part.rows, site.form), site.form.in_features
    low, whole = part.rank * (rows + columns), rows * columns
    if low <= whole:
        return ""
    smaller = (whole - 1) // (rows + columns)
    less = f"rank {smaller} would have fewer" if smaller else "so has every rank: Train trains fewer"
    where = f"{part.role}: " if part.role else ""
    return f"{where}A and B of rank {part.rank} have {low:,} numbers, what they change {whole:,}; {less}"


LARGE = 1 << 28
"""Effective weights of so many bytes in all (256 MiB) are worth a warning."""


def _large_weights(decisions: Sequence[Decision]) -> list[str]:
    """Note (and warn of) effective weights that are large: each is computed anew while training."""
    sizes = {
        d.name: math.prod(d.site.shape) * _ITEMSIZES.get(d.site.dtype, 4)
        for d in decisions
        if d.form in ("weight", "mixed")
    }
    total = sum(sizes.values())
    if total < LARGE:
        return []
    name = max(sizes, key=sizes.__getitem__)
    why = next(d.form_reason for d in decisions if d.name == name)
    note = (
        f"{len(sizes)} weights are adapted in the weight form, which computes W anew in every training step: "
        f"{total / 2**20:,.0f} MiB in all; {name} for one: {why}"
    )
    warn_user(note)
    return [note]


_ITEMSIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def _refuse_nothing(plan: Plan, policy: Policy, facts: Sequence[Site]) -> None:
    """Refuse a plan that trains nothing although the policy has a rule that would."""
    asks = any(not isinstance(rule, Skip) for rule in policy.rules)
    if plan.parameters or not asks:
        return
    reasons = Counter(d.reason.value for d in plan.decisions)
    examples = {d.reason: f"{d.name}: {d.reason}, {d.detail}" for d in plan.decisions if d.detail}
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "no weights"
    raise PolicyError(
        repr(policy),
        expected="at least one weight that is trained",
        got=f"none ({'; '.join([counts, *examples.values()])}); the model has {describe_sites(facts)}",
        advice="Choose among what the model has.",
    )


def _fit(
    decisions: tuple[Decision, ...], extras: tuple[Extra, ...], budget: Budget, base_parameters: int
) -> tuple[tuple[Decision, ...], list[str]]:
    """Scale the ranks to the budget, and write down the arithmetic."""
    in_bytes = budget.kind == "bytes"
    units = {d.name: adapter_itemsize(d.site.dtype) if in_bytes else 1 for d in decisions}
    slots = [(d, part) for d in decisions for part in d.parts]
    costs = [units[d.name] * _cost(d, part) for d, part in slots]
    wanted = [part.rank for _, part in slots]
    everything = Plan(decisions, extras=extras)
    total = everything.adapter_bytes if in_bytes else everything.parameters
    asked = sum(r * c for r, c in zip(wanted, costs, strict=True))
    fixed, limit = total - asked, budget.limit(base_parameters)
    arithmetic = f"budget {limit:,} {budget.unit}"
    if budget.kind == "share":
        arithmetic += f" ({budget.amount:g} of {base_parameters:,})"
    arithmetic += f": {fixed:,} are fixed (trained in full, biases, magnitudes), {limit - fixed:,} are left"
    if slots and limit - fixed < min(costs):
        raise PolicyError(
            "Policy(budget=...)",
            expected=f"room for at least one adapter of rank 1 ({min(costs):,} {budget.unit})",
            got=arithmetic,
            advice="Raise the budget, or train less in full.",
        )
    fit = fit_ranks(wanted, costs, limit - fixed)
    arithmetic += f", the rules ask {asked:,}"
    if list(fit.ranks) == wanted:
        return decisions, [f"{arithmetic}: it fits as asked"]
    lost = sum(rank == 0 for rank in fit.ranks)
    if lost:
        arithmetic += (
            f"; rank 1 for each takes {sum(costs):,}: given in order as long as it fits, {fit.spent:,}"
        )
        arithmetic += f"; no room for {lost} of {len(slots)} adapters"
        warn_user(f"{arithmetic}. The last ones get none: raise the budget, or narrow the rules.")
    else:
        arithmetic += f"; ranks x {fit.factor:.4f}, rounded down, at least 1: {fit.floored:,}"
        arithmetic += f"; the rest handed out in order, one rank at a time: {fit.spent:,}"
    ranks = iter(fit.ranks)
    return tuple(_with_ranks(d, [next(ranks) for _ in d.parts]) for d in decisions), [arithmetic]


def _cost(decision: Decision, part: Part) -> int:
    """The trained numbers that one rank of a part costs."""
    form = decision.site.form
    return (form.experts or 1) * (form.in_features + row_count(part.rows, form))


def _with_ranks(decision: Decision, ranks: Sequence[int]) -> Decision:
    """Return the decision with other ranks; a part of rank 0 is dropped."""
    old = [part.rank for part in decision.parts]
    if list(ranks) == old:
        return decision
    detail = f"rank {_listed(old)} scaled to {_listed(ranks)} by the budget"
    detail = f"{decision.detail}; {detail}" if decision.detail else detail
    parts = tuple(replace(p, rank=r) for p, r in zip(decision.parts, ranks, strict=True) if r)
    if parts:
        return replace(decision, parts=parts, detail=detail)
    return Decision(decision.site, "skip", Reason.NO_BUDGET, rule=decision.rule, detail=detail)


def _listed(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else ", ".join(map(str, ranks))
