"""Which rule gets which rows of a weight: the first that matches wins, row by row.

A rule without roles asks for the whole weight. A rule with roles asks, on a fused weight, for those
roles' rows only, and leaves the others to the rules after it, so that a policy means the same
whether a model keeps q, k and v in one weight or in three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_fx.matrix import Rows
from lora_fx.policy import AnyRule, Train
from lora_fx.sites import Site

REST = "rest"
"""The role that a part is filed under where its rows play none."""


@dataclass(frozen=True)
class Claim:
    """Rows of one site that one rule decides; ``role`` names them, None and None mean all of it."""

    rule: AnyRule
    index: int
    role: str | None = None
    rows: Rows | None = None


def claim_rows(site: Site, rules: Sequence[AnyRule]) -> tuple[Claim, ...]:
    """Hand out the rows of one site to the rules that match it, first come first served.

    A ``Train`` rule takes the whole weight or, where an earlier rule took a part, nothing. Roles of
    one rule whose rows are the same share one claim, their names joined by ``+``.
    """
    everything: Rows = ((0, site.form.out_features),)
    free = everything
    claims: list[Claim] = []
    for index, rule in enumerate(rules):
        if not free:
            break
        if not rule.matches(site) or (isinstance(rule, Train) and free != everything):
            continue
        asked = _asked(rule, site, everything)
        taken = {role: subtract_rows(rows, subtract_rows(everything, free)) for role, rows in asked.items()}
        taken = {role: rows for role, rows in taken.items() if rows}
        if any(rows == everything for rows in taken.values()):
            return (Claim(rule, index),)
        if not rule.roles or isinstance(rule, Train):
            taken = {_rest_role(site, free): free}
        claims.extend(Claim(rule, index, role, rows) for role, rows in _joined(taken).items())
        for rows in taken.values():
            free = subtract_rows(free, rows)
    return tuple(claims)


def _asked(rule: AnyRule, site: Site, everything: Rows) -> dict[str, Rows]:
    if not rule.roles or isinstance(rule, Train):
        return {REST: everything}
    found = {role: site.roles[role] for role in rule.roles if role in site.roles}
    return {role: everything if rows is None else _merged(rows, everything) for role, rows in found.items()}


def _merged(rows: Rows, everything: Rows) -> Rows:
    """Sort rows and join ranges that touch, so that equal rows compare equal."""
    return subtract_rows(everything, subtract_rows(everything, tuple(sorted(rows))))


def _joined(taken: dict[str, Rows]) -> dict[str, Rows]:
    """Join the names of roles that are played by the same rows."""
    names: dict[Rows, list[str]] = {}
    for role, rows in taken.items():
        names.setdefault(rows, []).append(role)
    return {"+".join(roles): rows for rows, roles in names.items()}


def _rest_role(site: Site, free: Rows) -> str:
    """Name what is left by the roles that lie wholly within it."""
    inside = [role for role, rows in site.roles.items() if rows and not subtract_rows(rows, free)]
    return "+".join(inside) or REST


def subtract_rows(rows: Rows, other: Rows) -> Rows:
    """Return the rows that are in ``rows`` and not in ``other``, both sorted and disjoint."""
    left: list[tuple[int, int]] = []
    for start, stop in rows:
        at = start
        for low, high in other:
            if high <= at or low >= stop:
                continue
            if low > at:
                left.append((at, low))
            at = max(at, high)
        if at < stop:
            left.append((at, stop))
    return tuple(left)
