"""A check of roles that needs no written truth: perturb rows, and see which operands change.

A change of the rows named ``q`` alone must change the query of the attentions that they feed and nothing
else of them; likewise ``k`` and ``v``; each end of each range by itself must change its operand; and rows
of the same weight that are named none of these must change none. The recorded calls are run again from
the weight's call, on a random input, up to the operands; other weights' results stay what they were. A
call that is a whole attention (``multi_head_attention_forward``) is looked into (``inside_calls``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.passes.attention import find_attentions
from lora_fx.passes.attention_operands import Orientation, behind_depthwise, is_depthwise
from lora_fx.passes.feeding_rows import mask_of
from lora_fx.passes.flow import Flow, Link, is_floating, parameter_of, sources_above
from lora_fx.passes.op_groups import WHOLE_ATTENTION
from lora_fx.passes.trace import Trace
from lora_fx.sites import Site
from tests.whole_replay import call, node_values
from tests.zoo.inside_calls import operands_inside

OPERANDS = ("q", "k", "v")
Operands = Mapping[str, tuple[fx.Node, ...]]
ENDS = 4
"""How many ranges of a role have their ends perturbed one by one."""


@dataclass(frozen=True)
class Perturbed:
    """What came out: the attentions checked, the perturbations made, and what went wrong."""

    attentions: int
    perturbations: int
    failures: tuple[str, ...]


@dataclass(frozen=True)
class _Change:
    """Some rows of a weight at one of its calls, and the operands that they are said to make."""

    maker: fx.Node
    link: Link
    what: str
    rows: Tensor
    wanted: frozenset[str]

    @property
    def key(self) -> tuple[str, str, str]:
        """What is changed, in words."""
        return (self.maker.name, self.link.site.name, self.what)


def perturb(trace: Trace, sites: tuple[Site, ...]) -> Perturbed:
    """Perturb the named and unnamed rows of every weight around every attention of a run."""
    flow = Flow(trace.graph, sites)
    attentions = find_attentions(flow)
    flow.follow_veins({node: through for attention in attentions for node, through in attention.veins})
    orientation = Orientation(flow)
    values = node_values(trace, _seeing_all)
    wanted: dict[tuple[str, str, str], frozenset[str]] = {}
    changed: dict[tuple[str, str, str], set[str]] = {}
    for attention in attentions:
        operands = dict(orientation.operands(attention).named())
        last = max(flow.order[node] for nodes in operands.values() for node in nodes)
        for _, changes in groupby(_changes(flow, operands), lambda c: (c.maker, c.link.site.name)):
            before: dict[fx.Node, Any] = {}
            for change in changes:
                before = before or _rerun(flow, values, change, torch.zeros_like(change.rows), last)
                after = _rerun(flow, values, change, change.rows, last)
                wanted[change.key] = change.wanted
                changed.setdefault(change.key, set()).update(_differing(operands, before, after))
    whole = [node for node in flow.calls if node.meta.get("op") in WHOLE_ATTENTION]
    for maker in whole:
        for change in _changes_at(flow, maker, set(OPERANDS)):
            wanted[change.key] = change.wanted
            changed[change.key] = _changed_inside(flow, values, change)
    failures = [
        f"{what} of {site} at {call}: {sorted(changed[key])} changed, not {sorted(wanted[key])}"
        for key in wanted
        for call, site, what in [key]
        if changed[key] != wanted[key]
    ]
    return Perturbed(len(attentions) + len(whole), len(wanted), tuple(failures))


def _seeing_all(node: fx.Node, error: Exception) -> Tensor:
    """Return ones for a mask made under vmap, which is recorded for one row and cannot be run again."""
    if is_floating(node):
        raise error
    return torch.ones(node.meta["shape"], dtype=node.meta["dtype"])


def _changes(flow: Flow, operands: Operands) -> Iterator[_Change]:
    for maker, feeds in _makers(flow, operands).items():
        yield from _changes_at(flow, maker, feeds)


def _changes_at(flow: Flow, maker: fx.Node, feeds: set[str]) -> Iterator[_Change]:
    for link in flow.links[maker]:
        roles = {r: mask_of(link.site.roles[r], link.site.form) for r in OPERANDS if r in link.site.roles}
        # A shared weight may make another operand elsewhere.
        here = {role: mask for role, mask in roles.items() if role in feeds}
        for what, rows in _row_sets(here):
            wanted = frozenset(role for role, mask in here.items() if bool((mask & rows).any()))
            yield _Change(maker, link, what, rows, wanted)
        others = ~torch.stack(list(roles.values())).any(0) if roles else torch.zeros(1)
        if bool(others.any()):
            yield _Change(maker, link, "what is not named", others, frozenset())


def _makers(flow: Flow, operands: Operands) -> dict[fx.Node, set[str]]:
    """Return the calls that make operands, with the operands that each makes."""
    found: dict[fx.Node, set[str]] = {}
    for role, nodes in operands.items():
        for maker in (m for node in nodes for m in flow.makers(node)):
            found.setdefault(behind_depthwise(flow, maker) or maker, set()).add(role)
    return found


def _row_sets(roles: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for role, mask in roles.items():
        yield f"all of {role}", mask
        for row in sorted({i for start, stop in _ranges(mask)[:ENDS] for i in (start, stop - 1)}):
            single = torch.zeros_like(mask)
            single[row] = True
            yield f"row {row}, of {role},", single


def _differing(operands: Operands, before: Mapping[fx.Node, Any], after: Mapping[fx.Node, Any]) -> set[str]:
    """Return the operands that differ between two runs, one with a weight as it is, one with other rows."""
    return {
        role
        for role, nodes in operands.items()
        if any(node in after and _differ(before[node], after[node]) for node in nodes)
    }


def _changed_inside(flow: Flow, values: Mapping[fx.Node, Any], change: _Change) -> set[str]:
    """Return the operands inside a call that differ between a weight as it is and with other rows."""
    before, after = (
        operands_inside(
            change.maker, {**values, **_drawn(change.maker, values), **_other(values, change, rows)}
        )
        for rows in (torch.zeros_like(change.rows), change.rows)
    )
    return {role for role in OPERANDS if _differ(before[role], after[role])}


def _drawn(maker: fx.Node, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Tensor]:
    """Draw a whole attention's query, key and value: one tensor where they are one."""
    given = [*maker.args[:3], *(maker.kwargs.get(name) for name in ("query", "key", "value"))]
    return {node: _random_like(values[node]) for node in given if isinstance(node, fx.Node)}


