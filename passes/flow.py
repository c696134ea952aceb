"""The recorded graph read as dataflow between sites: who feeds whom, and from how far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from lora_fx.kinds import BY_OP
from lora_fx.kinds.base import Call, Operand, shape_of
from lora_fx.passes.op_groups import FACTORIES, LOOK_UPS
from lora_fx.sites import Site, Use


@dataclass(frozen=True)
class Link:
    """One use of one site at one call.

    ``weight`` is the argument that carries the weight, ``operand`` how the call's kind reads it.
    """

    site: Site
    use: Use
    weight: fx.Node
    operand: Operand | None

    @property
    def input(self) -> fx.Node | None:
        """The activation that the weight is multiplied with."""
        if self.operand is not None:
            return self.operand.input
        call = next(iter(self.weight.users))
        return next((n for n in call.all_input_nodes if n is not self.weight and is_floating(n)), None)


def is_floating(node: fx.Node) -> bool:
    """Say whether a node may carry floating values: a tuple of tensors may."""
    return bool(node.meta.get("floating", "shape" not in node.meta))


class Flow:
    """The dataflow of one recorded graph, indexed once and then only read.

    ``links`` are the site uses at each call; ``calls`` those calls in order; ``reach[node]`` is the set
    of calls at or above a node, as the bits of an integer (bit i is call i); ``data`` are the nodes that
    depend on the run's inputs, which what is computed from positions and parameters alone does not.
    ``veins`` names the calls through which a value flows by some arguments only: an attention's output is
    made of its values, its probabilities only weigh them, and are made of nothing.
    """

    def __init__(self, graph: fx.Graph, sites: Iterable[Site]) -> None:
        """Read the graph once, in order."""
        self.graph = graph
        self.links = _links(graph, sites)
        self.calls = tuple(node for node in graph.nodes if node in self.links)
        self.calls_by_site: dict[str, list[fx.Node]] = {}
        for call in self.calls:
            for link in self.links[call]:
                self.calls_by_site.setdefault(link.site.name, []).append(call)
        self.bit = {call: 1 << i for i, call in enumerate(self.calls)}
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.reach: dict[fx.Node, int] = {}
        self.data: set[fx.Node] = set()
        self.veins: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._near: dict[fx.Node, int] = {}
        for node in graph.nodes:
            reach = self.bit.get(node, 0)
            for source in node.all_input_nodes:
                reach |= self.reach[source]
            self.reach[node] = reach
            if node.op == "placeholder" or (
                node.meta.get("op") not in FACTORIES and any(n in self.data for n in node.all_input_nodes)
            ):
                self.data.add(node)

    def follow_veins(self, veins: Mapping[fx.Node, tuple[fx.Node, ...]]) -> None:
        """From now on, follow values through these calls by the arguments named for each."""
        self.veins.update(veins)
        self._near.clear()

    def near(self, node: fx.Node) -> int:
        """Return, as bits, the site calls first met when walking up from a value, itself included."""
        if not self._near:
            for here in self.graph.nodes:
                bits = self.bit.get(here, 0)
                if not bits:
                    for source in self.sources(here):
                        bits |= self._near[source]
                self._near[here] = bits
        return self._near[node]

    def makers(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the site calls first met when walking up from a value, in order."""
        return self.calls_of(self.near(node))

    def calls_of(self, bits: int) -> tuple[fx.Node, ...]:
        """Return the calls that a set of bits names."""
        found: list[fx.Node] = []
        while bits:
            low = bits & -bits
            found.append(self.calls[low.bit_length() - 1])
            bits ^= low
        return tuple(found)

    def walk_up(self, target: fx.Node) -> set[fx.Node]:
        """Return the nodes between a value and its makers, both included."""
        seen, stack = {target}, [target]
        while stack:
            node = stack.pop()
            if node not in self.links:
                fresh = [n for n in self.sources(node) if n not in seen]
                seen.update(fresh)
                stack.extend(fresh)
        return seen

    def inputs(self, call: fx.Node) -> tuple[fx.Node, ...]:
        """Return the activations that a call's weights are multiplied with."""
        found = dict.fromkeys(link.input for link in self.links[call])
        return tuple(node for node in found if node is not None)

    def above(self, call: fx.Node, other: fx.Node) -> bool:
        """Say whether ``other`` is a call upstream of ``call``."""
        return call is not other and bool(self.reach[call] & self.bit[other])

    def sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield the arguments of a node whose floating values it carries on."""
        if node in self.veins:
            return iter(self.veins[node])
        return (source for source in node.all_input_nodes if is_floating(source))

    def fed_by_data(self, call: fx.Node) -> bool:
        """Say whether what a call multiplies depends on the run's inputs."""
        return any(node in self.data for node in self.inputs(call))

    def is_embedding(self, call: fx.Node) -> bool:
        """Say whether a call is a look-up."""
        return all(link.use.op in LOOK_UPS for link in self.links[call])


def call_of(node: fx.Node) -> Call:
    """Return a recorded call as a kind sees it."""
    return Call(node.meta.get("op", ""), node.args, node.kwargs, shape_of(node))


def _links(graph: fx.Graph, sites: Iterable[Site]) -> Mapping[fx.Node, Sequence[Link]]:
    nodes = {node.name: node for node in graph.nodes}
    links: dict[fx.Node, list[Link]] = {}
    for site in sites:
        for use in site.uses:
            link = _link(nodes[use.node], site, use) if use.node in nodes else None
            if link is not None:
                links.setdefault(nodes[use.node], []).append(link)
    return links


def _link(node: fx.Node, site: Site, use: Use) -> Link | None:
    names = {site.name, *site.names}

    def carries(argument: fx.Node) -> bool:
        return any(parameter_of(source) in names for source in sources_above(argument))

    kind = BY_OP.get(use.op)
    for operand in () if kind is None else kind.operands(call_of(node)):
        if carries(operand.weight):
            return Link(site, use, operand.weight, operand)
    weight = next((argument for argument in node.all_input_nodes if carries(argument)), None)
    return None if weight is None else Link(site, use, weight, None)


def parameter_of(node: fx.Node) -> str:
    """Return the name of the parameter or buffer that a ``get_attr`` node reads."""
    return str(node.meta.get("parameter") or node.target)


def sources_above(node: fx.Node) -> list[fx.Node]:
    """Return the parameters and buffers from which a node is computed."""
    found: list[fx.Node] = []
    seen, stack = {node}, [node]
    while stack:
        here = stack.pop()
        if here.op == "get_attr":
            found.append(here)
        for source in here.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return found
