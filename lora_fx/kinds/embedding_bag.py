"""Bags of embeddings: ``y = reduce over ids of W[ids]``, ``W: (vocabulary, dim)``, ``(dim, vocabulary)``.

A sum and a mean are linear in ``W``, so the branch is a bag of ``A^T`` and a product with ``B``. The
maximum of a bag is not: there the effective weight is looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lora_fx.kinds.base import Branch, Call, Kind, LiveParts, Operand, add_rows, has_weight, shape_of
from lora_fx.kinds.effective import effective_weight
from lora_fx.kinds.embedding import BY_FREQUENCY, MAX_NORM, ids_mask
from lora_fx.matrix import MatrixForm, columns_form


def adapted_embedding_bag(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    offsets: Tensor | None = None,
    *settings: Any,
    lora: LiveParts,
    **named: Any,
) -> Tensor:
    """Return the bags of ``W0`` plus ``sum over parts of scale * bag(A^T) B^T``.

    ``settings`` are ``F.embedding_bag``'s: max_norm, norm_type, scale_grad_by_freq, mode, sparse,
    per_sample_weights, include_last_offset, padding_idx. Dropout is an embedding's: it drops what is added
    to an id of a bag as a whole.
    """
    given = {**dict(zip(_SETTINGS, settings, strict=False)), **named}
    if not lora:
        return F.embedding_bag(input, weight, offsets, **given)
    if given.get("mode", "mean") == "max" or given.get("scale_grad_by_freq"):
        form = columns_form(tuple(weight.shape))
        return F.embedding_bag(input, effective_weight(weight, form, lora), offsets, **given)
    result = F.embedding_bag(input, weight, offsets, **given)
    mask = ids_mask(input, lora)
    for part in lora:
        wide = torch.promote_types(part.a.dtype, weight.dtype)
        update = _bags(input, offsets, part.a.to(wide), part.b.to(wide), given, mask)
        result = add_rows(result, update * part.scale, part.rows, -1)
    return result


_SETTINGS = (
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "mode",
    "sparse",
    "per_sample_weights",
    "include_last_offset",
    "padding_idx",
)


def _bags(
    ids: Tensor, offsets: Tensor | None, a: Tensor, b: Tensor, given: Mapping[str, Any], mask: Tensor | None
) -> Tensor:
    # Sparse gradients are for tables that are trained; A is dense.
    weights = given.get("per_sample_weights")
    weights = None if weights is None else weights.to(a.dtype)
    how: dict[str, Any] = {**given, "sparse": False, "per_sample_weights": weights}
    if mask is None:
        return F.linear(F.embedding_bag(ids, a.t().contiguous(), offsets, **how), b)
    mask = mask.to(a.dtype)
    weights = mask if weights is None else mask * weights
    summed: dict[str, Any] = {**how, "mode": "sum", "per_sample_weights": weights}
    bags = F.embedding_bag(ids, a.t().contiguous(), offsets, **summed)
    if how.get("mode", "mean") == "mean":
        # torch weighs sums alone: the mean is a sum over the number of ids, padding left out.
        one = torch.ones(a.shape[1], 1, dtype=a.dtype, device=a.device)
        summed["per_sample_weights"] = None
        counts = F.embedding_bag(ids, one, offsets, **summed)
        bags = bags / counts.clamp_min(1)
    return F.linear(bags, b)


class EmbeddingBagKind(Kind):
    """``F.embedding_bag`` and ``nn.EmbeddingBag``: rows are the embedding's dimensions."""

    name = "embedding_bag"
    ops = frozenset({"embedding_bag"})

    @property
    def branches(self) -> Mapping[str, Branch]:
        """The low-rank branch of ``F.embedding_bag``."""
        return {"embedding_bag": adapted_embedding_bag}

    def branch_form(self, call: Call, shape: tuple[int, ...]) -> MatrixForm:
        """Rows are the embedding's dimensions."""
        del call
        return columns_form(shape)

    def unbranched(self, call: Call) -> str | None:
        """The maximum of a bag and gradients by frequency are those of one lookup in ``W``."""
        if call.arg(6, "mode", "mean") == "max":
            return "W itself is looked up, since the maximum of a bag is not linear in W"
        return BY_FREQUENCY if call.arg(5, "scale_grad_by_freq", default=False) else None

    @property
    def homes(self) -> tuple[type[nn.Module], ...]:
        """``nn.EmbeddingBag``."""
        return (nn.EmbeddingBag,)

    def operands(self, call: Call) -> tuple[Operand, ...]:
        """``F.embedding_bag(ids, weight)``; ``torch.embedding_bag(weight, ids)`` is the other way round."""
        first, second = call.arg(0, "input"), call.arg(1, "weight")
        for weight, ids in ((second, first), (first, second)):
            if isinstance(weight, fx.Node) and weight.meta.get("floating") and len(shape_of(weight)) == 2:
                max_norm = call.kwargs.get("max_norm")
                node = ids if isinstance(ids, fx.Node) else None
                unfit = None if max_norm is None else MAX_NORM
                return (Operand(weight, node, shape_of(weight), out=(1,), inp=(0,), unfit=unfit),)
        return ()

    def owned(self, module: nn.Module) -> Mapping[str, MatrixForm]:
        """The weight of an ``nn.EmbeddingBag``."""
        if isinstance(module, nn.EmbeddingBag) and has_weight(module):
            return {"weight": columns_form(tuple(module.weight.shape))}
        return {}

    def unfit(self, module: nn.Module) -> str | None:
        """``max_norm`` rewrites the weight in the forward."""
        return None if getattr(module, "max_norm", None) is None else MAX_NORM