def _other(values: Mapping[fx.Node, Any], change: _Change, rows: Tensor) -> dict[fx.Node, Any]:
    """Return a weight with other values in some rows, and what is made of it on the way to its call."""
    weights = _reads(change.link)
    new = {node: _with_other_rows(values[node], change.link.site, rows) for node in weights}
    chain = _between(weights, change.link.weight)
    for node in change.maker.graph.nodes:
        if node in chain and node not in new and any(n in new for n in node.all_input_nodes):
            new[node] = call(node, {**values, **new})
    return new


def _reads(link: Link) -> list[fx.Node]:
    names = {link.site.name, *link.site.names}
    return [node for node in sources_above(link.weight) if parameter_of(node) in names]


def _rerun(
    flow: Flow, values: Mapping[fx.Node, Any], change: _Change, rows: Tensor, last: int
) -> dict[fx.Node, Any]:
    """Run a weight's call on a random input, with other values in some rows, and what follows it."""
    link, maker = change.link, change.maker
    weights = _reads(link)
    new = {node: _with_other_rows(values[node], link.site, rows) for node in weights}
    chain = _between(weights, link.weight)
    drawn = {node: _random_like(values[node]) for node in flow.inputs(maker) if is_floating(node)}
    for node in flow.graph.nodes:
        if flow.order[node] > last:
            break
        if node in new or not any(n in new for n in node.all_input_nodes):
            continue
        # Where a value is looked for (a hash, a choice) is no part of it: indices stay as they were.
        kept = node in flow.links and not is_depthwise(flow, node)
        weighing = flow.veins.get(node) == ()
        follows = node in chain or flow.order[node] > flow.order[maker]
        if node is maker:
            new[node] = call(node, {**values, **new, **drawn})
        elif follows and not kept and not weighing and is_floating(node):
            new[node] = call(node, {**values, **new})
    return new


def _between(weights: list[fx.Node], weight: fx.Node) -> set[fx.Node]:
    found, stack = {weight}, [weight]
    while stack:
        fresh = [n for n in stack.pop().all_input_nodes if n not in found]
        found.update(fresh)
        stack.extend(fresh)
    return found - set(weights)


def _with_other_rows(weight: Tensor, site: Site, rows: Tensor) -> Tensor:
    matrix = site.form.matrix(weight.detach()).clone()
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(5)).to(matrix)
    scale = matrix.abs().mean() + 0.1
    matrix[..., rows, :] += scale * noise[..., rows, :]
    return site.form.weight(matrix)


def _random_like(value: Tensor) -> Tensor:
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(7)).to(value)


def _differ(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-6 * other.abs().max())


def _ranges(mask: Tensor) -> list[tuple[int, int]]:
    edges = torch.diff(torch.nn.functional.pad(mask.to(torch.int8), (1, 1))).nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
