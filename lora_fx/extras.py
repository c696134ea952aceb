"""Parameters that are no sites and are trained in full: biases, a norm's weight, a token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from lora_fx.claims import Claim
from lora_fx.plans import Decision, Extra
from lora_fx.policy import AnyRule, Skip, Train

Parameters = Mapping[str, tuple[tuple[int, ...], str]]
"""Every parameter of a model: its shape and dtype by qualified name."""


def train_extras(
    rules: Sequence[AnyRule],
    claims: Mapping[str, tuple[Claim, ...]],
    parameters: Parameters,
    owners: Mapping[str, str],
    decisions: Sequence[Decision],
) -> tuple[tuple[Extra, ...], Mapping[int, int]]:
    """Return the parameters beside the sites that ``Train`` rules name, and how many each rule decides.

    The first ``Skip`` or ``Train`` that matches by name and module decides, as for sites. The 1-D
    parameters of a module whose weight is trained in full (its bias) are trained with it.
    """
    beside = _trained_owners(claims, decisions)
    sites = {name for d in decisions for name in (d.name, *d.site.names)}
    extras: list[Extra] = []
    by_rule: Counter[int] = Counter()
    for name, (shape, dtype) in parameters.items():
        owner = name.rpartition(".")[0]
        if name in sites or "float" not in dtype:
            continue
        for index, rule in enumerate(rules):
            named = rule.matches_parameter(name, owners.get(owner, ""))
            if named and isinstance(rule, Skip):
                by_rule[index] += 1
                break
            trained_index, weight = beside.get(owner, (-1, ""))
            if named and isinstance(rule, Train):
                detail = f"trained in full by {rule.describe()}"
            elif index == trained_index and len(shape) <= 1:
                detail = f"beside {weight}, which is trained in full"
            else:
                continue
            extras.append(Extra(name, tuple(shape), dtype, detail))
            by_rule[index] += 1
            break
    return tuple(extras), by_rule


def _trained_owners(
    claims: Mapping[str, tuple[Claim, ...]], decisions: Sequence[Decision]
) -> dict[str, tuple[int, str]]:
    """Return the owners of the weights trained in full: the deciding rule's index and the weight."""
    found: dict[str, tuple[int, str]] = {}
    for decision in decisions:
        if decision.action == "train":
            index = next(c.index for c in claims[decision.name] if isinstance(c.rule, Train))
            for name in (decision.name, *decision.site.names):
                found.setdefault(name.rpartition(".")[0], (index, decision.name))
    return found


def bias_extras(
    mode: str, decisions: Sequence[Decision], parameters: Parameters, extras: tuple[Extra, ...]
) -> tuple[Extra, ...]:
    """Add the biases that ``Policy(bias=...)`` asks for: all, or those beside an adapted weight."""
    if mode == "none":
        return extras
    owners = {
        name.rpartition(".")[0] for d in decisions if d.action == "adapt" for name in (d.name, *d.site.names)
    }
    taken = {extra.name for extra in extras} | {n for d in decisions for n in (d.name, *d.site.names)}
    added = [
        Extra(name, tuple(shape), dtype, f'bias="{mode}"')
        for name, (shape, dtype) in parameters.items()
        if name not in taken
        and len(shape) <= 1
        and "float" in dtype
        and _is_bias(name)
        and (mode == "all" or name.rpartition(".")[0] in owners)
    ]
    return (*extras, *added)


def _is_bias(name: str) -> bool:
    """Say whether a parameter is called a bias: ``bias``, ``in_proj_bias``, ``bias_ih_l0``."""
    attribute = name.rpartition(".")[2]
    return attribute == "bias" or attribute.endswith("_bias") or attribute.startswith("bias_")
