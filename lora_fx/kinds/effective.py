"""The effective weight: the one semantic rule, on plain tensors.

Plain: ``W = W0 + sum over parts of scale * B A``, each part on its own rows. DoRA (Liu et al.
2024, eq. 5): the rows of that, scaled to the trained magnitudes. Full: the trained copy itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lora_fx.kinds.base import LivePart, LiveParts, rows_index, strided_as
from lora_fx.kinds.eager import plain_eager
from lora_fx.matrix import MatrixForm, columns_form, rows_form


def low_rank_delta(form: MatrixForm, part: LivePart) -> Tensor:
    """Return ``scale * B A`` in the weight's own shape; exactly zero at the start."""
    product = (part.b @ part.a) * part.scale
    if part.rows is not None:
        shape = (*product.shape[:-2], form.out_features, form.in_features)
        index = rows_index(part.rows, product.device)
        product = product.new_zeros(shape).index_add(product.dim() - 2, index, product)
    return form.weight(product)


def effective_weight(
    base: Tensor, form: MatrixForm, parts: LiveParts, magnitude: Tensor | None = None
) -> Tensor:
    """Return ``W``, added in float32 or wider and cast once to the dtype of ``W0``, in its format."""
    if not parts:
        raise RuntimeError("an adapter without parts")
    wide = torch.promote_types(parts[0].a.dtype, torch.promote_types(base.dtype, torch.float32))
    weight = base.to(wide)
    for part in parts:
        weight = _with_part(weight, form, part)
    if magnitude is not None:
        weight = _with_magnitude(weight, magnitude.to(wide), form)
    weight = strided_as(weight.to(base.dtype), base)
    table = len(form.shape) == 2 and form == columns_form(form.shape)
    return _densely(weight) if table and weight.requires_grad and plain_eager(weight) else weight


class _Dense(Function):
    """The identity; its gradient, sparse where a table was looked up with ``sparse=True``, has its zeros.

    The products that made ``W`` take no other.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        del ctx
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        del ctx
        return grads[0].to_dense() if grads[0].is_sparse else grads[0]


_densely: Any = _Dense.apply


def _with_part(weight: Tensor, form: MatrixForm, part: LivePart) -> Tensor:
    """Add one part: in a single product where the weight is stored as its matrix, or transposed."""
    a, b = part.a.to(weight.dtype), part.b.to(weight.dtype)
    if part.rows is not None or not weight.is_contiguous():
        return weight + low_rank_delta(form, part._replace(a=a, b=b))
    if form == rows_form(form.shape):
        flat = weight.view(form.out_features, form.in_features)
        return torch.addmm(flat, b, a, alpha=part.scale).view(form.shape)
    if len(form.shape) == 2 and form == columns_form(form.shape):
        return torch.addmm(weight, a.mT, b.mT, alpha=part.scale)
    return weight + low_rank_delta(form, part._replace(a=a, b=b))


def row_norms(weight: Tensor, form: MatrixForm) -> Tensor:
    """Return the norm of each row of the matrix form: (out,) or (E, out)."""
    norms: Tensor = torch.linalg.vector_norm(form.matrix(weight), dim=-1)
    return norms


def _with_magnitude(weight: Tensor, magnitude: Tensor, form: MatrixForm) -> Tensor:
    norms = row_norms(weight, form)
    # A row of zeros has no direction: its ratio is 1, so that the weight is unchanged at the start.
    ratio = torch.where(norms == 0, torch.ones_like(norms), magnitude / norms)
    return form.weight(form.matrix(weight) * ratio.unsqueeze(-1))


def effective_band(
    base: Tensor, start: int, form: MatrixForm, parts: LiveParts, magnitude: Tensor | None = None
) -> Tensor | None:
    """Return ``W[start : start + n]`` from these entries of ``W0`` along axis 0, or None where it needs more.

    Axis 0 of a weight is the rows of its matrix form, of an embedding and its like the columns, and of
    experts their number::

        rows:      W0[i:j] + s B[i:j] A         columns:   W0[i:j] + s (B A[:, i:j])^T
        experts:   W0[i:j] + s B[i:j] A[i:j]
    """
    stop, shape = start + len(base), (len(base), *form.shape[1:])
    if form == rows_form(form.shape):
        cut = tuple(rows_between(part, start, stop) for part in parts)
        held = None if magnitude is None else magnitude[start:stop]
        return effective_weight(base, rows_form(shape), cut, held)
    if len(shape) == 2 and form == columns_form(form.shape) and magnitude is None:
        cut = tuple(_columns_between(part, start, stop) for part in parts)
        return effective_weight(base, columns_form(shape), cut)
    if form.batch == (0,) and form.view == form.shape:
        cut = tuple(part._replace(a=part.a[start:stop], b=part.b[start:stop]) for part in parts)
        held = None if magnitude is None else magnitude[start:stop]
        return effective_weight(base, replace(form, shape=shape, view=shape), cut, held)
    return None


def rows_between(part: LivePart, start: int, stop: int) -> LivePart:
    """Return what a part adds to the rows from ``start`` to ``stop``, numbered from ``start``."""
    if part.rows is None:
        chosen, rows = slice(start, stop), None
    else:
        index = rows_index(part.rows, part.b.device)
        inside = (index >= start) & (index < stop)
        first = int((index < start).sum())
        chosen = slice(first, first + int(inside.sum()))
        rows = tuple((max(a, start) - start, min(b, stop) - start) for a, b in part.rows)
        rows = tuple((a, b) for a, b in rows if a < b)
    return part._replace(b=part.b[chosen], rows=rows)


def _columns_between(part: LivePart, start: int, stop: int) -> LivePart:
    return part._replace(a=part.a[:, start:stop])
