"""An adapter file as the ONNX passes see it: which weights it changes, and where a base holds them."""

from __future__ import annotations

import onnx_ir as ir

from lora_fx.adapter_file import AdapterFile
from lora_fx.passes.onnx_mapping import ParameterMap
from lora_fx.passes.onnx_match import map_by_fingerprint
from lora_fx.passes.onnx_metadata import read_map
from lora_fx.passes.onnx_subject import Weights


def adapter_weights(file: AdapterFile) -> Weights:
    """Return which weights an adapter file changes, and its rule for each."""
    names = [decision.name for decision in (*file.plan.adapted, *file.plan.trained)]
    names += [*(extra.name for extra in file.plan.extras), *file.plan.buffers]
    return Weights(tuple(names), file.effective, file.plan.to_json(), file.effective_band)


def base_map(model: ir.Model, file: AdapterFile) -> ParameterMap:
    """Return the map that a base file carries; without one, what the fingerprints find."""
    found = read_map(model)
    if found is not None:
        return found
    return map_by_fingerprint(model, file.fingerprints)
