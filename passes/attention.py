"""Find the attentions of a recorded graph.

An attention is a call that is one as a whole, or a softmax between two products::

    scores = product(q, k)  ->  (scale, mask, bias, dropout, cast, view)  ->  softmax  ->  (the like)
    output = product(softmax, v)

where the factors of both products are activations: a softmax over a weight's own result (a classifier,
a router) is none, and neither is a product with a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from lora_fx.kinds.base import shape_of
from lora_fx.passes.flow import Flow, is_floating
from lora_fx.passes.op_groups import (
    FUSED_ATTENTION,
    HEAD_MIXING,
    PRODUCTS,
    SCALINGS,
    SOFTMAX,
    TRANSPARENT_TO_SCORES,
)
from lora_fx.passes.softmax import softmax_of


@dataclass(frozen=True)
class Product:
    """A product of two activations."""

    node: fx.Node
    left: fx.Node
    right: fx.Node

    @property
    def factors(self) -> tuple[fx.Node, fx.Node]:
        """Both factors."""
        return (self.left, self.right)


@dataclass(frozen=True)
class Attention:
    """One attention: its probabilities' node (or the whole call), their logits, its products.

    ``scores`` are the products of a query with a key, the content's alone where positions have their
    own; query and key are still to be told apart. ``position`` are factors that stand beside the
    content's, ``bias`` site calls whose result is added to the scores, ``masks`` values that are,
    ``mixers`` site calls that mix its heads.
    """

    node: fx.Node
    values: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    logits: fx.Node | None = None
    dim: int = -1
    scores: tuple[Product, ...] = ()
    position: tuple[fx.Node, ...] = ()
    bias: tuple[fx.Node, ...] = ()
    mixers: tuple[fx.Node, ...] = ()
    masks: tuple[fx.Node, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether one call is the whole attention."""
        return self.node.meta.get("op") in FUSED_ATTENTION

    @property
    def veins(self) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
        """The calls through which values flow by some arguments only, with those arguments."""
        for output, value in zip(self.outputs, self.values, strict=True):
            # Of a product by multiply-and-sum it is the multiplication that takes the value.
            yield output if value in output.all_input_nodes else output.all_input_nodes[0], (value,)
        if not self.fused:
            yield self.node, ()


def find_attentions(flow: Flow) -> tuple[Attention, ...]:
    """Return every attention of the graph, in order."""
    found = (_attention(flow, node) for node in flow.graph.nodes if node not in flow.links)
    return tuple(attention for attention in found if attention is not None)


def product_of(node: fx.Node, flow: Flow) -> Product | None:
    """Return a node as a product of two activations, or None where it is none."""
    op = node.meta.get("op", "")
    if op == "sum" or op in SCALINGS:
        return _summed_product(node, flow)
    first = PRODUCTS.get(op)
    if first is None or node in flow.links:
        return None
    operands = [n for n in _flat(node.args[first:]) if is_floating(n)]
    operands += [n for key, n in node.kwargs.items() if isinstance(n, fx.Node) and key != "out"]
    return Product(node, operands[0], operands[1]) if len(operands) >= 2 else None


def _summed_product(node: fx.Node, flow: Flow) -> Product | None:
    """Return the product of which a node is the multiplication or the sum: ``(left * right).sum(dim)``.

    Both factors must come of weights, and one is spread over the other: what multiplies a value by
    scalars or by its own shape, and sums afterwards, is gating, a norm or a pooling.
    """
    total = node if node.meta.get("op") == "sum" else next(iter(node.users), node)
    times = total.all_input_nodes[0] if total.all_input_nodes else node
    if total.meta.get("op") != "sum" or times.meta.get("op") not in SCALINGS or len(times.users) != 1:
        return None
    factors = [n for n in times.args if isinstance(n, fx.Node) and is_floating(n) and flow.reach[n]]
    dims = total.kwargs.get("dim", total.args[1] if len(total.args) > 1 else None)
    dims = dims if isinstance(dims, (tuple, list)) else (dims,)
    if len(factors) != 2 or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    left, right = factors
    spread = shape_of(left) != shape_of(right) or any(n.meta.get("op") in _SPREADING for n in factors)
    return Product(total, left, right) if spread else None


_SPREADING = frozenset({"expand", "expand_as", "repeat", "tile", "repeat_interleave", "broadcast_to"})


def _flat(value: object) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)


def _attention(flow: Flow, node: fx.Node) -> Attention | None:
    op = node.meta.get("op")
    if op in FUSED_ATTENTION:
        operands = fused_operands(node)
        if len(operands) < 3:
            return None
        masks = tuple(n for n in node.all_input_nodes if n not in operands and is_floating(n))
        return Attention(node, values=(operands[2],), outputs=(node,), masks=masks)
    softmax = softmax_of(node, flow)
    return None if softmax is None else _around_softmax(flow, node, *softmax)


