"""Which calls of a recorded run multiply with a parameter: a walk from each read through its views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from lora_fx.kinds import BY_OP, Call, Kind, Operand
from lora_fx.passes.layout import Layout, Memory, whole

COPIES = frozenset(
    {
        "clone",
        "contiguous",
        "to",
        "float",
        "half",
        "double",
        "bfloat16",
        "type",
        "type_as",
        "cuda",
        "cpu",
        "reshape",
        "reshape_as",
        "flatten",
        "unflatten",
        "ravel",
        "view",
        "view_as",
        "detach",
        "detach_copy",
        "alias",
        "positive",
        "view_copy",
        "pin_memory",
        "unsafe_view",
        "lift_fresh",
        "convert_element_type",
    }
)
"""Operations whose result, where it is no view, is a copy of the same elements in row-major order."""


SHUFFLES = frozenset(
    {
        "flip",
        "fliplr",
        "flipud",
        "rot90",
        "roll",
        "getitem",
        "index_select",
        "gather",
        "take_along_dim",
        "sort",
    }
)
"""Operations that may keep the shape and yet move the elements."""


JOINS = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "block_diag"})
"""Operations that put several weights into one, which is then read as each one's rows by axis 0."""


_SHAPED_LIKE = frozenset(
    {
        "zeros_like",
        "ones_like",
        "empty_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_empty_strided",
        "full_like",
        "new_full",
    }
)
"""Operations that ask their first tensor for its shape, dtype and device, and for none of its values."""


@dataclass(frozen=True)
class Found:
    """One call that has a view of a parameter, or a weight computed from it, in a weight's place."""

    kind: Kind
    operand: Operand
    node: fx.Node
    layout: Layout | None
    computed: str | None
    direct: bool

    @property
    def op(self) -> str:
        """The canonical operation of the call."""
        return str(self.node.meta["op"])


@dataclass
class Reach:
    """What a walk from one parameter found: the multiplications, and the other calls that read it."""

    uses: list[Found] = field(default_factory=list["Found"])
    reads: list[fx.Node] = field(default_factory=list["fx.Node"])


@dataclass(frozen=True)
class _State:
    node: fx.Node
    layout: Layout | None
    memory: Memory | None
    computed: str | None


def reach(read: fx.Node, active: frozenset[fx.Node]) -> Reach:
    """Walk from a parameter's ``get_attr`` through views, copies and weight computations.

    ``active`` are the nodes that depend on the inputs: what they return is no weight.
    """
    shape = tuple(read.meta["shape"])
    layout = whole(shape)
    memory = layout.memory(read.meta["stride"], read.meta["offset"]) if "stride" in read.meta else None
    found = Reach()
    waiting = [_State(read, layout, memory, None)]
    seen = {read}
    while waiting:
        state = waiting.pop(0)
        for user in state.node.users:
            uses = list(_operands(user, state))
            found.uses.extend(
                Found(kind, operand, user, state.layout, state.computed, direct=state.node is read)
                for kind, operand in uses
            )
            following = None if user in seen else _follow(user, state, active)
            if following is not None:
                seen.add(user)
                waiting.append(following)
            elif not uses and user not in seen:
                found.reads.append(user)
    found.uses = _without_computations(found.uses, active)
    return found


def _without_computations(uses: list[Found], active: frozenset[fx.Node]) -> list[Found]:
    """Leave out products that only go into a weight: the norm that a spectral norm divides by, say."""
    inside: set[fx.Node] = set()
    for weight in {use.operand.weight for use in uses if use.computed is not None}:
        inside |= ancestors(weight)
    return [use for use in uses if use.node in active or use.node not in inside]


def _operands(user: fx.Node, state: _State) -> Iterator[tuple[Kind, Operand]]:
    kind = BY_OP.get(user.meta.get("op", ""))
    if kind is None or user.op == "output":
        return
    call = Call(user.meta["op"], user.args, user.kwargs, user.meta.get("shape"))
    for operand in kind.operands(call):
        if operand.weight is state.node:
            yield kind, operand


def _follow(user: fx.Node, state: _State, active: frozenset[fx.Node]) -> _State | None:
    """Return the state behind a call that yields the parameter again, or None where it does not.

    The inputs may say which of a stack's matrices to take, and nothing else: a result that depends on
    them in another way is no weight.
    """
    if user.op == "output" or user.meta.get("op") in BY_OP:
        return None
    if any(n in active for n in user.all_input_nodes if n is not state.node):
        return _gathered(user, state)
    if "shape" not in user.meta:  # a tuple of views: split, unbind
        return _State(user, state.layout, state.memory, state.computed)
    if "stride" not in user.meta or not user.meta["floating"]:
        return None
    size, writes = user.meta["shape"], user.meta.get("writes", ())
    if not writes and _same_memory(user, state):
        stride, offset = user.meta["stride"], user.meta["offset"]
        layout = None if state.memory is None else state.memory.view(size, stride, offset)
        return _State(user, layout, state.memory, state.computed)
    if _is_pattern(user, state.node):
        return None
    copied = None if "shape" not in state.node.meta else _follow_copy(user, state, size, writes)
    if copied is None and user not in active and not writes:
        return _copied(user, None, user.meta["op"])
    return copied


