"""A float32 adapter on half-precision activations: thin products in float32, rounded once.

peft casts x up to the adapter's float32 and keeps the copy for the backward; casting A and B down
instead rounds h, g' and both gradients to half precision. Here what is cast up is a block of rows at a
time, used at once and dropped, so that nothing of it is saved::

    h = x A^T     g' = g B     dB = s g^T h     dA = s g'^T x     in float32
    y <- half(float32(y) + s h B^T)             dx <- half(float32(dx) + s g' A)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from lora_fx.kinds.eager import plain_eager, widens
from lora_fx.kinds.stacked import Slot, scaled

_BLOCK = 1 << 19
"""The elements that are cast up at a time: 2 MB of float32, which stay in a core's cache."""


def _blocks(columns: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors of equally many rows into blocks of rows of about ``_BLOCK / columns``."""
    rows = max(1, _BLOCK // max(columns, 1))
    if len(tensors[0]) <= rows:
        return [tensors]
    return list(zip(*(torch.split(t, rows) for t in tensors), strict=True))


def _at_once(x: Tensor) -> bool:
    """Say whether x is cast up whole: it is small, or what is done with it must be differentiable."""
    return x.numel() <= _BLOCK or torch.is_grad_enabled()


def thin(x: Tensor, a: Tensor) -> Tensor:
    """Return ``x A^T`` in float32: (N, in) by (r, in)."""
    if _at_once(x):
        return F.linear(x.float(), a)
    h = a.new_empty(len(x), len(a))
    for rows, out in _blocks(x.shape[1], x, h):
        torch.mm(rows.float(), a.t(), out=out)
    return h


def through_parts(
    g: Tensor,
    h: Tensor | None,
    slots: tuple[Slot, ...] | None,
    scale: float,
    bs: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return ``g B`` of every part side by side, and ``scale * g^T h`` of those that need it."""
    if slots is None:
        gb, db = _through(g, h if needs[0] else None, bs[0], scale)
        return gb, [db]
    found = [
        _through(g[:, slot.rows], None if h is None or not need else h[:, slot.ranks], b, scale)
        for slot, b, need in zip(slots, bs, needs, strict=True)
    ]
    return torch.cat([gb for gb, _ in found], 1), [db for _, db in found]


def _through(g: Tensor, h: Tensor | None, b: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Both products of one reading of g: (N, out)."""
    if _at_once(g):
        wide = g.float()
        return wide @ b, None if h is None else scaled(h.t(), wide, scale, b.t()).t()
    gb, db = b.new_empty(len(g), b.shape[1]), None if h is None else b.new_zeros(b.shape[1], b.shape[0])
    for rows, out, *hidden in _blocks(g.shape[1], g, gb, *(() if h is None else (h,))):
        wide = rows.float()
        torch.mm(wide, b, out=out)
        if db is not None:
            db.addmm_(hidden[0].t(), wide, alpha=scale)
    return gb, None if db is None else db.t()


def outer(gb: Tensor, x: Tensor, scale: float, a: Tensor) -> Tensor:
    """Return ``scale * gb^T x`` in float32: (N, r) by (N, in); ``a`` has the result's shape."""
    if _at_once(x):
        return scaled(gb.t(), x.float(), scale, a)
    da = torch.zeros_like(a)
    for rows, hidden in _blocks(x.shape[1], x, gb):
        da.addmm_(hidden.t(), rows.float(), alpha=scale)
    return da


def add_parts(
    y: Tensor, h: Tensor, slots: tuple[Slot, ...] | None, scale: float, bs: tuple[Tensor, ...]
) -> None:
    """Add every part to its rows of y, in place."""
    if slots is None:
        add_thin(y, h, bs[0].t(), scale)
    else:
        for slot, b in zip(slots, bs, strict=True):
            add_thin(y[:, slot.rows], h[:, slot.ranks], b.t(), scale)


def add_thin(y: Tensor, h: Tensor, b: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Add ``scale * h b`` to y, in place and with one rounding; ``b`` is (r, columns).

    What is added is multiplied by ``mask``, which has y's shape.
    """
    for rows, hidden, *kept in _blocks(y.shape[1], y, h, *(() if mask is None else (mask,))):
        wide = rows.float()
        if kept:
            wide.addcmul_(hidden @ b, kept[0].float(), value=scale)
        else:
            wide.addmm_(hidden, b, alpha=scale)
        rows.copy_(wide)
    return y


def added_thin(y: Tensor, h: Tensor, b: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Return what ``add_thin`` makes, differentiably and out of place."""
    update = h @ b if mask is None else (h @ b) * mask.float()
    return torch.add(y.float(), update, alpha=scale).to(y.dtype)


Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def cast_up(product: Product, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ``product(x, A, B)``: in float32 where that is due, and then without a copy of x in float32.

    ``product`` casts A and B to the dtype of what it is given.
    """
    if not widens(x, a):
        return product(x, a, b)
    if not plain_eager(x, a, b):
        return product(x.float(), a, b)
    result: Tensor = _cast_up(product, x, a, b)
    return result


class CastUp(Function):
    """``apply(product, x, a, b)``; what the product keeps for its gradients is made again in the backward."""

    @staticmethod
    def forward(ctx: Any, product: Product, x: Tensor, a: Tensor, b: Tensor) -> Tensor:  # noqa: D102
        ctx.product = product
        ctx.save_for_backward(x, a, b)
        return product(x.float(), a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        again, needs = torch.is_grad_enabled(), ctx.needs_input_grad[1:]
        leaves = [t if again else t.detach() for t in ctx.saved_tensors]
        with torch.enable_grad():
            inputs = [t if again else t.requires_grad_(need) for t, need in zip(leaves, needs, strict=True)]
            y = ctx.product(inputs[0].float(), *inputs[1:])
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grads[0], create_graph=again))
        return (None, *(next(found) if need else None for need in needs))


_cast_up: Any = CastUp.apply