def fused_operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return query, key and value of a call that is a whole attention."""
    names = ("query", "key", "value")
    given = [*node.args[:3], *(node.kwargs[n] for n in names[len(node.args) :] if n in node.kwargs)]
    return tuple(n for n in given if isinstance(n, fx.Node))


def _around_softmax(flow: Flow, softmax: fx.Node, logits: fx.Node, dim: int) -> Attention | None:
    before = _scores(flow, logits)
    if not before.products:
        return None
    values, outputs, after = _weighted(flow, softmax)
    if not outputs:
        return None
    content = _content(flow, before.products)
    beside = [f for product in before.products if product not in content for f in product.factors]
    return Attention(
        softmax,
        values,
        outputs,
        logits=logits,
        dim=dim,
        scores=content,
        position=tuple(beside),
        bias=tuple(before.bias),
        mixers=(*before.mixers, *after),
    )


@dataclass
class _Before:
    products: list[Product]
    bias: list[fx.Node]
    mixers: list[fx.Node]


_BEFORE_SOFTMAX = TRANSPARENT_TO_SCORES | HEAD_MIXING | {"topk", "sort"}
"""What may stand between a product and its softmax; some attend to the highest scores only."""


def _scores(flow: Flow, logits: fx.Node) -> _Before:
    """Walk up from the logits of a softmax to the products that make them."""
    found = _Before([], [], [])
    seen: set[fx.Node] = set()
    stack = [logits]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        product = product_of(node, flow)
        if product is not None:
            found.products.append(product)
        if node in flow.links:
            above = _mixed_product(flow, node)
            if above is None:
                found.bias.append(node)
            else:
                found.mixers.append(node)
                stack.append(above)
        elif node.meta.get("op") in _BEFORE_SOFTMAX and not _is_largest(node):
            # Of a product with an addend (baddbmm) the addend is walked up, its factors are not.
            factors = () if product is None else product.factors
            stack.extend(n for n in flow.sources(node) if n not in factors)
    found.products.sort(key=lambda p: flow.order[p.node])
    return found


def _is_largest(node: fx.Node) -> bool:
    """Whether a value is the largest score of each row: what is taken off them, and changes no softmax."""
    return node.meta.get("op") in {"amax", "max"} and len(node.all_input_nodes) == 1


def _mixed_product(flow: Flow, call: fx.Node) -> fx.Node | None:
    """Return the product whose heads a weight mixes (talking heads), or None where it does not."""
    link = flow.links[call][0]
    node = link.input
    while node is not None and node not in flow.links:
        product = product_of(node, flow)
        if product is not None:
            return node if link.site.form.in_features in shape_of(node)[:-2] else None
        if node.meta.get("op") in SOFTMAX:
            return node if link.site.form.in_features in shape_of(node)[:-2] else None
        if node.meta.get("op") not in TRANSPARENT_TO_SCORES | HEAD_MIXING:
            return None
        node = next((n for n in node.all_input_nodes if is_floating(n) and n in flow.data), None)
    return None


def _weighted(flow: Flow, softmax: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...], list[fx.Node]]:
    """Walk down from a softmax to the products of its probabilities with values."""
    values: list[fx.Node] = []
    outputs: list[fx.Node] = []
    mixers: list[fx.Node] = []
    seen, stack = {softmax}, [softmax]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen:
                continue
            product = product_of(user, flow)
            if product is not None and node in product.factors:
                seen.add(user)
                values.append(product.right if product.left is node else product.left)
                outputs.append(product.node)
            elif user in flow.links:
                if _mixed_product(flow, user) is not None and node in _around(flow, user):
                    seen.add(user)
                    mixers.append(user)
                    stack.append(user)
            elif user.meta.get("op") in TRANSPARENT_TO_SCORES | HEAD_MIXING and is_floating(user):
                seen.add(user)
                stack.append(user)
    pairs = [(v, o) for v, o in zip(values, outputs, strict=True) if v in flow.data or flow.reach[v]]
    return tuple(v for v, _ in pairs), tuple(o for _, o in pairs), mixers


def _around(flow: Flow, call: fx.Node) -> Iterable[fx.Node]:
    return flow.inputs(call)


def _content(flow: Flow, products: list[Product]) -> tuple[Product, ...]:
    """Of several products that are summed, keep those with the most factors that come from data."""
    if len(products) == 1:
        return tuple(products)
    fed = [sum(_comes_from_data(flow, factor) for factor in product.factors) for product in products]
    return tuple(product for product, count in zip(products, fed, strict=True) if count == max(fed))


def _comes_from_data(flow: Flow, node: fx.Node) -> bool:
    """Whether a value is what a site made of the run's inputs, not of positions or parameters."""
    return any(flow.fed_by_data(call) for call in flow.makers(node))
