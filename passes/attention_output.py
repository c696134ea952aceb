"""Find an attention's output weights: the first that its result meets on the way down."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from lora_fx.passes.flow import Flow, is_floating
from lora_fx.passes.op_groups import FUSED_ATTENTION, SOFTMAX, SUMS


def output_calls(flow: Flow, outputs: Iterable[fx.Node], family: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """Return the site calls nearest downstream of an attention's outputs.

    ``family`` are the calls that make its operands. Where the output is added to a stream that they
    did not make, it has joined the residual: a weight behind that is none of the attention's.
    """
    kin = 0
    for call in family:
        kin |= flow.bit[call]
    found: dict[fx.Node, None] = {}
    stack = list(outputs)
    seen = set(stack)
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen or not (is_floating(user) or user in flow.links):
                continue
            seen.add(user)
            if user in flow.links:
                if node in flow.inputs(user):
                    found[user] = None
            elif user.meta.get("op") not in SOFTMAX | FUSED_ATTENTION and not _joins_stream(
                flow, user, node, kin
            ):
                stack.append(user)
    return tuple(sorted(found, key=flow.order.__getitem__))


def _joins_stream(flow: Flow, total: fx.Node, part: fx.Node, kin: int) -> bool:
    """Whether a sum adds something that does not come from the attention's own weights."""
    if total.meta.get("op") not in SUMS:
        return False
    others = [n for n in flow.sources(total) if n is not part and n in flow.data]
    return any(not flow.reach[n] & kin for n in others)
