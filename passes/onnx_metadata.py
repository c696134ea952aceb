"""What lora_fx writes into an ONNX file's metadata, and reads back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from torch import Tensor

from lora_fx.passes.onnx_mapping import MAPPING_KEY, ParameterMap

PLAN_KEY = "lora_fx.plan"
CHANGES_KEY = "lora_fx.changes"
DIGEST_KEY = "lora_fx.base_digest"
DATA_KEY = "lora_fx.data"
BASE_DATA_KEY = "lora_fx.base_data"


@dataclass(frozen=True)
class Extent:
    """How much one weight was changed: ``|W0|``, ``|W - W0|``, and the share that its dtype kept."""

    weight: float
    delta: float
    retained: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor, stored: Tensor) -> Extent:
        """Measure a change and what storing it in another dtype leaves of it.

        ``retained`` is ``1 - |stored - cast(before) - delta| / |delta|``.
        """
        wide = after.double() - before.double()
        kept = stored.double() - before.to(stored.dtype).double()
        size = float(wide.norm())
        lost = float((kept - wide).norm()) / size if size else 0.0
        return cls(float(before.double().norm()), size, 1.0 - lost)


def write_base(model: ir.Model, mapping: ParameterMap) -> None:
    """Note in a base file how its initializers hold the parameters."""
    model.metadata_props[MAPPING_KEY] = mapping.to_json()


def read_map(model: ir.Model) -> ParameterMap | None:
    """Return the map that a base file carries, or None."""
    text = model.metadata_props.get(MAPPING_KEY)
    return None if text is None else ParameterMap.from_json(text)


def write_folded(model: ir.Model, *, plan: str | None, extents: Mapping[str, Extent], digest: str) -> None:
    """Note in a folded file what was changed, by how much, and the structure of its base."""
    model.metadata_props.pop(MAPPING_KEY, None)
    model.metadata_props.pop(DATA_KEY, None)
    if plan is not None:
        model.metadata_props[PLAN_KEY] = plan
    model.metadata_props[CHANGES_KEY] = json.dumps({name: vars(extent) for name, extent in extents.items()})
    model.metadata_props[DIGEST_KEY] = digest


def read_changes(metadata: Mapping[str, str]) -> dict[str, Extent] | None:
    """Return how much each weight was changed, by qualified name, or None in a file without adapters."""
    text = metadata.get(CHANGES_KEY)
    if text is None:
        return None
    data: dict[str, Any] = json.loads(text)
    return {name: Extent(**extent) for name, extent in data.items()}
