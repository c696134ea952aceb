"""The registry of kinds: one file per kind of weight; adding one touches its file and this list."""

from __future__ import annotations

from lora_fx.kinds.base import Call, Kind, LivePart, LiveParts, Operand
from lora_fx.kinds.bilinear import BilinearKind
from lora_fx.kinds.conv import ConvKind
from lora_fx.kinds.conv_transpose import ConvTransposeKind
from lora_fx.kinds.einsum import EinsumKind
from lora_fx.kinds.embedding import EmbeddingKind
from lora_fx.kinds.embedding_bag import EmbeddingBagKind
from lora_fx.kinds.experts import GroupedKind
from lora_fx.kinds.linear import LinearKind
from lora_fx.kinds.matmul import MatmulKind
from lora_fx.kinds.mha import AttentionKind
from lora_fx.kinds.rnn import RecurrentKind

KINDS: tuple[Kind, ...] = (
    LinearKind(),
    ConvKind(),
    ConvTransposeKind(),
    EmbeddingKind(),
    EmbeddingBagKind(),
    RecurrentKind(),
    BilinearKind(),
    MatmulKind(),
    AttentionKind(),
    EinsumKind(),
    GroupedKind(),
)
"""Every kind, in the order in which they are asked."""

BY_NAME: dict[str, Kind] = {kind.name: kind for kind in KINDS}
BY_OP: dict[str, Kind] = {op: kind for kind in KINDS for op in kind.ops}

__all__ = ["BY_NAME", "BY_OP", "KINDS", "Call", "Kind", "LivePart", "LiveParts", "Operand"]
