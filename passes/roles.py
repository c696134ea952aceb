"""Roles: name what every site does, from dataflow alone, with the exact output rows that do it."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping

from torch import fx

from lora_fx.kinds import Call
from lora_fx.matrix import Rows
from lora_fx.passes.attention import Attention, find_attentions
from lora_fx.passes.attention_operands import Operands, Orientation, behind_depthwise, feeds_of, overlap
from lora_fx.passes.attention_output import output_calls
from lora_fx.passes.blocks import blocks_of
from lora_fx.passes.dataflow import depths
from lora_fx.passes.ends import heads, stems
from lora_fx.passes.feedforward import feed_forwards
from lora_fx.passes.feeding_rows import Feed, Feeding, Mask, mask_of, rows_of
from lora_fx.passes.flow import Flow
from lora_fx.passes.op_groups import WHOLE_ATTENTION
from lora_fx.passes.routers import routers
from lora_fx.passes.streams import crossing
from lora_fx.passes.trace import Trace
from lora_fx.sites import ROLES, Site

_INNER = frozenset({"q", "k", "v", "up", "gate"})


class _Ledger:
    """What has been found so far: rows by site and role, and remarks by site."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self.sites = tuple(sites)
        # A call that is a whole attention (multi_head_attention_forward) gives the roles itself.
        self.masks: dict[str, dict[str, Mask]] = {
            site.name: {role: mask_of(rows, site.form) for role, rows in site.roles.items()}
            for site in self.sites
        }
        self.notes: dict[str, dict[str, None]] = {site.name: dict.fromkeys(site.notes) for site in self.sites}

    def name(self, site: Site, role: str, rows: Mask | None = None) -> None:
        """Give a role to rows of a site; None is all of them."""
        mask = mask_of(None, site.form) if rows is None else rows
        known = self.masks[site.name].get(role)
        self.masks[site.name][role] = mask if known is None else known | mask

    def note(self, site: Site, text: str) -> None:
        """Leave a remark on a site."""
        self.notes[site.name][text] = None

    def named(self) -> tuple[Site, ...]:
        """Return the sites with their roles, in the vocabulary's order, and notes."""
        return tuple(
            dataclasses.replace(site, roles=self._roles(site), notes=tuple(self.notes[site.name]))
            for site in self.sites
        )

    def _roles(self, site: Site) -> dict[str, Rows | None]:
        masks = self.masks[site.name]
        return {role: rows_of(masks[role]) for role in ROLES if role in masks}


