"""Find feed-forward blocks: the weights around an activation, inside one residual branch.

    y = x + down(act(up(x)))            up, down
    y = x + down(act(gate(x)) * up(x))  gate, up, down

``up``, ``gate`` and ``down`` are pointwise (linear, 1x1 convolution, experts); norms, dropout and
depthwise convolutions may stand between them. Rows of a fused weight are ``gate`` if they go through
the activation and others do not; where all do, they are ``up``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from lora_fx.kinds.base import shape_of
from lora_fx.passes.attention_operands import behind_depthwise, is_depthwise
from lora_fx.passes.feeding_rows import Feed, Feeding, Mask
from lora_fx.passes.flow import Flow, is_floating
from lora_fx.passes.op_groups import (
    ACTIVATIONS,
    FUSED_ATTENTION,
    JOINS,
    MIXTURES,
    PRODUCTS,
    SCALINGS,
    SELECTIONS,
    SOFTMAX,
    SUMS,
    WHOLE_ATTENTION,
)
from lora_fx.sites import Site

_MOST_MAKERS = 6


@dataclass(frozen=True)
class FeedForward:
    """The weights of one block: the call of ``down``, and rows by role of those that feed it."""

    down: fx.Node
    rows: tuple[tuple[str, Site, Mask], ...]


def feed_forwards(flow: Flow, feeding: Feeding) -> Iterator[FeedForward]:
    """Yield every feed-forward block of the graph."""
    for call in flow.calls:
        if not _pointwise(flow, call):
            continue
        for source in flow.inputs(call):
            found = _block(flow, feeding, call, source)
            if found is not None:
                yield found


def _pointwise(flow: Flow, call: fx.Node) -> bool:
    """Whether every weight of a call acts on each position by itself."""
    if flow.is_embedding(call) or call.meta.get("op") in WHOLE_ATTENTION:
        return False
    shapes = [link.site.shape for link in flow.links[call] if link.site.kind == "conv"]
    return all(set(shape[2:]) <= {1} for shape in shapes) and all(
        shape_of(call)[link.operand.channel] == link.site.form.out_features
        for link in flow.links[call]
        if link.site.kind == "conv" and link.operand is not None
    )


def _block(flow: Flow, feeding: Feeding, down: fx.Node, source: fx.Node) -> FeedForward | None:
    inside = _inside(flow, source)
    if inside is None:
        return None
    bends = [node for node in inside.nodes if node.meta.get("op") in ACTIVATIONS]
    if not bends or not all(_pointwise(flow, call) for call in inside.makers):
        return None
    dropped = _side_gates(flow, inside)
    if dropped is None or not any(_returns_to_stream(flow, down, call) for call in inside.makers):
        return None
    return FeedForward(down, _rows(flow, feeding, source, inside, bends, dropped))


@dataclass(frozen=True)
class _Inside:
    makers: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    scaling: frozenset[fx.Node]
    beside: tuple[fx.Node, ...]


def _inside(flow: Flow, source: fx.Node) -> _Inside | None:
    """Walk up from what ``down`` multiplies; None where this cannot be a feed-forward block's inside.

    ``scaling`` are the makers whose result is multiplied with another value on the way, ``beside``
    the attention outputs that are joined to the block's own values.
    """
    if flow.near(source).bit_count() > _MOST_MAKERS:
        return None
    makers: dict[fx.Node, bool] = {}
    attended: list[fx.Node] = []
    seen, stack = {source}, [(source, False, False)]
    while stack:
        node, scaled, beside = stack.pop()
        op = node.meta.get("op")
        if node in flow.links:
            if flow.is_embedding(node):
                return None
            behind = behind_depthwise(flow, node)
            if behind is not None:
                # What stands before the depthwise convolution is inside too: an activation may.
                stack.extend((n, scaled, beside) for n in flow.inputs(node) if n not in seen)
                seen.update(flow.inputs(node))
            maker = behind or node
            makers[maker] = makers.get(maker, True) and scaled
        elif op in FUSED_ATTENTION or node in flow.veins:
            if not beside:
                return None  # an attention's output is no block's inside, but may stand beside it
            attended.append(node)
        elif op in SOFTMAX | SELECTIONS:
            continue  # what a router weighs with is another's
        elif op in PRODUCTS or op in MIXTURES:
            return None
        else:
            fresh = [n for n in flow.sources(node) if n not in seen]
            seen.update(fresh)
            stack.extend((n, scaled or op in SCALINGS, beside or op in JOINS) for n in fresh)
    scaling = frozenset(call for call, always in makers.items() if always)
    return _Inside(tuple(makers), tuple(seen), scaling, tuple(attended)) if makers else None


def _rows(
    flow: Flow,
    feeding: Feeding,
    source: fx.Node,
    inside: _Inside,
    bends: list[fx.Node],
    dropped: set[fx.Node],
) -> tuple[tuple[str, Site, Mask], ...]:
    """Tell gate from up: gate's rows go through the activation where up's go past it."""
    makers = inside.makers
    whole = feeding.rows(source, makers, cut=inside.beside)
    glus = [node for node in bends if node.meta.get("op") == "glu"]
    bent: list[Feed] = []
    for node in glus or bends:
        inner = next(flow.sources(node), None)
        if inner is not None:
            bent += feeding.rows(inner, makers, part=_gate_half(node) if glus else None)
    past = whole if glus else feeding.rows(source, makers, cut=[*bends, *inside.beside])
    gates = _masks(bent, dropped)
    ups = {key: mask & ~gates[key] if key in gates else mask for key, mask in _masks(past, dropped).items()}
    if not any(bool(mask.any()) for mask in ups.values()):
        return tuple(
            ("up", site, mask) for (site, mask) in _sites(_masks([*whole, *bent], dropped), whole, bent)
        )
    return (
        *(("up", site, mask) for site, mask in _sites(ups, whole, bent) if bool(mask.any())),
        *(("gate", site, mask) for site, mask in _sites(gates, whole, bent)),
    )


def _masks(feeds: list[Feed] | tuple[Feed, ...], dropped: set[fx.Node]) -> dict[str, Mask]:
    masks: dict[str, Mask] = {}
    for feed in feeds:
        if feed.call not in dropped:
            name = feed.site.name
            masks[name] = masks[name] | feed.rows if name in masks else feed.rows
    return masks


def _sites(masks: dict[str, Mask], *feeds: tuple[Feed, ...] | list[Feed]) -> list[tuple[Site, Mask]]:
    sites = {feed.site.name: feed.site for group in feeds for feed in group}
    return [(sites[name], mask) for name, mask in masks.items()]


def _side_gates(flow: Flow, inside: _Inside) -> set[fx.Node] | None:
    """Of makers that feed one another, return those that only scale; None where one does more.

    A squeeze-and-excitation or a spatial gating unit stands between ``up`` and ``down`` and multiplies.
    """
    lower = {call for call in inside.makers if any(flow.above(call, upper) for upper in inside.makers)}
    return lower if lower <= inside.scaling else None


def _gate_half(glu: fx.Node) -> tuple[int, int, int]:
    """The second half of what a gated linear unit splits: (dimension, start, stop)."""
    dim = glu.kwargs.get("dim", glu.args[1] if len(glu.args) > 1 else -1)
    assert isinstance(dim, int)
    size = shape_of(next(iter(glu.all_input_nodes)))[dim]
    return dim, size // 2, size


def _returns_to_stream(flow: Flow, down: fx.Node, up: fx.Node) -> bool:
    """Whether ``down``'s result is added to the stream that ``up`` reads."""
    stream, makers = _stream(flow, up)
    seen, stack = {down}, [down]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen or not is_floating(user) or user in flow.links:
                continue
            seen.add(user)
            op = user.meta.get("op")
            if op in SCALINGS and shape_of(user) != shape_of(node):
                continue  # it scales something larger: a gate's result is no block's
            if op in SUMS:
                others = [n for n in flow.sources(user) if n is not node]
                if any(n in stream or flow.near(n) & makers for n in others):
                    return True
            if op not in PRODUCTS and op not in SOFTMAX and op not in ACTIVATIONS:
                stack.append(user)
    return False


def _stream(flow: Flow, call: fx.Node) -> tuple[set[fx.Node], int]:
    """Return what a call multiplies back to its makers, through depthwise convolutions, and these makers."""
    walked: set[fx.Node] = set()
    makers = 0
    waiting, seen = list(flow.inputs(call)), set[fx.Node]()
    while waiting:
        source = waiting.pop()
        walked |= flow.walk_up(source)
        makers |= flow.near(source)
        fresh = [m for m in flow.makers(source) if m not in seen and is_depthwise(flow, m)]
        seen.update(fresh)
        waiting.extend(n for maker in fresh for n in flow.inputs(maker))
    return walked, makers
