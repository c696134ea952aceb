"""Find the ends of a model: stems, which no site feeds, and heads, which feed none."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from lora_fx.passes.flow import Flow, Link


def stems(flow: Flow) -> Iterator[Link]:
    """Yield the uses that multiply the run's inputs themselves; look-ups are embeddings, not stems."""
    for call in flow.calls:
        if flow.is_embedding(call):
            continue
        for link in flow.links[call]:
            if link.input is not None and link.input in flow.data and not flow.reach[link.input]:
                yield link


def heads(flow: Flow) -> Iterator[Link]:
    """Yield the uses that make an output.

    A head has no site downstream, and some output is made of it alone: where a site upstream of it
    reaches that output past it, the output is a residual stream and the use one more block's.
    """
    last = set(flow.calls) - _with_site_below(flow)
    found: set[fx.Node] = set()
    for leaf in _leaves(flow.graph):
        makers = flow.makers(leaf)
        for call in makers:
            bypassed = any(flow.above(call, other) for other in makers)
            if call in last and not bypassed and not flow.is_embedding(call):
                found.add(call)
    for call in flow.calls:
        if call in found:
            yield from flow.links[call]


def _with_site_below(flow: Flow) -> set[fx.Node]:
    below = 0
    for call in flow.calls:
        below |= flow.reach[call] & ~flow.bit[call]
    return {call for call in flow.calls if below & flow.bit[call]}


def _leaves(graph: fx.Graph) -> list[fx.Node]:
    output: fx.Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return output.all_input_nodes
