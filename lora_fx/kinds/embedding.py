"""Embedding: ``y = W[ids]`` with ``W: (vocabulary, dim)``, a matrix ``(dim, vocabulary)``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lora_fx.kinds.base import Branch, Call, Kind, LiveParts, Operand, add_rows, has_weight, shape_of
from lora_fx.kinds.effective import effective_weight
from lora_fx.kinds.spread import embedding_on_shards, on_shards
from lora_fx.matrix import MatrixForm, columns_form

MAX_NORM = "max_norm rewrites the weight in the forward"
BY_FREQUENCY = "W itself is looked up, since gradients are divided by how often an id occurs"


def adapted_embedding(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    lora: LiveParts,
) -> Tensor:
    """Return ``W0[ids] + sum over parts of scale * A^T[ids] B^T``.

    Gradients are those of ``W``: none from the padding, and where they are divided by how often an id
    occurs, ``W`` itself is looked up. The branch's input is an id as a column of zeros and a one, of which
    dropout takes the one: it drops what is added to a looked-up id as a whole, for each id anew.
    """
    how = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if lora and on_shards(input, weight, None, lora):
        branch = partial(
            adapted_embedding,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
        )
        return embedding_on_shards(branch, input, weight, padding_idx, lora)
    if lora and scale_grad_by_freq:
        form = columns_form(tuple(weight.shape))
        return F.embedding(input, effective_weight(weight, form, lora), *how)
    result = F.embedding(input, weight, *how)
    padding = None if padding_idx is None or not lora else (input == padding_idx % weight.shape[0])
    mask = ids_mask(input, lora)
    for part in lora:
        update = _looked_up(input, part.a, part.b, weight.dtype)
        if mask is not None:
            update = update * mask.unsqueeze(-1).to(update.dtype)
        if padding is not None:
            update = torch.where(padding.unsqueeze(-1), update.detach(), update)
        result = add_rows(result, update, part.rows, -1, part.scale)
    return result


def _looked_up(ids: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    # As exact as the wider of table and adapter: nothing is cast where they are alike.
    wide = torch.promote_types(a.dtype, dtype)
    return F.linear(F.embedding(ids, a.t()).to(wide), b.to(wide))


def ids_mask(ids: Tensor, lora: LiveParts) -> Tensor | None:
    """Return the dropout of every looked-up id, zero or ``1 / (1 - p)``, one for all parts; None without."""
    first = lora[0] if lora else None
    if first is None or not first.dropout:
        return None
    return F.dropout(torch.ones(ids.shape, dtype=first.a.dtype, device=ids.device), first.dropout)


class EmbeddingKind(Kind):
    """``F.embedding`` and ``nn.Embedding``: rows are the embedding's dimensions."""

    name = "embedding"
    ops = frozenset({"embedding"})

    @property
    def branches(self) -> Mapping[str, Branch]:
        """The low-rank branch of ``F.embedding``."""
        return {"embedding": adapted_embedding}

    def branch_form(self, call: Call, shape: tuple[int, ...]) -> MatrixForm:
        """Rows are the embedding's dimensions."""
        del call
        return columns_form(shape)

    def unbranched(self, call: Call) -> str | None:
        """Gradients by frequency are those of one lookup in ``W``."""
        return BY_FREQUENCY if call.arg(5, "scale_grad_by_freq", default=False) else None

    @property
    def homes(self) -> tuple[type[nn.Module], ...]:
        """``nn.Embedding``."""
        return (nn.Embedding,)

    def operands(self, call: Call) -> tuple[Operand, ...]:
        """``F.embedding(ids, weight)``; ``torch.embedding(weight, ids)`` has them the other way."""
        first, second = call.arg(0, "input"), call.arg(1, "weight")
        for weight, ids in ((second, first), (first, second)):
            if isinstance(weight, fx.Node) and weight.meta.get("floating") and len(shape_of(weight)) == 2:
                max_norm = call.arg(3, "max_norm")
                given = isinstance(max_norm, (int, float)) and not isinstance(max_norm, bool)
                unfit = MAX_NORM if given else None
                ids_node = ids if isinstance(ids, fx.Node) else None
                return (Operand(weight, ids_node, shape_of(weight), out=(1,), inp=(0,), unfit=unfit),)
        return ()

    def owned(self, module: nn.Module) -> Mapping[str, MatrixForm]:
        """The weight of an ``nn.Embedding``."""
        if isinstance(module, nn.Embedding) and has_weight(module):
            return {"weight": columns_form(tuple(module.weight.shape))}
        return {}

    def unfit(self, module: nn.Module) -> str | None:
        """``max_norm`` rewrites the weight in the forward."""
        return None if getattr(module, "max_norm", None) is None else MAX_NORM
