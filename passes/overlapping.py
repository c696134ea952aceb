"""Parameters whose elements share memory (``expand``): one write is seen by several, and torch refuses it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lora_fx.errors import PlanError
from lora_fx.passes.aliases import geometry_of


def refuse_overlapping(parameters: Mapping[str, Tensor]) -> None:
    """Refuse to adapt or train a parameter in which several elements are one number in memory.

    Raises:
        PlanError: naming each of them.
    """
    found = {name: tensor for name, tensor in parameters.items() if _overlaps(tensor)}
    if found:
        name, tensor = next(iter(found.items()))
        more = f", and {len(found) - 1} more such parameters" if len(found) > 1 else ""
        raise PlanError(
            name,
            expected="a parameter whose every element has a place of its own in memory",
            got=f"one of the shape {tuple(tensor.shape)} and the strides {tensor.stride()}, as expand() "
            f"makes it{more}",
            advice="Replace it first, m.weight = nn.Parameter(m.weight.detach().clone()), or Skip it.",
        )


def _overlaps(tensor: Tensor) -> bool:
    geometry = geometry_of(tensor)
    if geometry is None:
        return False
    return any(size > 1 and step == 0 for size, step in zip(geometry.size, geometry.stride, strict=True))
