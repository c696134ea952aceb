"""Where a base file holds the weights that an adapter file changes."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.adapter_file import AdapterFile
from lora_fx.passes.onnx_mapping import ParameterMap
from lora_fx.passes.onnx_match import map_by_fingerprint
from lora_fx.passes.onnx_metadata import read_map


def base_map(model: ir.Model, file: AdapterFile) -> ParameterMap:
    """Return the map that a base file carries; without one, what the fingerprints find."""
    found = read_map(model)
    if found is not None:
        return found
    return map_by_fingerprint(model, file.fingerprints)
