"""Find the ends of a model: stems, which no site feeds, and heads, which feed none."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from lora_fx.passes.flow import Flow, Link
from lora_fx.passes.op_groups import WHOLE_ATTENTION


def stems(flow: Flow) -> Iterator[Link]:
    """Yield the uses that multiply the run's inputs themselves; look-ups are embeddings, not stems."""
    for call in flow.calls:
        if flow.is_embedding(call):
            continue
        for link in flow.links[call]:
            if link.input is not None and link.input in flow.data and not flow.reach[link.input]:
                yield link


def heads(flow: Flow) -> Iterator[tuple[Link, bool]]:
    """Yield the uses that make an output and have no site downstream, and whether all outputs pass them by.

    An output passes a site by where another one upstream of it reaches that output without it: then the
    output is a residual stream, and the site may be one more block's.
    """
    last = set(flow.calls) - _with_site_below(flow)
    found: dict[fx.Node, bool] = {}
    for leaf in _leaves(flow.graph):
        makers = flow.makers(leaf)
        for call in makers:
            if call in last and not flow.is_embedding(call):
                bypassed = any(flow.above(call, other) for other in makers)
                found[call] = found.get(call, True) and bypassed
    for call in flow.calls:
        if call in found:
            yield from ((link, found[call]) for link in flow.links[call] if not _has_more_behind(call, link))


def _has_more_behind(call: fx.Node, link: Link) -> bool:
    """Whether a call multiplies what this weight makes with another weight before it returns."""
    return call.meta.get("op") in WHOLE_ATTENTION and "o" not in link.site.roles


def _with_site_below(flow: Flow) -> set[fx.Node]:
    below = 0
    for call in flow.calls:
        below |= flow.reach[call] & ~flow.bit[call]
    return {call for call in flow.calls if below & flow.bit[call]}


def _leaves(graph: fx.Graph) -> list[fx.Node]:
    output: fx.Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return output.all_input_nodes
