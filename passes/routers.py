"""Find routers: weights whose result chooses which experts see a position.

    scores = router(x)  ->  (softmax, sigmoid, bias, view)  ->  topk or argmax over the experts

and what is chosen meets what is made of the same stream: experts on ``x``.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from lora_fx.kinds.base import shape_of
from lora_fx.passes.flow import Flow, Link, is_floating
from lora_fx.passes.op_groups import SELECTIONS, SOFTMAX, TRANSPARENT_TO_SCORES

_BETWEEN = TRANSPARENT_TO_SCORES | SOFTMAX | {"sigmoid", "sigmoid_", "sum", "log_softmax", "softplus", "sqrt"}


def routers(flow: Flow) -> Iterator[Link]:
    """Yield the uses that route."""
    for node in flow.graph.nodes:
        if node.meta.get("op") not in SELECTIONS:
            continue
        call = _scorer(flow, node)
        if call is not None and _chooses(flow, node, call):
            yield from flow.links[call]


def _scorer(flow: Flow, choice: fx.Node) -> fx.Node | None:
    """Return the one call whose channels a selection chooses among."""
    scores = choice.all_input_nodes[0]
    makers = flow.makers(scores) if is_floating(scores) else ()
    if len(makers) != 1 or flow.is_embedding(makers[0]):
        return None
    between = flow.walk_up(scores) - {makers[0]}
    if any(n.op not in {"get_attr", "placeholder"} and n.meta.get("op") not in _BETWEEN for n in between):
        return None
    shape, dim = shape_of(scores), _dimension(choice)
    channels = flow.links[makers[0]][0].site.form.out_features
    if not shape or not -len(shape) <= dim < len(shape) or channels % shape[dim]:
        return None
    return makers[0]


def _dimension(choice: fx.Node) -> int:
    position = 2 if choice.meta.get("op") == "topk" else 1
    dim = choice.kwargs.get("dim", choice.args[position] if len(choice.args) > position else -1)
    return dim if isinstance(dim, int) else -1


def _chooses(flow: Flow, choice: fx.Node, call: fx.Node) -> bool:
    """Whether what is chosen meets the router's own stream, or what weights make of it."""
    stream = 0
    sources: set[fx.Node] = set()
    for source in flow.inputs(call):
        stream |= flow.near(source)
        sources |= flow.walk_up(source)
    kin = stream
    for other in flow.calls:
        if other is not call and any(flow.near(n) & stream or n in sources for n in flow.inputs(other)):
            kin |= flow.bit[other]
    seen, stack = {choice}, [choice]
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            met = [n for n in user.all_input_nodes if n not in seen and is_floating(n) and n.op != "get_attr"]
            if any(flow.near(n) & kin or n in sources for n in met):
                return True
            if user not in flow.links:
                stack.append(user)
    return False
