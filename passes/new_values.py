"""What an adapter makes of one stored weight: anew, or where it lies, some entries of axis 0 at a time.

The adapter's own rule adds in float32 or wider; the cast to the weight's dtype is here, once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_fx.passes.extent import Extent
from lora_fx.passes.weights import Weights

BAND = 4 << 20
"""Weights of more elements than this are changed in parts, in place."""
PART = 1 << 20
"""About how many elements a part has; there are some ten tensors of this size at a time."""

Observe = Callable[[str, Extent], None]
"""Told how much a weight was changed, by its name, when its new value is computed."""


def new_value(weights: Weights, name: str, before: Tensor, observe: Observe | None = None) -> Tensor:
    """Return ``W`` of a weight, in the dtype of ``W0``."""
    wide = _wide(before)
    after = weights.effective(name, wide)
    stored = after.to(before.dtype)
    if observe is not None:
        observe(name, Extent.of(wide, after, stored))
    return stored


def changed_in_bands(weights: Weights, name: str, weight: Tensor, observe: Observe | None = None) -> bool:
    """Change a large weight where it lies; False, and nothing done: it is small, or must be seen whole."""
    band = weights.band
    if band is None or weight.numel() <= BAND:
        return False
    count = max(1, min(BAND, PART) // max(1, weight[0].numel()))
    extents: list[Extent] = []
    for start in range(0, len(weight), count):
        part = weight[start : start + count]
        wide = _wide(part).contiguous()
        after = band(name, wide, start)
        if after is None:
            return False
        stored = after.to(part.dtype)
        if observe is not None:
            extents.append(Extent.of(wide, after, stored))
        part.copy_(stored)
    if observe is not None:
        observe(name, Extent.joined(extents))
    return True


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
