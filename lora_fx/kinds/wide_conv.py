"""The convolution in half precision with a float32 adapter: thin convolutions in float32, rounded once.

With A as a kernel of the same geometry and B as one of 1x1, and h: (N, r, ...) kept in float32::

    h = conv(x, A)    y = half(conv(x, W) + s conv1x1(h, B))    g' = conv1x1(g, B^T)
    dB = s sum over places of g h^T    dA = s corr(x, g')       dx = half(conv^T(g, W) + s conv^T(g', A))

x is cast up anew in the backward, so that only its half-precision values are kept, as the frozen
convolution keeps them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lora_fx.kinds.base import LivePart, LiveParts
from lora_fx.kinds.eager import plain_eager, widens
from lora_fx.kinds.fused_conv import Geometry, convolve, gradients


class _Call(NamedTuple):
    how: Geometry
    scale: float


def wide(x: Tensor, weight: Tensor, bias: Tensor | None, lora: LiveParts, how: Geometry | None) -> bool:
    """Say whether this operation may and should stand for the branch."""
    part = lora[0]
    if how is None or how.groups > 1 or len(lora) > 1 or part.rows is not None or part.dropout:
        return False
    if not plain_eager(x, weight, bias, part.a, part.b) or x.dim() != weight.dim() or x.is_meta:
        return False
    return widens(x, part.a) and weight.dtype is x.dtype


def wide_conv(x: Tensor, weight: Tensor, bias: Tensor | None, part: LivePart, how: Geometry) -> Tensor:
    """Return ``conv(x, W) + scale conv1x1(conv(x, A), B) + bias``."""
    result: Tensor = _apply(x, weight, bias, _Call(how, part.scale), part.a, part.b)
    return result


class WideConv(Function):
    """``apply(x, weight, bias, call, a, b)``; see the module."""

    @staticmethod
    def forward(  # noqa: D102 - the module tells
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, a: Tensor, b: Tensor
    ) -> Tensor:
        ctx.call = call
        down, up, points = _kernels(weight, a, b, call.scale)
        hidden = convolve(x.float(), down, None, call.how)
        ctx.save_for_backward(x, weight, hidden, a, b)
        y = convolve(x, weight, bias, call.how)
        return y.copy_(convolve(hidden, up, None, points).add_(y))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        kind = grads[0].device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return _backward(ctx, grads[0])
        return _backward(ctx, grads[0])


_apply: Any = WideConv.apply


def _kernels(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor, Geometry]:
    """Return A and ``scale * B`` as kernels, and the geometry of B's."""
    b = b if scale == 1.0 else b * scale
    rank, ones = len(a), (1,) * (weight.dim() - 2)
    points = Geometry(ones, (0,) * len(ones), ones, 1)
    return a.view(rank, *weight.shape[1:]), b.reshape(len(b), rank, *ones), points


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    how, scale = ctx.call
    x, weight, hidden, a, b = ctx.saved_tensors
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    down, up, points = _kernels(weight, a, b, scale)
    wide_x = x.float()
    if torch.is_grad_enabled():
        hidden = convolve(wide_x, down, None, how)
    dx, dw = gradients(g, x, weight, how, (need_x, need_weight))
    back, db = gradients(g.float(), hidden, up, points, (True, True))
    update, da = gradients(back, wide_x, down, how, (need_x, True))
    if need_x:
        dx = update.add_(dx).to(x.dtype)
    dims = (0, *range(2, g.dim()))
    da, db = da.reshape(a.shape), db.reshape(b.shape)
    db = db if scale == 1.0 else db * scale
    dbias = g.sum(dims) if need_bias else None
    return (dx if need_x else None, dw if need_weight else None, dbias, None, da, db)
