"""Convolution in 1, 2 and 3 dimensions, any groups, stride, dilation and padding.

``W: (out, in / groups, *kernel)`` is the matrix ``(out, in / groups x kernel)``. The branch is a
convolution with ``A`` as its kernel (the same stride, padding, dilation) and a 1x1 convolution with
``B``; with groups, every group of inputs meets the same ``A`` and its own rows of ``B``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lora_fx.kinds.base import (
    Branch,
    Call,
    Kind,
    LivePart,
    LiveParts,
    Operand,
    add_rows,
    has_weight,
    rows_index,
    shape_of,
)
from lora_fx.kinds.eager import plain_eager
from lora_fx.kinds.expected import Expected, Work
from lora_fx.kinds.fused_conv import expected_conv, fusable, fused_conv, geometry
from lora_fx.kinds.wide import cast_up
from lora_fx.kinds.wide_conv import wide, wide_conv
from lora_fx.matrix import MatrixForm, Rows, rows_form

_CONVS: Mapping[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class _Geometry:
    stride: Any
    padding: Any
    dilation: Any
    groups: int


def _product(
    x: Tensor, a: Tensor, b: Tensor, shape: tuple[int, ...], rows: Rows | None, how: _Geometry
) -> Tensor:
    """Return ``conv1x1(conv(x, A), B)``, on the named output channels alone."""
    dims, rank, groups = len(shape) - 2, a.shape[0], how.groups
    conv = _CONVS[dims]
    kernel = a.to(x.dtype).reshape(rank, *shape[1:])
    kernel = kernel.repeat(groups, *[1] * (dims + 1)) if groups > 1 else kernel
    hidden = conv(x, kernel, None, how.stride, how.padding, how.dilation, groups)
    index = None if groups == 1 or rows is None else rows_index(rows, b.device)
    if index is not None:
        # A 1x1 grouped convolution needs every group's rows: put B's rows in their places.
        b = b.new_zeros(shape[0], rank).index_add(0, index, b)
    update: Tensor = conv(hidden, b.to(x.dtype).reshape(*b.shape, *[1] * dims), None, 1, 0, 1, groups)
    return update if index is None else update.index_select(update.dim() - dims - 1, index)


def _low_rank_conv(x: Tensor, weight: Tensor, part: LivePart, how: _Geometry) -> Tensor:
    x = F.dropout(x, part.dropout) if part.dropout else x
    product = partial(_product, shape=tuple(weight.shape), rows=part.rows, how=how)
    return cast_up(product, x, part.a, part.b)


def _adapted(dims: int) -> Branch:
    conv = _CONVS[dims]

    def adapted_conv(
        input: Tensor,  # noqa: A002
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        *,
        lora: LiveParts,
    ) -> Tensor:
        """Return the convolution plus its low-rank branches."""
        if lora:
            how = geometry(dims, stride, padding, dilation, groups)
            if how is not None and fusable(input, weight, bias, lora, how):
                return fused_conv(input, weight, bias, lora[0], how)
            if how is not None and wide(input, weight, bias, lora, how):
                return wide_conv(input, weight, bias, lora[0], how)
        result: Tensor = conv(input, weight, bias, stride, padding, dilation, groups)
        for part in lora:
            update = _low_rank_conv(input, weight, part, _Geometry(stride, padding, dilation, groups))
            if part.rows is None and plain_eager(input, weight, bias, part.a, part.b):
                # In place, so that the memory format stays, by which the next convolution picks its kernel.
                result = result.add_(update, alpha=part.scale)
            else:
                result = add_rows(result, update, part.rows, result.dim() - dims - 1, part.scale)
        return result

    adapted_conv.__name__ = adapted_conv.__qualname__ = f"adapted_conv{dims}d"
    return adapted_conv


adapted_conv1d = _adapted(1)
adapted_conv2d = _adapted(2)
adapted_conv3d = _adapted(3)


class ConvKind(Kind):
    """``F.conv1d/2d/3d`` and their modules."""

    name = "conv"
    ops = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})

    @property
    def branches(self) -> Mapping[str, Branch]:
        """The low-rank branches by dimension."""
        return {"conv1d": adapted_conv1d, "conv2d": adapted_conv2d, "conv3d": adapted_conv3d}

    def expected(self, call: Call, weight: tuple[int, ...], work: Work) -> Expected:
        """Merged where there are many places, or groups."""
        defaults = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
        settings = [call.arg(3 + i, name, default) for i, (name, default) in enumerate(defaults)]
        how = geometry(len(weight) - 2, *settings)
        return expected_conv(shape_of(call.arg(0, "input")), weight, how, work)

    @property
    def homes(self) -> tuple[type[nn.Module], ...]:
        """The stock modules; ``padding_mode`` lies in the forward that is rewritten."""
        return (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def operands(self, call: Call) -> tuple[Operand, ...]:
        """The second argument is the weight, unless the convolution is transposed."""
        weight = call.arg(1, "weight")
        if not isinstance(weight, fx.Node):
            return ()
        if call.op == "convolution" and call.arg(6, "transposed", default=False):
            return ()
        shape = shape_of(weight)
        axes = tuple(range(1, len(shape)))
        return (Operand(weight, call.arg(0, "input"), shape, out=(0,), inp=axes, channel=1 - len(shape)),)

    def owned(self, module: nn.Module) -> Mapping[str, MatrixForm]:
        """The weight of a stock convolution."""
        if isinstance(module, self.homes) and has_weight(module):
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            return {"weight": rows_form(tuple(weight.shape))}
        return {}
