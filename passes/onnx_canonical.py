"""The canonical form of an ONNX graph: equal for two files exactly when their structure is equal.

Walking from the graph's outputs (whose order is fixed) through the operands of each node (whose
order is fixed too) numbers every node, initializer and subgraph in an order that no name has a
part in. The form lists, in that order, what each says and which numbers it reads; its SHA-256 is the
structural digest. Nodes that reach no output are walked afterwards, so that none escapes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from lora_fx.passes.onnx_content import (
    Dims,
    initializer_text,
    node_parts,
    opsets_text,
    subgraphs,
    value_text,
)


@dataclass(frozen=True)
class Canonical:
    """The canonical form, line by line, and its digest."""

    lines: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the lines."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()


@dataclass
class _Numbering:
    """Numbers for nodes, initializers and inner graph inputs, in the order in which they are met."""

    sharing: bool = True
    nodes: dict[ir.Node, int] = field(default_factory=dict[ir.Node, int])
    initializers: dict[ir.Value, int] = field(default_factory=dict[ir.Value, int])
    formals: dict[ir.Value, str] = field(default_factory=dict[ir.Value, str])

    def reference(self, value: ir.Value | None) -> str:
        """Return how a line calls a value that was already met."""
        if value is None:
            return "-"
        producer = value.producer()
        if producer is not None:
            return f"%{self.nodes[producer]}.{value.index()}"
        if value in self.formals:
            return self.formals[value]
        if value in self.initializers:
            return f"${self.initializers[value]}" if self.sharing else f"${initializer_text(value)}"
        return "undefined"

    def discover(self, roots: Sequence[ir.Value | None]) -> Iterator[ir.Node | ir.Value]:
        """Number all that the roots reach, first operand first; yield each new node or initializer."""
        stack: list[ir.Value | None] = list(reversed(roots))
        while stack:
            value = stack.pop()
            if value is None or value in self.formals:
                continue
            producer = value.producer()
            if producer is not None:
                if producer not in self.nodes:
                    yield self.enter(producer, stack)
            elif value.is_initializer() and value not in self.initializers:
                self.initializers[value] = len(self.initializers)
                yield value

    def enter(self, node: ir.Node, stack: list[ir.Value | None]) -> ir.Node:
        """Number a node and push its operands: its inputs, then the outputs of its subgraphs."""
        number = self.nodes[node] = len(self.nodes)
        operands = list(node.inputs)
        for attribute, graph in subgraphs(node):
            for position, formal in enumerate(graph.inputs):
                self.formals[formal] = f"%{number}:{attribute}:{position}"
            operands += list(graph.outputs)
        stack.extend(reversed(operands))
        return node


def canonical(model: ir.Model, *, sharing: bool = True) -> Canonical:
    """Return the canonical form of a model.

    Without ``sharing`` it does not count whether two inputs read one initializer or two alike: a
    runtime merges initializers of equal bytes, which changes no kernel.
    """
    lines = [f"ir {model.ir_version} opsets {opsets_text(model.opset_imports)}"]
    lines += _graph_lines(model.graph, named=True, sharing=sharing)
    for identifier in sorted(model.functions):
        function = model.functions[identifier]
        attributes = " ".join(sorted(function.attributes))
        lines.append(f"function {identifier} opsets {opsets_text(function.opset_imports)} ({attributes})")
        lines += _graph_lines(function, named=False, sharing=sharing)
    return Canonical(tuple(lines))


def _graph_lines(graph: ir.Graph | ir.Function, *, named: bool, sharing: bool) -> list[str]:
    dims = Dims()
    numbering = _Numbering(sharing)
    lines: list[str] = []
    for position, value in enumerate(graph.inputs):
        numbering.formals[value] = f"input {value.name!r}" if named else f"input {position}"
        default = f" = {initializer_text(value)}" if value.is_initializer() else ""
        lines.append(f"{numbering.formals[value]} {value_text(value, dims)}{default}")
    met = list(numbering.discover(graph.outputs))
    for position, value in enumerate(graph.outputs):
        name = f"output {value.name!r}" if named else f"output {position}"
        lines.append(f"{name} {value_text(value, dims)} <- {numbering.reference(value)}")
    lines += _part_lines(met, numbering, dims)
    for dead in dead_ends(graph, numbering.nodes):
        met = list(numbering.discover([dead.outputs[0]] if dead.outputs else []))
        lines += ["reaches no output", *_part_lines(met, numbering, dims)]
    unused = [v for v in all_initializers(graph) if v not in numbering.initializers and v not in graph.inputs]
    lines += sorted(f"unused {initializer_text(value)}" for value in unused)
    return lines


def _part_lines(met: Sequence[ir.Node | ir.Value], numbering: _Numbering, dims: Dims) -> list[str]:
    lines: list[str] = []
    for part in met:
        if isinstance(part, ir.Value):
            if not numbering.sharing:
                continue
            lines.append(f"${numbering.initializers[part]} {initializer_text(part)}")
            continue
        said = "; ".join(f"{name}={text}" for name, text in node_parts(part, dims).items())
        reads = " ".join(numbering.reference(value) for value in part.inputs)
        inner = " ".join(
            f"{attribute}->({' '.join(numbering.reference(value) for value in inner.outputs)})"
            for attribute, inner in subgraphs(part)
        )
        lines.append(f"%{numbering.nodes[part]} {said} reads {reads} {inner}")
    return lines


def all_nodes(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """Yield the nodes of a graph and, after each node, those of its subgraphs."""
    for node in graph:
        yield node
        for _, inner in subgraphs(node):
            yield from all_nodes(inner)


def all_initializers(graph: ir.Graph | ir.Function) -> Iterator[ir.Value]:
    """Yield the initializers of a graph and of its subgraphs."""
    if isinstance(graph, ir.Graph):
        yield from graph.initializers.values()
    for node in graph:
        for _, inner in subgraphs(node):
            yield from all_initializers(inner)


def dead_ends(graph: ir.Graph | ir.Function, met: dict[ir.Node, int]) -> list[ir.Node]:
    """Return the unmet nodes that nothing unmet reads, sorted by what they say."""
    unmet = [node for node in all_nodes(graph) if node not in met]
    ends = [node for node in unmet if not any(user not in met for user in node.successors())]
    return sorted(ends, key=lambda node: repr(node_parts(node, Dims())))
