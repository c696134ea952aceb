"""Several parts of one adapter computed together: their A stacked, every B on its own rows.

``h = x [A_1; A_2; ...]^T`` is one product; part i has its columns of h and its span of y's rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_fx.kinds.base import LivePart, LiveParts, rows_index

_LARGE, _LARGE_THIN = 1 << 19, 1 << 14
"""From so many elements of g on, the orientation of a product outweighs a copy of its small result, and the
two operations that this takes: a thin one's (of a rank under 8) sooner."""


class Slot(NamedTuple):
    """One part's place: its columns of h and of y."""

    ranks: slice
    rows: slice


def stacked(lora: LiveParts, out: int) -> tuple[float, tuple[Slot, ...], Tensor, tuple[Tensor, ...]]:
    """Return scale, slots, the stacked A and every B of several parts."""
    scale = lora[0].scale if all(part.scale == lora[0].scale for part in lora) else 1.0
    slots: list[Slot] = []
    stack: list[Tensor] = []
    bs: list[Tensor] = []
    offset = 0
    for part in lora:
        placed, rows = _placed(part.b if scale == part.scale else part.b * part.scale, part, out)
        slots.append(Slot(slice(offset, offset + part.a.shape[0]), rows))
        stack.append(part.a)
        bs.append(placed)
        offset += part.a.shape[0]
    return scale, tuple(slots), stack[0] if len(stack) == 1 else torch.cat(stack), tuple(bs)


def _placed(b: Tensor, part: LivePart, out: int) -> tuple[Tensor, slice]:
    """Return B and its span of rows; rows in several pieces are spread over all of y's."""
    if part.rows is None:
        return b, slice(0, out)
    if len(part.rows) == 1:
        return b, slice(*part.rows[0])
    return b.new_zeros(out, b.shape[1]).index_copy(0, rows_index(part.rows, b.device), b), slice(0, out)


def add_parts(y: Tensor, h: Tensor, slots: tuple[Slot, ...], scale: float, bs: list[Tensor]) -> None:
    """Add every part to its rows of y, in place."""
    for slot, b in zip(slots, bs, strict=True):
        y[:, slot.rows].addmm_(h[:, slot.ranks], b.t(), alpha=scale)


def through_parts(g: Tensor, slots: tuple[Slot, ...], bs: list[Tensor]) -> Tensor:
    """Return ``g B`` of every part side by side: (N, R)."""
    return torch.cat([g[:, slot.rows] @ b for slot, b in zip(slots, bs, strict=True)], 1)


def part_gradients(
    g: Tensor, h: Tensor, slots: tuple[Slot, ...], scale: float, bs: list[Tensor], needs: list[bool]
) -> list[Tensor | None]:
    """Return the gradient of every B, or None where it is not needed."""
    return [
        outer(g[:, slot.rows], h[:, slot.ranks], scale, b) if need else None
        for slot, b, need in zip(slots, bs, needs, strict=True)
    ]


def outer(g: Tensor, h: Tensor, scale: float, b: Tensor) -> Tensor:
    """Return ``scale * g^T h``; where large, as the transpose of ``h^T g``, up to three times faster."""
    if g.numel() < (_LARGE if h.shape[1] >= 8 else _LARGE_THIN):
        return scaled(g.t(), h, scale, b)
    return (h.t() @ g if scale == 1.0 else scaled(h.t(), g, scale, b.t())).t()


def scaled(left: Tensor, right: Tensor, scale: float, like: Tensor) -> Tensor:
    """Return ``scale * left @ right`` in one product; ``like`` has the result's shape."""
    return left @ right if scale == 1.0 else torch.addmm(like, left, right, beta=0, alpha=scale)
