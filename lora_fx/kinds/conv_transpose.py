"""Transposed convolution in 1, 2 and 3 dimensions, any groups, stride, dilation and padding.

``W: (in, out / groups, *kernel)`` is, per group, the matrix ``(out / groups x kernel, in / groups)``.
The branch is a 1x1 convolution with ``A`` and a transposed convolution with ``B`` as its kernel (the
same stride, padding, output padding, dilation); every group has its own ``A`` and ``B``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

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
from lora_fx.kinds.wide import cast_up
from lora_fx.matrix import MatrixForm, Rows

_CONVS: Mapping[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: Mapping[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv_transpose_form(shape: tuple[int, ...], groups: int) -> MatrixForm:
    """Return the form of a transposed convolution's weight; one matrix per group."""
    view, out, inp, batch = _axes(shape, groups)
    return MatrixForm(shape, view, out=out, inp=inp, batch=batch)


def _axes(
    shape: tuple[int, ...], groups: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return (view, out, inp, batch)."""
    if groups == 1:
        return shape, tuple(range(1, len(shape))), (0,), ()
    view = (groups, shape[0] // groups, *shape[1:])
    return view, tuple(range(2, len(view))), (1,), (0,)


class _Geometry(NamedTuple):
    stride: Any
    padding: Any
    output_padding: Any
    groups: int
    dilation: Any


def _adapted(dims: int) -> Branch:
    transposed = _TRANSPOSED[dims]

    def adapted_conv_transpose(  # noqa: PLR0913 - the operation's own signature
        input: Tensor,  # noqa: A002
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
        *,
        lora: LiveParts,
    ) -> Tensor:
        """Return the transposed convolution plus its low-rank branches."""
        how = _Geometry(stride, padding, output_padding, groups, dilation)
        result: Tensor = transposed(input, weight, bias, *how)
        for part in lora:
            update = _low_rank(input, tuple(weight.shape), part, how)
            result = add_rows(result, update, None, 1)
        return result

    adapted_conv_transpose.__name__ = adapted_conv_transpose.__qualname__ = f"adapted_conv_transpose{dims}d"
    return adapted_conv_transpose


def _low_rank(x: Tensor, shape: tuple[int, ...], part: LivePart, how: _Geometry) -> Tensor:
    x = F.dropout(x, part.dropout) if part.dropout else x
    product = partial(_product, shape=shape, rows=part.rows, how=how)
    return cast_up(product, x, part.a, part.b) * part.scale


def _product(
    x: Tensor, a: Tensor, b: Tensor, shape: tuple[int, ...], rows: Rows | None, how: _Geometry
) -> Tensor:
    """Return ``conv_transpose(conv1x1(x, A), B)``; ``a`` and ``b`` are stacked where there are groups."""
    dims, groups = len(shape) - 2, how.groups
    if rows is not None:
        # Rows are (channel, tap) pairs: put B's in their places among zeros.
        full = b.new_zeros(*b.shape[:-2], shape[1] * _taps(shape), b.shape[-1])
        b = full.index_add(b.dim() - 2, rows_index(rows, b.device), b)
    mix = a.to(x.dtype).reshape(-1, a.shape[-1], *[1] * dims)
    kernel = b.to(x.dtype).mT.reshape(mix.shape[0], *shape[1:])
    hidden = _CONVS[dims](x, mix, None, 1, 0, 1, groups)
    update: Tensor = _TRANSPOSED[dims](hidden, kernel, None, *how)
    return update


def _taps(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[2:]).numel()


adapted_conv_transpose1d = _adapted(1)
adapted_conv_transpose2d = _adapted(2)
adapted_conv_transpose3d = _adapted(3)


class ConvTransposeKind(Kind):
    """``F.conv_transpose1d/2d/3d`` and their modules."""

    name = "conv_transpose"
    ops = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})

    @property
    def branches(self) -> Mapping[str, Branch]:
        """The low-rank branches by dimension."""
        return {
            "conv_transpose1d": adapted_conv_transpose1d,
            "conv_transpose2d": adapted_conv_transpose2d,
            "conv_transpose3d": adapted_conv_transpose3d,
        }

    def branch_form(self, call: Call, shape: tuple[int, ...]) -> MatrixForm:
        """One matrix per group, read transposed."""
        return conv_transpose_form(shape, groups_of(call))

    @property
    def homes(self) -> tuple[type[nn.Module], ...]:
        """The stock modules, called without an ``output_size``."""
        return (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    @property
    def defaults(self) -> frozenset[str]:
        """An ``output_size`` is turned into a padding by tests on its value."""
        return frozenset({"output_size"})

    def operands(self, call: Call) -> tuple[Operand, ...]:
        """The second argument is the weight."""
        weight = call.arg(1, "weight")
        if not isinstance(weight, fx.Node):
            return ()
        shape = shape_of(weight)
        view, out, inp, batch = _axes(shape, groups_of(call))
        return (Operand(weight, call.arg(0, "input"), view, out, inp, batch, channel=1 - len(shape)),)

    def owned(self, module: nn.Module) -> Mapping[str, MatrixForm]:
        """The weight of a stock transposed convolution."""
        if isinstance(module, self.homes) and has_weight(module):
            weight, groups = module.weight, module.groups
            assert isinstance(weight, Tensor)
            assert isinstance(groups, int)
            return {"weight": conv_transpose_form(tuple(weight.shape), groups)}
        return {}


def groups_of(call: Call) -> int:
    """Return the number of groups of a recorded transposed convolution."""
    groups = call.arg(6, "groups", 1)
    return groups if isinstance(groups, int) else 1
