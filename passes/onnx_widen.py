"""A float32 twin of a bfloat16 model, for checks on a provider that has no kernels for bfloat16."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.passes.onnx_canonical import all_initializers, all_nodes
from lora_fx.passes.onnx_tensors import as_torch, from_torch

_NARROW = ir.DataType.BFLOAT16
_WIDE = ir.DataType.FLOAT


def holds_bfloat16(model: ir.Model) -> bool:
    """Whether any input or initializer is bfloat16."""
    values = [*model.graph.inputs, *all_initializers(model.graph)]
    return any(value.dtype == _NARROW for value in values)


def widen(model: ir.Model) -> None:
    """Make every bfloat16 value, constant and cast of a model float32, in place; numbers stay the same."""
    for value in all_initializers(model.graph):
        tensor = value.const_value
        if tensor is not None and tensor.dtype == _NARROW:
            value.const_value = from_torch(as_torch(tensor).float(), value.name or "")
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        values = [*graph.inputs, *all_initializers(graph)]
        for node in all_nodes(graph):
            values += node.outputs
            _widen_attributes(node)
        for value in values:
            if value.dtype == _NARROW:
                value.dtype = _WIDE


def _widen_attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == _NARROW:
            node.attributes[name] = ir.AttrTensor(name, from_torch(as_torch(attribute.value).float(), ""))
        elif (
            attribute.type == ir.AttributeType.INT and name in ("to", "dtype") and attribute.value == _NARROW
        ):
            node.attributes[name] = ir.AttrInt64(name, int(_WIDE))
