"""The effective weight: the one semantic rule, on plain tensors.

Plain: ``W = W0 + sum over parts of scale * (B A - B0 A0)``, each part on its own rows. DoRA (Liu et al.
2024, eq. 5): the rows of that, scaled to the trained magnitudes. Full: the trained copy itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_fx.kinds.base import LiveParts, rows_index
from lora_fx.matrix import MatrixForm


def low_rank_delta(form: MatrixForm, parts: LiveParts) -> Tensor:
    """Return ``scale * sum of (B A - B0 A0)`` in the weight's own shape, at the adapter's precision."""
    total: Tensor | None = None
    for part in parts:
        product = part.b @ part.a
        if part.start is not None:
            start_a, start_b = part.start
            product = product - start_b @ start_a
        product = product * part.scale
        if part.rows is not None:
            shape = (*product.shape[:-2], form.out_features, form.in_features)
            index = rows_index(part.rows, product.device)
            product = product.new_zeros(shape).index_add(product.dim() - 2, index, product)
        total = product if total is None else total + product
    if total is None:
        raise RuntimeError("an adapter without parts")
    return form.weight(total)


def effective_weight(
    base: Tensor, form: MatrixForm, parts: LiveParts, magnitude: Tensor | None = None
) -> Tensor:
    """Return ``W``, added in float32 or wider and cast once to the dtype of ``W0``."""
    delta = low_rank_delta(form, parts)
    wide = torch.promote_types(delta.dtype, torch.promote_types(base.dtype, torch.float32))
    weight = base.to(wide) + delta.to(wide)
    if magnitude is not None:
        weight = _with_magnitude(weight, magnitude.to(wide), form)
    return weight.to(base.dtype)


def row_norms(weight: Tensor, form: MatrixForm) -> Tensor:
    """Return the norm of each row of the matrix form: (out,) or (E, out)."""
    norms: Tensor = torch.linalg.vector_norm(form.matrix(weight), dim=-1)
    return norms


def _with_magnitude(weight: Tensor, magnitude: Tensor, form: MatrixForm) -> Tensor:
    norms = row_norms(weight, form)
    # A row of zeros has no direction: its ratio is 1, so that the weight is unchanged at the start.
    ratio = torch.where(norms == 0, torch.ones_like(norms), magnitude / norms)
    return form.weight(form.matrix(weight) * ratio.unsqueeze(-1))