def _is_pattern(user: fx.Node, node: fx.Node) -> bool:
    """Say whether a call asks a tensor for its shape or dtype alone: ``zeros_like``, ``x.view_as(node)``."""
    op = str(user.meta["op"])
    if op.endswith("_like") or op.startswith("new_"):
        return True
    return (op in COPIES or op.endswith("_as")) and (not user.args or user.args[0] is not node)


def _follow_copy(
    user: fx.Node, state: _State, size: tuple[int, ...], writes: tuple[fx.Node, ...]
) -> _State | None:
    """Return the state behind a copy, or behind a computation that keeps the shape.

    Whatever else is computed from weights alone (repeated rows, a Kronecker product) is a weight too.
    """
    if user.meta["op"] in COPIES:
        if writes:
            return None
        layout = None if state.layout is None else state.layout.reshaped(size)
        return _copied(user, layout, state.computed)
    if user.meta["op"] in JOINS and not writes:
        return _copied(user, None, user.meta["op"])
    if tuple(size) == tuple(state.node.meta["shape"]):
        layout = None if user.meta["op"] in SHUFFLES else state.layout
        return _copied(user, layout, user.meta["op"])
    return None


def _gathered(user: fx.Node, state: _State) -> _State | None:
    """Return the state behind ``stack[ids]``: a copy whose first axes run over matrices of the stack."""
    op, args, shape = user.meta["op"], user.args, state.node.meta.get("shape", ())
    if op not in {"getitem", "index_select"} or args[0] is not state.node or len(shape) < 3:
        return None
    ids = args[-1]
    if op == "index_select" and args[1] not in (0, -len(shape)):
        return None
    if isinstance(ids, (tuple, list)):
        if any(rest not in (slice(None), Ellipsis) for rest in ids[1:]):
            return None
        ids = ids[0]
    if not isinstance(ids, fx.Node) or ids.meta.get("dtype") == torch.bool:
        return None
    if not _same_memory(user, state) and state.layout is not None:
        taken = tuple(((n, 0),) if n > 1 else () for n in ids.meta["shape"])
        return _copied(user, Layout(taken + state.layout.axes[1:], state.layout.offset), state.computed)
    memory = state.memory if _same_memory(user, state) else None
    layout = None if memory is None else memory.view(*(user.meta[k] for k in ("shape", "stride", "offset")))
    return _State(user, layout, memory, state.computed)


def _copied(user: fx.Node, layout: Layout | None, computed: str | None) -> _State:
    memory = None if layout is None else layout.memory(user.meta["stride"], user.meta["offset"])
    return _State(user, layout, memory, computed)


def _same_memory(user: fx.Node, state: _State) -> bool:
    memory = user.meta.get("memory")
    if memory is None:
        return False
    source = state.node
    while "shape" not in source.meta:  # the tuple that a view was taken from
        source = source.all_input_nodes[0]
    return bool(memory == source.meta.get("memory"))


def active_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the nodes that depend on a placeholder, or on a value whose making was not seen."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if (
            node.op == "placeholder"
            or node.meta.get("unexplained")
            or any(n in found for n in node.all_input_nodes)
        ):
            found.add(node)
    return frozenset(found)


def live_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the nodes that an output depends on; all of them where no output was seen."""
    return _behind_output(graph, frozenset())


def learning_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the nodes that an output passes a gradient back to.

    Whole numbers and truth values (the indices of a top-k, a mask) pass none, and neither do
    ``detach`` and ``data``: what reaches an output through these alone is live and cannot be trained.
    """
    stopped = (
        n for n in graph.nodes if n.meta.get("floating") is False or n.meta.get("op") in {"detach", "data"}
    )
    return _behind_output(graph, frozenset(stopped))


def _behind_output(graph: fx.Graph, stopped: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """Return what lies behind the output; all nodes where a value on the way was made out of sight."""
    output = next((n for n in graph.nodes if n.op == "output"), None)
    if output is None or not output.all_input_nodes:
        return frozenset(graph.nodes)
    found = ancestors(output, stopped)
    return frozenset(graph.nodes) if any(n.meta.get("unexplained") for n in found) else found


def _valued(node: fx.Node) -> list[fx.Node]:
    """Return the arguments whose values a call may use, without one that it takes a shape or dtype from."""
    op, given = str(node.meta.get("op", "")), node.all_input_nodes
    pattern = 1 if op.endswith("_as") else 0
    if op not in _SHAPED_LIKE and not op.endswith("_as"):
        return given
    asked = node.args[pattern] if pattern < len(node.args) else None
    return [source for source in given if source is not asked or node.args.count(asked) > 1]


def ancestors(node: fx.Node, stopped: frozenset[fx.Node] = frozenset()) -> frozenset[fx.Node]:
    """Return a node and all whose values it depends on, not walking back through ``stopped`` nodes.

    What a tensor of its own values (``zeros_like``, ``new_zeros``) takes its shape from is no dependence.
    """
    found: set[fx.Node] = {node}
    waiting = [node]
    while waiting:
        for source in _valued(waiting.pop()):
            if source not in found and source not in stopped:
                found.add(source)
                waiting.append(source)
    return frozenset(found)
