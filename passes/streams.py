"""Say where an attention's queries and keys come from: one stream, or one looking at another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from lora_fx.passes.flow import Flow


def crossing(flow: Flow, query_inputs: Sequence[fx.Node], key_inputs: Sequence[fx.Node]) -> str | None:
    """Return the two streams of a cross-attention in words, or None where there is but one.

    The streams are two if they share neither their nearest sites nor what those multiply.
    """
    if not query_inputs or not key_inputs or set(query_inputs) & set(key_inputs):
        return None
    queries, keys = _upstream(flow, query_inputs), _upstream(flow, key_inputs)
    if queries & keys:
        return None
    if not queries and not keys and _roots(query_inputs) & _roots(key_inputs):
        return None
    asking, asked = _stream(flow, query_inputs), _stream(flow, key_inputs)
    return None if asking == asked else f"queries from {asking}, keys and values from {asked}"


def _makers(flow: Flow, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    return {call for node in nodes for call in flow.makers(node)}


def _upstream(flow: Flow, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Makers, and theirs: an operand may be made in two steps (low-rank queries, keys and values)."""
    makers = _makers(flow, nodes)
    return makers | _makers(flow, [node for call in makers for node in flow.inputs(call)])


def _stream(flow: Flow, nodes: Sequence[fx.Node]) -> str:
    """Name a stream by the last weight that made it, else by its input, else as learned."""
    makers = _makers(flow, nodes)
    if makers:
        last = max(makers, key=flow.order.__getitem__)
        return flow.links[last][0].site.name
    inputs = sorted(root.name for root in _roots(nodes) if root.op == "placeholder")
    learned = sorted(str(root.target) for root in _roots(nodes) if root.op == "get_attr")
    return ", ".join(inputs or learned) or "a constant"


def _roots(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    seen, stack = set(nodes), list(nodes)
    while stack:
        fresh = [n for n in stack.pop().all_input_nodes if n not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return {node for node in seen if not node.all_input_nodes}
