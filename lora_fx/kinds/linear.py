"""Linear: ``y = x W^T + b`` with ``W: (out, in)``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn
from torch.nn import functional as F

from lora_fx.kinds.base import Branch, Call, Kind, LiveParts, Operand, add_rows, low_rank, shape_of
from lora_fx.matrix import MatrixForm, rows_form


def adapted_linear(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lora: LiveParts,
) -> Tensor:
    """Return ``x W0^T + b + sum over parts of scale * (x A^T) B^T``."""
    result = F.linear(input, weight, bias)
    for part in lora:
        result = add_rows(result, low_rank(input, part), part.rows, -1)
    return result


class LinearKind(Kind):
    """``F.linear`` and ``nn.Linear``; rows are output features, columns input features."""

    name = "linear"
    ops = frozenset({"linear"})

    @property
    def branches(self) -> Mapping[str, Branch]:
        """The low-rank branch of ``F.linear``."""
        return {"linear": adapted_linear}

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
        if isinstance(module, nn.Linear):
            return {"weight": rows_form(tuple(module.weight.shape))}
        return {}
