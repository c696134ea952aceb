"""Linear: ``y = x W^T + b`` with ``W: (out, in)``."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, fx, nn
from torch.nn import functional as F

from lora_fx.kinds.base import (
    Branch,
    Call,
    Kind,
    LiveParts,
    Operand,
    add_rows,
    has_weight,
    low_rank,
    shape_of,
)
from lora_fx.kinds.expected import Expected, Work
from lora_fx.kinds.fused_linear import expected_linear, fusable, fused_linear, merged_linear
from lora_fx.kinds.spread import linear_on_shards, on_shards
from lora_fx.matrix import MatrixForm, rows_form


def adapted_linear(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lora: LiveParts,
) -> Tensor:
    """Return ``x W0^T + b + sum over parts of scale * (x A^T) B^T``."""
    if not lora:
        return F.linear(input, weight, bias)
    if not fusable(input, weight, bias, lora):
        if on_shards(input, weight, bias, lora):
            return linear_on_shards(adapted_linear, composed_linear, input, weight, bias, lora)
        return composed_linear(input, weight, bias, lora)
    merged = merged_linear(input, weight, bias, lora)
    return fused_linear(input, weight, bias, lora) if merged is None else merged


def composed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora: LiveParts) -> Tensor:
    """Return the same by plain operations: the reference, and what compilers and transforms see."""
    result = F.linear(x, weight, bias)
    for part in lora:
        result = add_rows(result, low_rank(x, part), part.rows, -1)
    return result


class LinearKind(Kind):
    """``F.linear`` and ``nn.Linear``; rows are output features, columns input features."""

    name = "linear"
    ops = frozenset({"linear"})

    @property
    def branches(self) -> Mapping[str, Branch]:
        """The low-rank branch of ``F.linear``."""
        return {"linear": adapted_linear}

    def expected(self, call: Call, weight: tuple[int, ...], work: Work) -> Expected:
        """Kept where it is small, merged where there are many rows."""
        out, columns = weight
        rows = math.prod(shape_of(call.arg(0, "input"))[:-1])
        return expected_linear(rows, out, columns, work, keeps=True)

    @property
    def homes(self) -> tuple[type[nn.Module], ...]:
        """``nn.Linear`` alone: its subclasses with the same forward are found by that forward."""
        return (nn.Linear,)

    def operands(self, call: Call) -> tuple[Operand, ...]:
        """The second argument is the weight."""
        weight = call.arg(1, "weight")
        if not isinstance(weight, fx.Node) or len(shape_of(weight)) != 2:
            return ()
        return (Operand(weight, call.arg(0, "input"), shape_of(weight), out=(0,), inp=(1,), channel=-1),)

    def owned(self, module: nn.Module) -> Mapping[str, MatrixForm]:
        """The weight of an ``nn.Linear``."""
        if isinstance(module, nn.Linear) and has_weight(module):
            return {"weight": rows_form(tuple(module.weight.shape))}
        return {}
