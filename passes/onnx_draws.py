"""The outputs of a graph that random numbers reach which it draws itself: no two runs give the same.

A forward that calls ``torch.rand`` draws other numbers in the runtime than in torch, and others in every run;
so what they reach can be compared with nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import onnx_ir as ir

Item = TypeVar("Item")

DRAWING = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
"""Operators that draw. ``Dropout`` does where it trains."""
SHAPES = frozenset({"Shape", "Size"})
"""Operators that read no values."""


@dataclass(frozen=True)
class Draws:
    """What a graph draws: the operators that do, its outputs' names, and those of them that these reach."""

    operators: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    reached: frozenset[int] = frozenset()

    @classmethod
    def of(cls, model: ir.Model) -> Draws:
        """Find what random numbers reach; a value that a branch draws reaches all that the branch gives."""
        operators: dict[str, None] = {}
        drawn: set[ir.Value] = set()
        _follow(model, model.graph, drawn, operators)
        reached = frozenset(i for i, value in enumerate(model.graph.outputs) if value in drawn)
        return cls(tuple(operators), tuple(value.name or "" for value in model.graph.outputs), reached)

    @property
    def every(self) -> bool:
        """Whether nothing is left to compare."""
        return bool(self.reached) and len(self.reached) == len(self.names)

    @property
    def nothing(self) -> str:
        """What a check says that has nothing to compare."""
        drawn = f"random numbers that the graph draws ({', '.join(self.operators)})"
        return f"nothing to compare: {drawn} reach every output"

    @property
    def notes(self) -> list[str]:
        """A note that says what is not compared, why, and what to do."""
        if not self.reached:
            return []
        reached = ", ".join(self.names[i] for i in sorted(self.reached))
        note = (
            f"the graph itself draws random numbers ({', '.join(self.operators)}), other ones than torch: "
            f"{reached} not compared, since they depend on these; to have them compared, let the forward "
            "take the random numbers, and pass them with the example inputs"
        )
        return [note]

    def others(self, outputs: Sequence[Item]) -> list[Item]:
        """Return the outputs that no random number reaches."""
        return [each for i, each in enumerate(outputs) if i not in self.reached]


NONE = Draws()
"""Of a graph that draws nothing."""


def _follow(
    model: ir.Model, nodes: Iterable[ir.Node], drawn: set[ir.Value], operators: dict[str, None]
) -> bool:
    """Add what random numbers reach in a graph's nodes, in their order; return whether they reach any."""
    any_drawn = False
    for node in nodes:
        called = model.functions.get(node.op_identifier())
        inner: list[Iterable[ir.Node]] = [*_inner(node), *([called] if called is not None else [])]
        reached = _draws(node, operators) or (
            node.op_type not in SHAPES and any(value in drawn for value in node.inputs if value is not None)
        )
        # Every one of them is followed, whichever reaches first.
        below = [_follow(model, each, drawn, operators) for each in inner]
        if reached or any(below):
            any_drawn = True
            drawn.update(node.outputs)
    return any_drawn


def _draws(node: ir.Node, operators: dict[str, None]) -> bool:
    """Whether a node draws by itself."""
    if node.op_type in DRAWING or (node.op_type == "Dropout" and _trains(node)):
        operators[node.op_type] = None
        return True
    return False


def _trains(node: ir.Node) -> bool:
    """Whether a dropout may draw: its third input, false where there is none, is not known to be false."""
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is None:
        return False
    known = training.const_value
    return known is None or bool(known.numpy().any())


def _inner(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs of a node's branches."""
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type is ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()