def assign_roles(trace: Trace, sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Return the sites with roles, depth, block and remarks filled in from the trace's dataflow."""
    flow = Flow(trace.graph, sites)
    ledger = _Ledger(sites)
    attentions = find_attentions(flow)
    flow.follow_veins({node: through for attention in attentions for node, through in attention.veins})
    feeding, orientation = Feeding(flow), Orientation(flow)
    for attention in attentions:
        _name_attention(ledger, flow, feeding, attention, orientation.operands(attention))
    _note_whole_calls(ledger, flow)
    for block in feed_forwards(flow, feeding):
        for link in flow.links[block.down]:
            ledger.name(link.site, "down")
        for role, site, mask in block.rows:
            ledger.name(site, role, mask)
    for link in routers(flow):
        ledger.name(link.site, "router")
    depth, place = depths(flow), blocks_of(trace.model, flow, sites)
    _name_ends(ledger, flow, place)
    return _twins(
        dataclasses.replace(site, depth=depth.get(site.name), block=place.get(site.name))
        for site in ledger.named()
    )


def _twins(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Give a site that the run did not reach what its structural twin does, and where."""
    sites = tuple(sites)
    by_name = {site.name: site for site in sites}

    def completed(site: Site) -> Site:
        twin = by_name.get(site.twin or "")
        if twin is None or site.uses:
            return site
        return dataclasses.replace(site, roles=twin.roles, depth=twin.depth, block=site.block or twin.block)

    return tuple(completed(site) for site in sites)


def _name_attention(
    ledger: _Ledger, flow: Flow, feeding: Feeding, attention: Attention, operands: Operands
) -> None:
    named: dict[str, list[Feed]] = {}
    for role, nodes in operands.named():
        named[role] = [feed for node in nodes for feed in feeds_of(flow, feeding, node)]
    named = _without_streams(flow, feeding, named)
    if not named["q"] and operands.k == operands.v:
        named = {}  # a learned query weighs a stream as it is: no weight makes its keys or values
    for role, feeds in named.items():
        for feed in _content(ledger, flow, feeds, role):
            ledger.name(feed.site, role, feed.rows)
            if not feed.stable:
                ledger.note(feed.site, f"{role}: rows differ between two random draws")
    family = {feed.call for feeds in named.values() for feed in feeds}
    if family:
        for call in output_calls(flow, attention.outputs, family):
            for link in flow.links[call]:
                ledger.name(link.site, "o")
    _note_beside(ledger, flow, attention, family)
    asked = [feed for role in ("k", "v") for feed in named.get(role, ())]
    streams = crossing(flow, _inputs(flow, named.get("q", ())), _inputs(flow, asked))
    if streams is not None:
        for feed in (feed for feeds in named.values() for feed in feeds):
            ledger.note(feed.site, f"cross-attention: {streams}")


def _without_streams(flow: Flow, feeding: Feeding, named: Mapping[str, list[Feed]]) -> dict[str, list[Feed]]:
    """Leave out weights that make one operand and, through another's weight, a second: they make the stream.

    Values without a weight of their own are the stream that the queries' and keys' weights read.
    """
    feeds = [feed for found in named.values() for feed in found]
    stream = {
        (upper.call, upper.site.name)
        for upper in feeds
        if any(flow.above(lower.call, upper.call) and overlap(flow, feeding, upper, lower) for lower in feeds)
    }
    return {
        role: [feed for feed in found if (feed.call, feed.site.name) not in stream]
        for role, found in named.items()
    }


def _content(ledger: _Ledger, flow: Flow, feeds: list[Feed], role: str) -> list[Feed]:
    """Of the weights that feed one operand keep those fed by data; the others carry positions."""
    fed = [feed for feed in feeds if flow.fed_by_data(feed.call)]
    if not fed:
        return feeds
    for feed in feeds:
        if feed not in fed:
            ledger.note(feed.site, f"carries positions beside {role}")
    return fed


def _inputs(flow: Flow, feeds: Iterable[Feed]) -> list[fx.Node]:
    return list(dict.fromkeys(node for feed in feeds for node in flow.inputs(feed.call)))


def _note_beside(ledger: _Ledger, flow: Flow, attention: Attention, family: Container[fx.Node]) -> None:
    """Remark on the weights beside query and key: positions, biases and what mixes heads."""
    beside = [
        behind_depthwise(flow, call) or call
        for node in (*attention.position, *attention.masks)
        for call in flow.makers(node)
    ]
    for call in dict.fromkeys([*beside, *attention.bias]):
        if not flow.fed_by_data(call):
            _note_all(ledger, flow, call, "carries positions into the scores of an attention")
        elif call not in family:
            _note_all(ledger, flow, call, "is added to the scores of an attention")
    for call in attention.mixers:
        _note_all(ledger, flow, call, "mixes the heads of an attention")


def _note_all(ledger: _Ledger, flow: Flow, call: fx.Node, text: str) -> None:
    for link in flow.links[call]:
        ledger.note(link.site, text)


def _note_whole_calls(ledger: _Ledger, flow: Flow) -> None:
    """Say which streams a call that holds a whole attention's weights lets meet."""
    for call in flow.calls:
        if call.meta.get("op") in WHOLE_ATTENTION:
            query, key = (
                Call("", call.args, call.kwargs).arg(i, name) for i, name in enumerate(("query", "key"))
            )
            streams = crossing(flow, [query], [key])
            if streams is not None:
                _note_all(ledger, flow, call, f"cross-attention: {streams}")


def _name_ends(ledger: _Ledger, flow: Flow, blocks: Container[str]) -> None:
    for call in flow.calls:
        for link in flow.links[call]:
            if flow.is_embedding(call):
                ledger.name(link.site, "embedding")
    for link in stems(flow):
        # A weight inside a block that reads the inputs themselves is that block's first, no stem.
        if not ledger.masks[link.site.name].keys() & _INNER:
            ledger.name(link.site, "stem")
    for link, bypassed in heads(flow):
        inner = link.site.name in blocks or ledger.masks[link.site.name].keys() & {"o", "down"}
        if not (bypassed and inner):
            ledger.name(link.site, "head")
