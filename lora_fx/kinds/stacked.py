"""Several parts of one adapter computed together: their A stacked, every B on its own rows.

``h = x [A_1; A_2; ...]^T`` is one product; part i has its columns of h and its span of y's rows. A frozen
start is a part that is taken off, in such a way that at the start exactly nothing is left.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_fx.kinds.base import LivePart, LiveParts, rows_index

_LARGE, _LARGE_THIN = 1 << 22, 1 << 16
"""From so many elements of g on, the orientation of a product outweighs a copy of its small result: a
thin one's (of a rank under 8) sooner."""


class Slot(NamedTuple):
    """One part's place: its columns of h and of y; ``start`` is where its frozen start is in h."""

    ranks: slice
    rows: slice
    start: slice | None = None


def stacked(lora: LiveParts, out: int) -> tuple[float, tuple[Slot, ...], Tensor, tuple[Tensor, ...]]:
    """Return scale, slots, the stacked A and every B of several parts; a frozen start follows its part."""
    scale = lora[0].scale if all(part.scale == lora[0].scale for part in lora) else 1.0
    slots: list[Slot] = []
    stack: list[Tensor] = []
    bs: list[Tensor] = []
    offset = 0
    for part in lora:
        spans: list[slice] = []
        rows = slice(0, out)
        for a, b in ((part.a, part.b), *(() if part.start is None else (part.start,))):
            placed, rows = _placed(b if scale == part.scale else b * part.scale, part, out)
            spans.append(slice(offset, offset + a.shape[0]))
            stack.append(a)
            bs.append(placed)
            offset += a.shape[0]
        slots.append(Slot(spans[0], rows, *spans[1:]))
    return scale, tuple(slots), stack[0] if len(stack) == 1 else torch.cat(stack), tuple(bs)


def _placed(b: Tensor, part: LivePart, out: int) -> tuple[Tensor, slice]:
    """Return B and its span of rows; rows in several pieces are spread over all of y's."""
    if part.rows is None:
        return b, slice(0, out)
    if len(part.rows) == 1:
        return b, slice(*part.rows[0])
    return b.new_zeros(out, b.shape[1]).index_copy(0, rows_index(part.rows, b.device), b), slice(0, out)


def add_parts(y: Tensor, h: Tensor, slots: tuple[Slot, ...], scale: float, bs: list[Tensor]) -> None:
    """Add every part to its rows of y, in place; a part at its start adds exactly nothing."""
    left = iter(bs)
    for slot in slots:
        rows, b = y[:, slot.rows], next(left)
        if slot.start is None:
            rows.addmm_(h[:, slot.ranks], b.t(), alpha=scale)
        else:
            rows.add_((h[:, slot.ranks] @ b.t()).sub_(h[:, slot.start] @ next(left).t()), alpha=scale)


def through_parts(g: Tensor, slots: tuple[Slot, ...], bs: list[Tensor]) -> Tensor:
    """Return ``g B`` of every part side by side, starts with the opposite sign: (N, R)."""
    left = iter(bs)
    back: list[Tensor] = []
    for slot in slots:
        back.append(g[:, slot.rows] @ next(left))
        if slot.start is not None:
            back.append(-(g[:, slot.rows] @ next(left)))
    return torch.cat(back, 1)


def part_gradients(
    g: Tensor, h: Tensor, slots: tuple[Slot, ...], scale: float, bs: list[Tensor], needs: list[bool]
) -> list[Tensor | None]:
    """Return the gradient of every B; of starts, which are frozen, None."""
    left = iter(zip(bs, needs, strict=True))
    found: list[Tensor | None] = []
    for slot in slots:
        b, need = next(left)
        found.append(outer(g[:, slot.rows], h[:, slot.ranks], scale, b) if need else None)
        if slot.start is not None:
            next(left)
            found.append(None)
    return found


def outer(g: Tensor, h: Tensor, scale: float, b: Tensor) -> Tensor:
    """Return ``scale * g^T h``; where large, as the transpose of ``h^T g``, up to three times faster."""
    if g.numel() < (_LARGE if h.shape[1] >= 8 else _LARGE_THIN):
        return scaled(g.t(), h, scale, b)
    return scaled(h.t(), g, scale, b.t()).t()


def scaled(left: Tensor, right: Tensor, scale: float, like: Tensor) -> Tensor:
    """Return ``scale * left @ right`` in one product; ``like`` has the result's shape."""
    return left @ right if scale == 1.0 else torch.addmm(like, left, right, beta=0, alpha=scale)
