"""The sites as a graph, and how far along the dataflow each one stands."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx
from torch import fx

from lora_fx.passes.flow import Flow
from lora_fx.passes.trace import Trace
from lora_fx.sites import Site

_FACTS = ("kind", "shape", "dtype", "roles", "depth", "block", "module", "module_class", "notes")


def site_graph(trace: Trace, sites: Sequence[Site]) -> nx.DiGraph[str]:
    """Return the sites as a graph: an edge where one site's result reaches another without passing a third.

    A node's attributes are its site's facts, and ``siblings``: the sites that multiply the same value.
    """
    flow = Flow(trace.graph, sites)
    graph: nx.DiGraph[str] = nx.DiGraph()
    for site in sites:
        graph.add_node(site.name, **{fact: getattr(site, fact) for fact in _FACTS}, siblings=())
    above = _calls_above(flow)
    readers: dict[fx.Node, dict[str, None]] = {}
    for call in flow.calls:
        names = [link.site.name for link in flow.links[call]]
        for maker in flow.calls_of(above[call]):
            graph.add_edges_from((link.site.name, name) for link in flow.links[maker] for name in names)
        for link in flow.links[call]:
            if link.input is not None:
                readers.setdefault(link.input, {})[link.site.name] = None
    for together in readers.values():
        for name in together:
            others = [*graph.nodes[name]["siblings"], *(other for other in together if other != name)]
            graph.nodes[name]["siblings"] = tuple(dict.fromkeys(others))
    return graph


def _calls_above(flow: Flow) -> dict[fx.Node, int]:
    """Return the calls that feed each call without passing another, through values and indices alike."""
    near: dict[fx.Node, int] = {}
    above: dict[fx.Node, int] = {}
    for node in flow.graph.nodes:
        bits = 0
        for source in node.all_input_nodes:
            bits |= near[source]
        if node in flow.links:
            above[node] = bits
            bits = flow.bit[node]
        near[node] = bits
    return above


def depths(flow: Flow) -> dict[str, float]:
    """Return each used site's place along the dataflow, from 0.0 (first) to 1.0 (last), by name.

    A site stands where its first use does, a use as many steps in as the longest chain of sites above
    it; one that no input reaches (positions, learned queries) stands just before what it feeds.
    """
    above = _calls_above(flow)
    place: dict[fx.Node, int] = {}
    for call in flow.calls:
        place[call] = max((place[other] + 1 for other in flow.calls_of(above[call])), default=0)
    for call in reversed(flow.calls):
        if call not in flow.data:
            fed = [place[other] - 1 for other in flow.calls if above[other] & flow.bit[call]]
            place[call] = max(min(fed, default=place[call]), 0)
    last = max(place.values(), default=0)
    return {
        name: min(place[call] for call in calls) / last if last else 0.0
        for name, calls in flow.calls_by_site.items()
    }
