"""Recognise a softmax, called or spelled out.

    softmax(x)    exp(log_softmax(x))    exp(x - logsumexp(x))
    e = exp(x - max(x)):    e / sum(e)    e * (1 / sum(e))    m * e / (sum(m * e) + eps)    (e @ v) / sum(e)

Of one that is spelled out the exponential stands for the probabilities: they are the same but for a
factor of each row. An exponential that nothing divides by its own sum is no softmax (a feature map, a
decay, a kernel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from lora_fx.passes.flow import Flow
from lora_fx.passes.op_groups import EXPONENTIALS, INVERSES, PRODUCTS, SOFTMAX, TRANSPARENT_TO_SCORES


def softmax_of(node: fx.Node, flow: Flow) -> tuple[fx.Node, int] | None:
    """Return what a node is the softmax of, and over which dimension; None where it is none."""
    op = node.meta.get("op")
    if op in SOFTMAX:
        return node.all_input_nodes[0], _dimension(node)
    if op not in EXPONENTIALS or not node.all_input_nodes:
        return None
    inner = node.all_input_nodes[0]
    if inner.meta.get("op") == "log_softmax":
        return inner.all_input_nodes[0], _dimension(inner)
    logged = _minus_logsumexp(inner)
    if logged is not None:
        return inner.all_input_nodes[0], _dimension(logged)
    dim = _normalised(flow, node)
    return None if dim is None else (inner, dim)


def _minus_logsumexp(node: fx.Node) -> fx.Node | None:
    """Return the ``logsumexp(x)`` of ``x - logsumexp(x)``."""
    if node.meta.get("op") != "sub" or len(node.args) < 2:
        return None
    first, total = node.args[:2]
    alike = isinstance(total, fx.Node) and total.meta.get("op") == "logsumexp" and total.args[0] is first
    return total if alike and isinstance(total, fx.Node) else None


def _dimension(call: fx.Node) -> int:
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else -1)
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    return dim if isinstance(dim, int) else -1


def _normalised(flow: Flow, exponential: fx.Node) -> int | None:
    """Return the dimension by whose sum an exponential is divided, before or after it meets the values."""

    def masks(user: fx.Node, node: fx.Node) -> bool:
        """Whether nothing but a mask, no weight's result, joins the exponential here."""
        return not any(flow.near(other) for other in user.all_input_nodes if other is not node)

    numerators = _below([exponential], lambda _user, _node: True, products=1)
    for total in _sums(_below([exponential], masks)):
        made = _below([total], lambda _user, _node: True)
        inverted = _below([n for n in made if n.meta.get("op") in INVERSES], lambda _user, _node: True)
        if any(_divides(node, numerators, made, inverted) for node in numerators):
            return _dimension(total)
    return None


def _sums(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the sums over one dimension of any of these values."""
    sums = {u: None for n in nodes for u in n.users if u.meta.get("op") == "sum" and u.args[0] is n}
    return [s for s in sums if len(s.args) > 1 or "dim" in s.kwargs]


def _divides(node: fx.Node, numerators: set[fx.Node], totals: set[fx.Node], inverted: set[fx.Node]) -> bool:
    op = node.meta.get("op")
    if op in {"div", "div_"}:
        return node.args[0] in numerators and node.args[1] in totals
    if op in {"mul", "mul_"}:
        left, right = node.args[:2]
        return (left in numerators and right in inverted) or (left in inverted and right in numerators)
    return False


def _below(
    start: Iterable[fx.Node], follows: Callable[[fx.Node, fx.Node], bool], products: int = 0
) -> set[fx.Node]:
    """Return what is made of some values by transparent calls, and by at most so many products."""
    left = dict.fromkeys(start, products)
    stack = list(left)
    while stack:
        node = stack.pop()
        for user in node.users:
            op = user.meta.get("op", "")
            rest = left[node] - (op in PRODUCTS)
            passes = op in TRANSPARENT_TO_SCORES | INVERSES or op in PRODUCTS
            if rest >= 0 and passes and left.get(user, -1) < rest and follows(user, node):
                left[user] = rest
                stack.append(user)
    return set(left)
