"""Checks of a policy's rules against what a model has: what is refused, and what is warned of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_fx.claims import Claim
from lora_fx.errors import PolicyError
from lora_fx.inventory import describe_sites, nearest, only, why_nothing
from lora_fx.notices import warn_user
from lora_fx.plans import Decision
from lora_fx.policy import AnyRule, Policy, Rule, choices
from lora_fx.sites import Site


def refuse_dataflow(policy: Policy) -> None:
    """Refuse rules on a role or a depth where there is no recorded run to read them from."""
    for rule in policy.rules:
        if rule.needs_trace:
            raise PolicyError(
                rule.describe(),
                expected="a recorded run, since a role or a depth is read from the dataflow",
                got="sites from the module tree alone",
                advice="Pass example_inputs, or name the weights by name=, module= or kind=.",
            )


def check_rules(
    policy: Policy,
    facts: Sequence[Site],
    claims: Mapping[str, tuple[Claim, ...]],
    extras_by_rule: Mapping[int, int],
    names: Sequence[str],
    decisions: Sequence[Decision],
) -> list[str]:
    """Refuse rules that match nothing; return notes (also warned of) on those without effect."""
    skipped = {d.name: d for d in decisions if d.action == "skip"}
    used = {claim.index for found in claims.values() for claim in found}
    notes: list[str] = []
    for index, rule in enumerate(policy.rules):
        if rule.optional:
            continue
        matched = [site for site in facts if rule.matches(site)]
        extra = extras_by_rule.get(index, 0)
        if not matched and not extra:
            raise _matches_nothing(rule, facts, names)
        if index not in used and not extra:
            earlier = sorted({c.index + 1 for s in matched for c in claims[s.name]})
            notes.append(
                f"rule {index + 1}, {rule.describe()}, decides nothing: all {len(matched)} weight(s) that it "
                f"matches were taken by rule {', '.join(map(str, earlier)) or 'none'}"
            )
        elif isinstance(rule, Rule):
            own = [s.name for s in matched if any(claim.index == index for claim in claims[s.name])]
            if all(name in skipped for name in own):
                first = skipped[own[0]]
                notes.append(
                    f"rule {index + 1}, {rule.describe()}, adapts nothing: all {len(own)} weight(s) that it "
                    f"decides are skipped, {first.name} for one: {first.reason}, {first.detail}"
                )
        notes += _idle_choices(rule, facts, names)
        notes += _too_many_blocks(rule, matched)
    for note in notes:
        warn_user(note)
    return notes


def _idle_choices(rule: AnyRule, facts: Sequence[Site], names: Sequence[str]) -> list[str]:
    """Name the alternatives of a filter that no weight satisfies, among others that some do."""
    notes: list[str] = []
    for field_name, values in (
        ("name", choices(rule.name)),
        ("module", choices(rule.module)),
        ("role", rule.roles),
    ):
        for value in values if len(values) > 1 else ():
            single = only(field_name, value)
            beside = not isinstance(rule, Rule) and any(map(single.matches_parameter, names))
            if beside or any(map(single.matches, facts)):
                continue
            hint = nearest(single, facts, names)
            notes.append(f"{field_name}={value!r} in {rule.describe()} matches no weight. {hint}".rstrip())
    return notes


def _too_many_blocks(rule: AnyRule, matched: Sequence[Site]) -> list[str]:
    """Say that a rule asks for more blocks than there are, and so for all of them."""
    total = max((site.block[1] for site in matched if site.block is not None), default=0)
    if not isinstance(rule.depth, int) or abs(rule.depth) <= total or not total:
        return []
    end = "first" if rule.depth > 0 else "last"
    return [f"{rule.describe()} asks for the {end} {abs(rule.depth)} blocks, and the model has {total}: all"]


def _matches_nothing(rule: AnyRule, facts: Sequence[Site], names: Sequence[str]) -> PolicyError:
    choose = nearest(rule, facts, names) or "Choose among what the model has, or remove the rule."
    return PolicyError(
        rule.describe(),
        expected="a rule that matches at least one weight",
        got=f"{why_nothing(rule, facts)}; the model has {describe_sites(facts)}",
        advice=f"{choose} With optional=True it may match nothing.",
    )
