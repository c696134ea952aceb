"""The linear with its branch as one autograd operation: six thin products, and nothing else.

With ``s`` the scale, forward and backward of ``y = x W^T + b + s (x A^T) B^T``::

    h = x A^T           y = x W^T + b;  y += s h B^T
    g' = g B            dx = g W;       dx += s g' A        dA = s g'^T x      dB = s g^T h

Saved are x (unless it can be made again, see ``producers``), h: (N, r), and references to W, A and B.
Where there are many rows of x, merging is cheaper than adding, in either direction for itself: with
``W' = W + s B A``, which is not kept, ``y = x W'^T + b`` and ``dx = g W'``; h is then computed for dB alone.
An x that was made again and is nobody else's gives its memory to dx.
Where x is in half precision and A and B in float32, the thin products are in float32 (``wide``); under
autocast A and B are cast to its dtype. Dropout masks are drawn again in the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from lora_fx.kinds import costs, wide
from lora_fx.kinds.base import LiveParts, strided_as
from lora_fx.kinds.eager import autocast_dtype, plain_eager, widens
from lora_fx.kinds.expected import Expected, Work, added
from lora_fx.kinds.masks import Mask, draw
from lora_fx.kinds.producers import Remade, remade
from lora_fx.kinds.stacked import Slot, add_parts, outer, part_gradients, scaled, stacked, through_parts


class Call(NamedTuple):
    """What one call's forward and backward share besides tensors.

    ``slots`` is None for one part on all rows. ``source`` makes the input again, where it need not be
    saved. ``scale`` includes what a mask's survivors are scaled by. ``merged`` and ``merged_back`` say that
    W' is formed in the forward, and in the backward. ``wide`` says that thin products are in float32,
    ``columns`` that the weight is given as (in, out).
    """

    scale: float
    slots: tuple[Slot, ...] | None = None
    mask: Mask | None = None
    source: Remade | None = None
    merged: bool = False
    merged_back: bool = False
    wide: bool = False
    columns: bool = False


def fusable(x: Tensor, weight: Tensor, bias: Tensor | None, lora: LiveParts) -> bool:
    """Say whether the fused operation may stand for the composition here."""
    first = lora[0]
    if len(lora) == 1:
        plain = plain_eager(x, weight, bias, first.a, first.b)
    else:
        plain = plain_eager(x, weight, bias, *(t for p in lora for t in (p.a, p.b)))
    if not plain or x.is_meta:
        return False
    dropout = first.dropout
    if len(lora) > 1 and any(part.dropout != dropout for part in lora):
        return False
    # A generator of one's own cannot be captured in a graph, and dropout of everything has no scale.
    return not dropout or (dropout < 1 and not (x.is_cuda and torch.cuda.is_current_stream_capturing()))


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LiveParts, *, columns: bool = False
) -> Tensor:
    """Return ``x W^T + b + sum over parts of scale * (x A^T) B^T``.

    With ``columns`` the weight is W^T: (in, out), x has two dimensions, and there is a bias: an ``addmm``.
    """
    first = lora[0]
    slots: tuple[Slot, ...] | None = None
    bs: tuple[Tensor, ...] = (first.b,)
    scale, a = first.scale, first.a
    if len(lora) > 1 or first.rows is not None:
        scale, slots, a, bs = stacked(lora, weight.shape[1 if columns else 0])
    source = mask = None
    if first.dropout:
        mask = draw(first.dropout, first.stream)
        scale = scale * mask.factor
    graph = torch.is_grad_enabled() and (
        a.requires_grad
        or x.requires_grad
        or any(t is not None and t.requires_grad for t in (*bs, weight, bias))
    )
    if graph and (a.requires_grad or bs[0].requires_grad):
        source = remade(x)
    dtype = autocast_dtype(x)
    merged = merged_back = False
    if slots is None and mask is None and dtype is None:
        merged, merged_back = (False, False) if first.added else _merges(x, weight, a, columns=columns)
    call = Call(scale, slots, mask, source, merged, merged_back, widens(x, a), columns)
    if dtype is not None:
        # x is cast outside, where its cast is differentiable; A and B are cast inside.
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _run(x, weight, bias, call, a, bs, graph=graph)
    return _run(x, weight, bias, call, a, bs, graph=graph)


def merged_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora: LiveParts) -> Tensor | None:
    """Return ``x (W + scale B A)^T + b`` where that is the cheapest, else None.

    Where the products are so small that dispatching them is what costs, autograd's own three nodes beat
    one in Python, though the gradient goes through that of W.
    """
    part, *more = lora
    out, columns = weight.shape
    if more or not costs.keeps(x.numel() // max(columns, 1), out, columns):
        return None
    if part.rows is not None or part.dropout or part.added or weight.dtype is not part.a.dtype:
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    if not weight.is_contiguous():
        return F.linear(x, _merge(weight, part.a, part.b, part.scale), bias)
    return F.linear(x, torch.addmm(weight, part.b, part.a, alpha=part.scale), bias)


def _merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``W + scale B A`` with W's strides: a product with other ones has other bits."""
    if weight.is_contiguous():
        return torch.addmm(weight, b, a, alpha=scale)
    return strided_as(torch.addmm(weight.t(), a.t(), b.t(), alpha=scale).t(), weight)


