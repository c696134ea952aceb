"""Constants that equal each other for the values of now alone, told apart again.

The exporter's optimiser computes constants from parameters and then merges small initializers of equal
bytes: two temperatures that start alike become one. Trained, they are two, and the file would have
another graph than its base. So each operand gets back the initializer that the unoptimised graph names
there, unless both are the same expression of the same parameters, which are equal whatever the values.
"""

from __future__ import annotations

import itertools
from typing import Any

import onnx_ir as ir

from lora_fx.passes.onnx_canonical import all_nodes
from lora_fx.passes.onnx_content import subgraphs
from lora_fx.passes.onnx_tensors import as_torch, can_hold_weights, from_torch

FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
"""The metadata in which the exporter's optimiser notes what a constant was computed from."""


def unmerge(model: ir.Model, raw: ir.Model) -> None:
    """Give operands of the optimised model their own initializers again, in place; ``raw`` is unoptimised."""
    parameters = frozenset(raw.graph.initializers)
    named = {node.name: node for node in all_nodes(raw.graph) if node.name}
    made = {v.name: v for node in all_nodes(raw.graph) for v in node.outputs}
    for node in all_nodes(model.graph):
        before = named.get(node.name or "")
        if before is None or before.op_type != node.op_type or len(before.inputs) != len(node.inputs):
            continue
        for index, (held, was) in enumerate(zip(node.inputs, before.inputs, strict=True)):
            if held is None or was is None or held.name == was.name or not held.is_initializer():
                continue
            other = made.get(held.name)
            if other is None or was.producer() is None or not can_hold_weights(held.const_value):
                continue
            origins = _parameters_of(was, parameters)
            if origins and not _same_expression(was, other):
                node.replace_input_with(index, _own(model.graph, was.name or "", held, origins))


def _own(graph: ir.Graph, name: str, held: ir.Value, origins: frozenset[str]) -> ir.Value:
    """Return the initializer of this name, made with what the other one holds where there is none."""
    if name not in graph.initializers:
        assert held.const_value is not None
        tensor = from_torch(as_torch(held.const_value).clone(), name)
        value = ir.Value(name=name, type=held.type, shape=held.shape, const_value=tensor)
        value.metadata_props[FOLDED_FROM] = repr(sorted(origins))
        graph.register_initializer(value)
    return graph.initializers[name]


def _parameters_of(value: ir.Value, parameters: frozenset[str]) -> frozenset[str]:
    """Return the parameters that a value is computed from; none where an input of the graph is among them."""
    found: set[str] = set()
    met: set[ir.Value] = set()
    stack = [value]
    while stack:
        each = stack.pop()
        if each in met:
            continue
        met.add(each)
        producer = each.producer()
        if producer is not None:
            inner = (i for _, graph in subgraphs(producer) for n in all_nodes(graph) for i in n.inputs)
            stack += [i for i in itertools.chain(producer.inputs, inner) if i is not None]
        elif each.name in parameters:
            found.add(each.name)
        elif each.is_graph_input():
            return frozenset()
    return frozenset(found)


def _same_expression(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether two values are the same operations on the same parameters and constants."""
    if a is b or a is None or b is None:
        return a is b
    left, right = a.producer(), b.producer()
    if left is None or right is None or (left.domain, left.op_type) != (right.domain, right.op_type):
        return False
    if a.index() != b.index() or _attributes(left) != _attributes(right):
        return False
    if len(left.inputs) != len(right.inputs):
        return False
    return all(_same_expression(x, y) for x, y in zip(left.inputs, right.inputs, strict=True))


def _attributes(node: ir.Node) -> dict[str, Any]:
    """Return a node's attributes as plain values, tensors by their bytes."""
    return {
        name: attribute.value.tobytes() if attribute.type == ir.AttributeType.TENSOR else attribute.value
        for name, attribute in node.attributes.items()
    }
