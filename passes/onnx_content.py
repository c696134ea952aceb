"""What a part of an ONNX graph says, as text without the names that an exporter made up.

Two graphs are the same structure when their parts say the same and are wired the same. Names of
nodes and inner values, documentation and metadata do not count; names of the graph's own inputs and
outputs do. Float initializers count by dtype and shape alone, since their values are what folding
changes; every other initializer, and every attribute, counts by value.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_FLOATS = frozenset({ir.AttributeType.FLOAT, ir.AttributeType.FLOATS})
_GRAPHS = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})
_TENSORS = frozenset({ir.AttributeType.TENSOR, ir.AttributeType.TENSORS})


class Dims:
    """Names symbolic dimensions by the order in which they are met: ``s77*2`` and ``s12*2`` agree."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def __call__(self, shape: ir.Shape | None) -> str:
        """Return the shape as text, with symbols numbered."""
        if shape is None:
            return "?"
        return "[" + ",".join(self._dim(dim) for dim in shape) + "]"

    def _dim(self, dim: Any) -> str:
        if isinstance(dim, int):
            return str(dim)
        text = dim.value
        if text is None:
            return "?"
        return _IDENTIFIER.sub(
            lambda found: self._names.setdefault(found.group(), f"d{len(self._names)}"), str(text)
        )


def tensor_hash(tensor: ir.TensorProtocol) -> str:
    """Return a hash of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape.numpy())}".encode())
    if tensor.dtype == ir.DataType.STRING:
        for item in np.asarray(tensor.numpy()).flatten():
            digest.update(str(item).encode() + b"\0")
    else:
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def is_float(dtype: ir.DataType | None) -> bool:
    """Whether an initializer of this dtype counts by shape alone."""
    return dtype is not None and (dtype.is_floating_point() or dtype.name.startswith("COMPLEX"))


def value_text(value: ir.Value, dims: Dims) -> str:
    """Return the type of a value: dtype and shape."""
    return f"{value.type if value.type is not None else '?'}{dims(value.shape)}"


def initializer_text(value: ir.Value) -> str:
    """Return an initializer's dtype and shape, and a hash of its value where it is not float."""
    tensor = value.const_value
    if tensor is None:
        return "initializer without value"
    text = f"{tensor.dtype}{list(tensor.shape.numpy())}"
    if is_float(tensor.dtype) or (isinstance(tensor, ir.ExternalTensor) and _is_gone(tensor)):
        return text
    return f"{text}={tensor_hash(tensor)[:32]}"


def _is_gone(tensor: ir.ExternalTensor) -> bool:
    """Whether a tensor's file is not kept, as of the graphs that the runtime writes."""
    return not Path(tensor.path).is_file()


def attribute_text(attribute: ir.Attr) -> str:
    """Return an attribute's value; of a subgraph only that it is there (it is walked apart)."""
    if attribute.is_ref():
        return f"ref:{attribute.ref_attr_name}:{attribute.type}"
    value = attribute.value
    if attribute.type in _FLOATS:
        floats: Iterable[float] = [value] if attribute.type == ir.AttributeType.FLOAT else value
        # By bits, so that nan equals itself and -0.0 does not equal 0.0.
        shown = " ".join(f"{number:g}/{struct.pack('<f', number).hex()}" for number in floats)
    elif attribute.type in _TENSORS:
        tensors = [value] if attribute.type == ir.AttributeType.TENSOR else value
        shown = " ".join(_constant_text(tensor) for tensor in tensors)
    elif attribute.type in _GRAPHS:
        graphs = [value] if attribute.type == ir.AttributeType.GRAPH else value
        shown = " ".join(f"graph/{len(graph.inputs)}/{len(graph.outputs)}" for graph in graphs)
    else:
        shown = repr(value)
    return f"{attribute.type}:{shown}"


def _constant_text(tensor: ir.TensorProtocol) -> str:
    text = f"{tensor.dtype}{list(tensor.shape.numpy())}"
    if tensor.size <= 8 and tensor.dtype != ir.DataType.STRING:
        text += f"({' '.join(str(item) for item in tensor.numpy().flatten())})"
    return f"{text}={tensor_hash(tensor)[:32]}"


def node_parts(node: ir.Node, dims: Dims) -> dict[str, str]:
    """Return what a node says, part by part: operator, attributes, arity, the types of its outputs."""
    parts = {"operator": "::".join(filter(None, (node.domain, node.op_type, node.overload)))}
    for name in sorted(node.attributes):
        parts[f"attribute {name}"] = attribute_text(node.attributes[name])
    parts["inputs"] = " ".join("." if value is None else "x" for value in node.inputs)
    for position, output in enumerate(node.outputs):
        parts[f"output {position}"] = value_text(output, dims)
    return parts


def subgraphs(node: ir.Node) -> list[tuple[str, ir.Graph]]:
    """Return a node's subgraphs with the attribute that holds each, in a fixed order."""
    found: list[tuple[str, ir.Graph]] = []
    for name in sorted(node.attributes):
        attribute = node.attributes[name]
        if attribute.is_ref() or attribute.type not in _GRAPHS:
            continue
        value: Any = attribute.value
        graphs = [value] if attribute.type == ir.AttributeType.GRAPH else list(value)
        found += [(f"{name}[{i}]" if len(graphs) > 1 else name, graph) for i, graph in enumerate(graphs)]
    return found


def opsets_text(opsets: Mapping[str, int]) -> str:
    """Return the opset of each domain, sorted."""
    return " ".join(f"{domain or 'ai.onnx'}:{version}" for domain, version in sorted(opsets.items()))


def node_label(node: ir.Node) -> str:
    """Return how a message calls a node: its name, or its first output's, and its operator."""
    name = node.name or next((output.name for output in node.outputs if output.name), "?")
    return f"node {name!r} ({node.op_type})"
