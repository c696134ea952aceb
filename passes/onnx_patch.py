"""Patch: put an adapter's effective weights into a base graph, where it is known how they lie there."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.passes.certify_values import expect
from lora_fx.passes.onnx_mapping import ParameterMap
from lora_fx.passes.onnx_subject import Weights
from lora_fx.passes.onnx_tensors import from_torch


def patch(model: ir.Model, mapping: ParameterMap, weights: Weights) -> tuple[str, ...]:
    """Replace the changed initializers, in place; return their names."""
    expected = expect(model, mapping, weights)
    for name, value in expected.values.items():
        model.graph.initializers[name].const_value = from_torch(value, name)
    return tuple(expected.values)
