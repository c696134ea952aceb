"""What a model has, in words: for the errors of a policy that asks for something else."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from lora_fx.policy import Filters, choices
from lora_fx.sites import Site
from lora_fx.tables import ranges_text

_SHOWN = 8


def describe_sites(sites: Sequence[Site]) -> str:
    """Return the roles, kinds and name prefixes that exist, each with its count."""
    roles = Counter(role for site in sites for role in site.roles)
    kinds = Counter(site.kind for site in sites)
    prefixes = Counter(_prefix(site.name) for site in sites)
    return (
        f"{len(sites)} weights; roles: {_counted(roles)}; kinds: {_counted(kinds)}; "
        f"names: {_counted(prefixes)}"
    )


def why_nothing(rule: Filters, sites: Sequence[Site]) -> str:
    """Say which of the rule's filters alone match how many sites."""
    single = [
        (f"{name}={getattr(rule, name)!r}", only(name, getattr(rule, name)))
        for name in ("name", "module", "kind", "role", "depth", "where")
        if getattr(rule, name) is not None
    ]
    if len(single) < 2:
        return "no weight matches"
    alone = ", ".join(f"{text} alone matches {sum(map(f.matches, sites))}" for text, f in single)
    return f"no weight matches all filters ({alone})"


def nearest(rule: Filters, sites: Sequence[Site], names: Iterable[str]) -> str:
    """Return the nearest candidates for the filters of a rule that match nothing by themselves."""
    every_name = _names(sites)
    names_seen = {*every_name, *_suffixes([*every_name, *names], parts=(1, 2, 3))}
    modules = _suffixes([name.rpartition(".")[0] for name in every_name], parts=(1, 2))
    modules |= {site.module_class for site in sites if site.module_class}
    searched = (
        ("name", rule.name, names_seen),
        ("module", rule.module, modules),
        ("kind", rule.kind, {site.kind for site in sites}),
    )
    hints = [
        _hint(what, value, candidates)
        for what, values, candidates in searched
        for value in choices(values)
        if not any(map(only(what, value).matches, sites))
    ]
    depths = [] if rule.depth is None else [_depths(rule, sites)]
    return " ".join(hint for hint in [*hints, *depths] if hint)


def only(what: str, value: object) -> Filters:
    """Return filters with one of the fields given."""
    field: dict[str, Any] = {what: value}
    return Filters(**field)


def _names(sites: Sequence[Site]) -> list[str]:
    return [name for site in sites for name in (site.names or (site.name,))]


def _suffixes(paths: Iterable[str], parts: tuple[int, ...]) -> set[str]:
    """Return the last components of dotted paths, layer numbers replaced by ``*``."""
    general = {re.sub(r"(?<![^.])\d+(?![^.])", "*", path) for path in paths}
    found = {".".join(path.split(".")[-n:]) for path in general for n in parts}
    return {suffix for suffix in found if suffix.strip("*.")}


def _hint(what: str, value: str, candidates: set[str]) -> str:
    plain = re.sub(r"[*?\\^$()\[\]+|]|^re:", "", value).strip(".")
    by_case = {c.lower(): c for c in sorted(candidates)}
    close = difflib.get_close_matches(plain.lower(), list(by_case), n=3, cutoff=0.5)
    if not close:
        return ""
    return f"Nearest to {what}={value!r}: {', '.join(by_case[c] for c in close)}."


def _depths(rule: Filters, sites: Sequence[Site]) -> str:
    """Say at which depths the weights lie that a rule's other filters match, or all of the model's."""
    asked = replace(rule, depth=None)
    there = [site for site in sites if asked.matches(site)]
    if not there:
        return ""  # the depth is not what is wrong
    which = "the model's weights" if len(there) == len(sites) else "the weights that the other filters match"
    if isinstance(rule.depth, int):
        blocks = sorted({site.block[0] for site in there if site.block is not None})
        total = max((site.block[1] for site in sites if site.block is not None), default=0)
        if not blocks:
            return f"Of {total} blocks, none holds any of {which}: give depth as a share, (low, high)."
        return f"Of {total} blocks, {which} lie in {ranges_text(blocks)} (counted from 0)."
    depths = sorted({site.depth for site in there if site.depth is not None})
    if len(depths) > _SHOWN and isinstance(rule.depth, tuple):
        low, high = rule.depth
        below, above = [d for d in depths if d < low], [d for d in depths if d > high]
        near = " and ".join(f"{d:.3g}" for d in (*below[-1:], *above[:1]))
        return (
            f"Depths of {which} go from {depths[0]:.3g} to {depths[-1]:.3g} in {len(depths)} steps; "
            f"the nearest to {rule.depth} are {near}."
        )
    return f"Depths of {which}: {', '.join(f'{d:.3g}' for d in depths) or 'none is known'}."


def _prefix(name: str) -> str:
    """Return a name up to its first layer number, or its first component."""
    head = re.split(r"\.\d+(?=\.)", name, maxsplit=1)[0]
    return (head if head != name else name.partition(".")[0]) + ".*"


def _counted(counter: Counter[str]) -> str:
    if not counter:
        return "none"
    shown = [f"{key} ({count})" for key, count in counter.most_common(_SHOWN)]
    more = [f"and {len(counter) - _SHOWN} more"] if len(counter) > _SHOWN else []
    return ", ".join(shown + more)