def _merges(x: Tensor, weight: Tensor, a: Tensor, *, columns: bool) -> tuple[bool, bool]:
    """Say whether forming W' costs less than adding h B^T to y, and than adding g' A to dx.

    In half precision W' would round the adapter away.
    """
    if weight.element_size() < 4 or weight.dtype is not a.dtype:
        return False, False
    out, features = reversed(weight.shape) if columns else weight.shape
    return costs.merges(x.numel() // max(features, 1), out, features)


def expected_linear(rows: int, out: int, columns: int, work: Work, *, keeps: bool) -> Expected:
    """Say what ``merged_linear`` (where ``keeps``) and ``fused_linear`` will do with so many rows of x."""
    if len(work.ranks) > 1:
        width = sum(work.ranks)
        return Expected(
            "stacked", f"{work.products}: A of {len(work.ranks)} terms in one product, h of {width}"
        )
    if work.obstacle is not None:
        return added(work, work.obstacle)
    sizes = f"{rows:,} rows, {columns:,} in, {out:,} out, rank {sum(work.ranks)}"
    if keeps and costs.keeps(rows, out, columns):
        few = f"{rows * out * columns:,} multiplications and {out * columns:,} elements of W' are few"
        return Expected("kept", f"{sizes}: {few}, dispatch is what costs")
    merged, back = costs.merges(rows, out, columns)
    passes = (
        f"{costs.MANY} x {out * columns:,} elements of W' against {rows * out:,} of y "
        f"and, backward, {rows * columns:,} of dx"
    )
    how = {(True, True): "merged", (True, False): "merged forward", (False, True): "merged backward"}
    return Expected(how.get((merged, back), "added"), f"{sizes}: {passes}")


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: Call,
    a: Tensor,
    bs: tuple[Tensor, ...],
    *,
    graph: bool,
) -> Tensor:
    if not graph:
        return _forward(x, weight, bias, call, a, bs)[0]
    result: Tensor = _apply(x, weight, bias, call, a, *bs)
    return result


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, a: Tensor, bs: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor | None]:
    """Return y and h; ``a`` is (R, in), the stacked A of all parts, and each of ``bs`` (rows, r)."""
    if call.merged:
        weight = weight.t() if call.columns else weight
        return F.linear(x, _merge(weight, a, bs[0], call.scale), bias), None
    dtype, shape = x.dtype, x.shape
    flat = x if x.dim() == 2 else x.reshape(-1, shape[-1])
    if call.columns and bias is not None:
        y = torch.addmm(bias, flat, weight)
    else:
        # Three dimensions are flattened by F.linear itself; doing it here saves doing it twice.
        y = F.linear(flat if _flattened(x, bias) else x, weight, bias)
    y = y if y.is_contiguous() else y.contiguous()
    rows = y if y.dim() == 2 else y.view(-1, y.shape[-1])
    if call.mask is not None:
        flat = call.mask.ones((flat.shape[0], flat.shape[1]), flat).mul_(flat)
    if call.wide:
        h = wide.thin(flat, a)
        wide.add_parts(rows, h, call.slots, call.scale, bs)
        return _shaped(y, shape), h
    h = F.linear(flat, a if a.dtype is dtype else a.to(dtype))
    if call.slots is None:
        b = bs[0]
        rows.addmm_(h, (b if b.dtype is dtype else b.to(dtype)).t(), alpha=call.scale)
    else:
        add_parts(rows, h, call.slots, call.scale, [b.to(dtype) for b in bs])
    return _shaped(y, shape), h


