"""Tell an attention's query from its key, and find the weights that make its operands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lora_fx.kinds.base import shape_of
from lora_fx.passes.attention import Attention, Product, fused_operands
from lora_fx.passes.feeding_rows import DRAWS, Feed, Feeding
from lora_fx.passes.flow import Flow, is_floating
from lora_fx.passes.op_groups import ELEMENTWISE, NORMS, SUMS
from lora_fx.passes.replay import Replay, segment_between, structure


@dataclass(frozen=True)
class Operands:
    """The query, key and value nodes of one attention; several where its scores are pieced together."""

    q: tuple[fx.Node, ...]
    k: tuple[fx.Node, ...]
    v: tuple[fx.Node, ...]

    def named(self) -> tuple[tuple[str, tuple[fx.Node, ...]], ...]:
        """Return each role with its nodes."""
        return (("q", self.q), ("k", self.k), ("v", self.v))


@dataclass
class Orientation:
    """Tells query from key by what one row of the scores depends on: one query, but every key.

    A row runs along the axis that the values are summed over.
    """

    flow: Flow
    _known: dict[Any, bool] = field(default_factory=dict[Any, bool])
    _axes: dict[Any, int] = field(default_factory=dict[Any, int])

    def operands(self, attention: Attention) -> Operands:
        """Return the operands of an attention."""
        if attention.fused:
            q, k, v = fused_operands(attention.node)
            return Operands((q,), (k,), (v,))
        queries: list[fx.Node] = []
        keys: list[fx.Node] = []
        for product in attention.scores:
            query, key = product.factors if self._left_asks(attention, product) else product.factors[::-1]
            queries.append(query)
            keys.append(key)
        return Operands(tuple(dict.fromkeys(queries)), tuple(dict.fromkeys(keys)), attention.values)

    def _left_asks(self, attention: Attention, product: Product) -> bool:
        scores = attention.logits
        if scores is None or product.left is product.right or not shape_of(scores):
            return True
        if _is_plain(attention, product):
            return True
        segment = segment_between(scores, product.factors, self.flow.order)
        axis = self._asked_axis(attention)
        key = (structure(segment), axis)
        if key not in self._known:
            run = Replay(segment, DRAWS[0])
            counts = dict.fromkeys(segment.leaves, 0)
            for index in _places(shape_of(scores)):
                cotangent = torch.zeros(shape_of(scores))
                where: list[Any] = list(index)
                where[axis] = slice(None)
                cotangent[tuple(where)] = 1.0
                for leaf, gradient in zip(segment.leaves, run.pulled_back(cotangent), strict=True):
                    counts[leaf] += int((gradient != 0).sum())
            self._known[key] = counts[product.left] <= counts[product.right]
        return self._known[key]

    def _asked_axis(self, attention: Attention) -> int:
        """Return the axis of the probabilities that the product with the values sums over.

        It is the softmax's, but where queries compete for keys.
        """
        shape, output = shape_of(attention.node), attention.outputs[0]
        segment = segment_between(output, [attention.node], self.flow.order)
        key = (structure(segment), attention.dim)
        if key not in self._axes:
            cotangent = torch.zeros(shape_of(output))
            cotangent[tuple(n - 1 for n in cotangent.shape)] = 1.0
            (gradient,) = Replay(segment, DRAWS[0]).pulled_back(cotangent)
            spread = [len(set(places.tolist())) for places in gradient.nonzero(as_tuple=True)]
            widest = max(range(len(spread)), key=spread.__getitem__, default=attention.dim)
            alone = [axis for axis, n in enumerate(spread) if n > 1] == [widest]
            self._axes[key] = widest - len(shape) if alone else attention.dim
        return self._axes[key]


def _is_plain(attention: Attention, product: Product) -> bool:
    """Whether an attention is ``softmax(left @ right, -1) @ values``, all else between being elementwise."""
    output, shape = attention.outputs[0], shape_of(product.node)
    if product.node.meta.get("op") not in _STRAIGHT or output.meta.get("op") not in _STRAIGHT:
        return False
    if attention.dim not in {-1, len(shape) - 1} or output.args[-1] is not attention.values[0]:
        return False
    node = output.all_input_nodes[0]
    while node is not product.node:
        above = [n for n in node.all_input_nodes if shape_of(n) == shape and is_floating(n)]
        if node.meta.get("op") not in ELEMENTWISE or shape_of(node) != shape or len(above) != 1:
            return False
        node = above[0]
    return True


_STRAIGHT = frozenset({"matmul", "bmm"})


def _places(shape: tuple[int, ...]) -> list[list[int]]:
    """A few places of a tensor: the last (which causal masks leave whole), the middle, one between."""
    return [[n - 1 for n in shape], [n // 2 for n in shape], [(2 * n) // 3 for n in shape]]


def feeds_of(flow: Flow, feeding: Feeding, node: fx.Node) -> tuple[Feed, ...]:
    """Return the weights that make an operand, with their rows: those nearest to it.

    Left out are look-ups, and weights of a residual stream that reach the operand past one another:
    there the operand is the stream itself and no weight's result.
    """
    calls = _pointwise(flow, node)
    feeds = feeding.rows(node, calls)
    feeds = tuple(feed for feed in feeds if not flow.is_embedding(feed.call))
    passing: set[fx.Node] = set()
    for lower in feeds:
        for upper in feeds:
            if flow.above(lower.call, upper.call) and overlap(flow, feeding, upper, lower):
                passing |= {upper.call, lower.call}
    return tuple(feed for feed in feeds if feed.call not in passing)


def overlap(flow: Flow, feeding: Feeding, upper: Feed, lower: Feed) -> bool:
    """Whether the rows of ``upper`` that feed the operand also feed ``lower``."""
    for source in flow.inputs(lower.call):
        for feed in feeding.rows(source, flow.makers(source)):
            if feed.call is upper.call and feed.site is upper.site:
                return bool((feed.rows & upper.rows).any())
    return True


def _pointwise(flow: Flow, node: fx.Node) -> Iterable[fx.Node]:
    """Return the nearest calls, looking through depthwise convolutions of one weight's result."""
    found: dict[fx.Node, None] = {}
    for call in flow.makers(node):
        behind = behind_depthwise(flow, call)
        found[call if behind is None else behind] = None
    return found


def behind_depthwise(flow: Flow, call: fx.Node) -> fx.Node | None:
    """Return the one call whose result a depthwise convolution filters, or None."""
    if not is_depthwise(flow, call):
        return None
    (source,) = flow.inputs(call)
    calls = flow.makers(source)
    if len(calls) != 1 or any(n.meta.get("op") in NORMS | SUMS for n in flow.walk_up(source)):
        return None
    return behind_depthwise(flow, calls[0]) or (None if flow.is_embedding(calls[0]) else calls[0])


def is_depthwise(flow: Flow, call: fx.Node) -> bool:
    """Whether a call is a convolution of every channel by itself."""
    link = flow.links[call][0]
    shape = link.site.shape
    return (
        link.site.kind == "conv"
        and len(shape) > 2
        and shape[1] == 1
        and shape[0] > 1
        and _groups(call) == shape[0]
    )


def _groups(call: fx.Node) -> int:
    position = 8 if call.meta.get("op") == "convolution" else 6
    groups = call.args[position] if len(call.args) > position else call.kwargs.get("groups", 1)
    return groups if isinstance(groups, int) else 1
