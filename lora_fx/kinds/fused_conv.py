"""The convolution with its adapter merged in, and only thin products for the gradients of A and B.

With ``W' = W + s B A`` in matrix form, formed in the forward and again in the backward (it is small
beside the activations, so it is not kept)::

    y = conv(x, W')     dx = conv^T(g, W')

Where the rank is small, neither direction sees the gradient of the whole of W'::

    h = conv(x, A)    g' = conv1x1(g, B^T)    dB = s sum over places of g h^T    dA = s corr(x, g')

else ``dW' = corr(x, g)``, ``dA = s B^T dW'``, ``dB = s dW' A^T``. The merged weight would round an adapter
away in half precision, so that this is for float32 and wider.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lora_fx.kinds import costs
from lora_fx.kinds.base import LivePart, LiveParts, strided_as
from lora_fx.kinds.eager import plain_eager
from lora_fx.kinds.expected import Expected, Work, added


class Geometry(NamedTuple):
    """A convolution's settings, one number per dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Call(NamedTuple):
    """What forward and backward share; ``thin`` chooses the gradients by thin products."""

    how: Geometry
    scale: float
    thin: bool


def geometry(dims: int, stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry | None:
    """Return the settings with one number per dimension, or None for a padding given by name."""
    if isinstance(padding, str):
        return None
    return Geometry(_each(stride, dims), _each(padding, dims), _each(dilation, dims), groups)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def fusable(x: Tensor, weight: Tensor, bias: Tensor | None, lora: LiveParts, how: Geometry | None) -> bool:
    """Say whether the merged convolution may and should stand for the branch."""
    part = lora[0]
    if how is None or len(lora) > 1 or part.rows is not None or part.dropout or part.added:
        return False
    if not plain_eager(x, weight, bias, part.a, part.b) or x.dim() != weight.dim() or x.is_meta:
        return False
    if not weight.dtype == x.dtype == part.a.dtype == part.b.dtype or weight.element_size() < 4:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    rows, columns = weight.shape[0], part.a.shape[1]
    return costs.conv_merges(_places(x.shape, weight.shape, how), rows, columns, how.groups)


def expected_conv(x: tuple[int, ...], weight: tuple[int, ...], how: Geometry | None, work: Work) -> Expected:
    """Say whether ``fused_conv`` will stand for the branch on an input of this shape, and why."""
    if how is None:
        return added(work, "a padding given by name")
    if len(x) != len(weight):
        return added(work, "an input without a batch")
    if work.obstacle is not None:
        return added(work, work.obstacle)
    (rank,), out, columns = work.ranks, weight[0], math.prod(weight[1:])
    places = _places(x, weight, how)
    sizes = f"{places:,} places, {columns:,} in, {out:,} out, rank {rank}"
    cost = f"{rank * places * (out + columns):,} multiplications of thin products"
    cost += f" against 2 x {rank * out * columns:,} of forming W'"
    if not costs.conv_merges(places, out, columns, how.groups):
        return Expected("added", f"{sizes}: {cost}")
    cost = f"{how.groups} groups, and thin products have an A for each" if how.groups > 1 else cost
    thin = costs.conv_thin(rank, out, columns, how.groups)
    return Expected("merged", f"{sizes}: {cost}; dA and dB by {'thin products' if thin else 'all of dW'}")


def _places(x: tuple[int, ...], weight: tuple[int, ...], how: Geometry) -> int:
    """The number of output places, up to what the kernel's reach takes from the borders."""
    places = x[0]
    for size, stride, kernel, padding in zip(x[2:], how.stride, weight[2:], how.padding, strict=True):
        places *= max(1, (size + 2 * padding - kernel) // stride + 1)
    return places


def fused_conv(x: Tensor, weight: Tensor, bias: Tensor | None, part: LivePart, how: Geometry) -> Tensor:
    """Return ``conv(x, W + scale B A) + bias``."""
    rank, rows, columns = part.a.shape[0], part.b.shape[0], part.a.shape[1]
    thin = costs.conv_thin(rank, rows, columns, how.groups)
    result: Tensor = _apply(x, weight, bias, Call(how, part.scale, thin), part.a, part.b)
    return result


class FusedConv(Function):
    """``apply(x, weight, bias, call, a, b)``; see the module."""

    @staticmethod
    def forward(  # noqa: D102 - the module tells
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, a: Tensor, b: Tensor
    ) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weight, a, b)
        return convolve(x, merge(weight, a, b, call.scale), bias, call.how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        grad = grads[0]
        kind = grad.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return _backward(ctx, grad)
        return _backward(ctx, grad)


_apply: Any = FusedConv.apply


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    call: Call = ctx.call
    how = call.how
    x, weight, a, b = ctx.saved_tensors
    need_x, need_weight, need_bias, _, need_a, need_b = ctx.needs_input_grad
    dx = dw = da = db = None
    thin = call.thin and not need_weight and not torch.is_grad_enabled()
    if need_x:
        dx = gradients(g, x, merge(weight, a, b, call.scale), how, (True, False))[0]
    if thin:
        da, db = _thin_gradients(g, x, weight, a, b, call)
    elif need_a or need_b or need_weight:
        dw = gradients(g, x, weight, how, (False, True))[1]
        matrix = dw.reshape(dw.shape[0], -1)
        da = call.scale * (b.t() @ matrix) if need_a else None
        db = call.scale * (matrix @ a.t()) if need_b else None
    dims = (0, *range(2, g.dim()))
    return (dx, dw if need_weight else None, g.sum(dims) if need_bias else None, None, da, db)


def _thin_gradients(
    g: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """Return dA and dB; g' and dB come out of one call."""
    dims, rank = g.dim() - 2, a.shape[0]
    points = Geometry((1,) * dims, (0,) * dims, (1,) * dims, 1)
    kernel = a.view(rank, *weight.shape[1:])
    hidden = convolve(x, kernel, None, call.how)
    back, db = gradients(g, hidden, b.view(-1, rank, *(1,) * dims), points, (True, True))
    da = gradients(back, x, kernel, call.how, (False, True))[1].reshape(a.shape)
    db = db.reshape(b.shape)
    return _scaled(da, call.scale), _scaled(db, call.scale)


def _scaled(small: Tensor, scale: float) -> Tensor:
    return small if scale == 1.0 else small.mul_(scale)


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``W + scale B A`` in W's own shape and memory format."""
    if weight.is_contiguous():
        flat = torch.addmm(weight.view(weight.shape[0], -1), b, a, alpha=scale)
        return strided_as(flat.view(weight.shape), weight)
    return torch.add(weight, (b @ a).view(weight.shape), alpha=scale)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, how: Geometry) -> Tensor:
    """Return ``conv(x, weight) + bias`` of the geometry."""
    none = [0] * len(how.stride)
    return torch.convolution(x, weight, bias, how.stride, how.padding, how.dilation, False, none, how.groups)


def gradients(
    g: Tensor, x: Tensor, weight: Tensor, how: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input and of the weight, of which only those wanted are tensors."""
    none = [0] * len(how.stride)
    found = _convolution_backward(
        g,
        x,
        weight,
        None,
        how.stride,
        how.padding,
        how.dilation,
        False,
        none,
        how.groups,
        [*wanted, False],
    )
    return found[0], found[1]


_convolution_backward: Any = torch.ops.aten.convolution_backward.default
