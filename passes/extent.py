"""How much an adapter changes each weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fx.passes.changes import changes
from lora_fx.passes.sharded import whole


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
        before, after = before.to(stored.device), after.to(stored.device)
        delta = after.to(torch.float32) - before.to(torch.float32)
        size = _norm(delta)
        lost = 0.0
        if size and stored.dtype != after.dtype:
            kept = stored.to(torch.float32) - before.to(stored.dtype).to(torch.float32)
            lost = _norm(kept - delta) / size
        return cls(_norm(before), size, 1.0 - lost)

    @classmethod
    def joined(cls, parts: Sequence[Extent]) -> Extent:
        """Return the extent of a weight that was changed part by part."""
        size = math.hypot(*(part.delta for part in parts))
        lost = math.hypot(*((1.0 - part.retained) * part.delta for part in parts))
        return cls(math.hypot(*(part.weight for part in parts)), size, 1.0 - (lost / size if size else 0.0))


def _norm(tensor: Tensor) -> float:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor.to(wide)))


def deltas(model: nn.Module, adapter: str | None = None) -> dict[str, float]:
    """Return ``|W - W0| / |W0|`` (Frobenius norms) of every weight that an adapter changes."""
    found: dict[str, float] = {}
    for change in changes(model, adapter).values():
        before, after = whole(change.before).double(), whole(change.after).double()
        size, moved = float(before.norm()), float((after - before).norm())
        found.update(dict.fromkeys(change.names, moved / size if size else moved))
    return found