def _shaped(y: Tensor, like: torch.Size) -> Tensor:
    """Give y the leading dimensions of x; not as a view, which autograd lets nobody write to in place."""
    return y if y.dim() == len(like) else torch.ops.aten._unsafe_view(y, (*like[:-1], y.shape[-1]))


def _flattened(x: Tensor, bias: Tensor | None) -> bool:
    """Say whether F.linear itself takes three dimensions for two; else it multiplies in batches: other bits.

    Without a bias it asks for strides that fold, which a dimension of one entry need not have.
    """
    if x.dim() != 3 or not x.is_contiguous():
        return False
    return bias is not None or x.stride(0) == x.stride(1) * x.shape[1]


class FusedLinear(Function):
    """``apply(x, weight, bias, call, a, *bs)``; see the module."""

    @staticmethod
    def forward(  # noqa: D102 - the module tells
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, a: Tensor, *bs: Tensor
    ) -> Tensor:
        y, h = _forward(x, weight, bias, call, a, bs)
        needs = ctx.needs_input_grad
        keep = call.source is None and (needs[1] or True in needs[4:])
        ctx.call, ctx.dtype = call, x.dtype
        ctx.save_for_backward(x if keep else None, h if True in needs[5:] else None, weight, a, *bs)
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        grad = grads[0]
        kind = grad.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return _backward(ctx, grad)
        return _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return all gradients, as differentiable functions of x, A and B where grad mode is on."""
    call, dtype = ctx.call, ctx.dtype
    x, h, weight, a, *bs = ctx.saved_tensors
    need_x, need_weight, need_bias, _, need_a, *need_bs = ctx.needs_input_grad
    g = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
    if not call.wide:
        a, bs = a.to(dtype), [b.to(dtype) for b in bs]
    thinned, spare = x, False
    scale, differentiable = call.scale, torch.is_grad_enabled()
    mask = None if call.mask is None else call.mask.ones((g.shape[0], a.shape[1]), g)
    if need_a or need_weight or True in need_bs:
        if call.source is not None:
            x, spare = call.source.get()
            x = x if x.dtype is dtype else x.to(dtype)
        x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        thinned = x if mask is None else x * mask
        if h is None or differentiable:
            h = wide.thin(thinned, a) if call.wide else F.linear(thinned, a)
    gb, dbs = _gradients_of_b(call, g, h, bs, need_bs)
    da = None
    if need_a:
        da = wide.outer(gb, thinned, scale, a) if call.wide else scaled(gb.t(), thinned, scale, a)
    weight = weight.t() if call.columns else weight
    dw = None
    if need_weight:
        dw = x.t() @ g if call.columns else g.t() @ x
    dx = None
    if need_x:
        merged = _merge(weight, a, bs[0], scale) if call.merged_back else weight
        # Nothing reads x any more: where it is nobody else's, dx takes its place.
        dx = torch.mm(g, merged, out=x) if spare and x.is_contiguous() else g @ merged
        if not call.merged_back:
            dx = _grad_of_input(dx, gb, a, call, mask, differentiable=differentiable)
        dx = dx if grad.dim() == 2 else dx.view(*grad.shape[:-1], dx.shape[-1])
    return (dx, dw, g.sum(0) if need_bias else None, None, da, *dbs)


def _gradients_of_b(
    call: Call, g: Tensor, h: Tensor | None, bs: list[Tensor], needs: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return ``g B`` of all parts side by side, and the gradient of every B that needs one."""
    if call.wide:
        return wide.through_parts(g, h, call.slots, call.scale, bs, needs)
    if call.slots is None:
        return g @ bs[0], [outer(g, h, call.scale, bs[0]) if needs[0] and h is not None else None]
    gb = through_parts(g, call.slots, bs)
    if h is None:
        return gb, [None for _ in bs]
    return gb, part_gradients(g, h, call.slots, call.scale, bs, needs)


def _grad_of_input(
    dx: Tensor, gb: Tensor, a: Tensor, call: Call, mask: Tensor | None, *, differentiable: bool
) -> Tensor:
    """Add ``scale * gb A``, through the mask, to the base's gradient: in place where none will look."""
    if call.wide:
        add = wide.added_thin if differentiable else wide.add_thin
        return add(dx, gb, a, call.scale, mask)
    if mask is not None:
        return torch.addcmul(dx, gb @ a, mask, value=call.scale)
    if differentiable:
        return torch.addmm(dx, gb, a, alpha=call.scale)
    return dx.addmm_(gb, a, alpha=call.scale)


_apply: Any = FusedLinear.apply
