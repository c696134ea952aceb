"""Bilinear: ``y_o = x1 W_o x2^T + b_o`` with ``W: (out, in1, in2)``, a matrix ``(out, in1 x in2)``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn
from torch.nn import functional as F

from lora_fx.kinds.base import Branch, Call, Kind, LiveParts, Operand, add_rows, has_weight, shape_of
from lora_fx.matrix import MatrixForm, rows_form


def adapted_bilinear(
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lora: LiveParts,
) -> Tensor:
    """Return ``bilinear(x1, x2, W0) + b + sum over parts of scale * bilinear(x1, x2, A) B^T``."""
    result = F.bilinear(input1, input2, weight, bias)
    for part in lora:
        x = F.dropout(input1, part.dropout) if part.dropout else input1
        update = _product(x, input2, part.a, part.b)
        result = add_rows(result, update * part.scale, part.rows, -1)
    return result


def _product(x1: Tensor, x2: Tensor, a: Tensor, b: Tensor) -> Tensor:
    kernel = a.to(x1.dtype).reshape(a.shape[0], x1.shape[-1], x2.shape[-1])
    return F.linear(F.bilinear(x1, x2, kernel), b.to(x1.dtype))


class BilinearKind(Kind):
    """``F.bilinear`` and ``nn.Bilinear``: columns are the pairs of input features."""

    name = "bilinear"
    ops = frozenset({"bilinear"})

    @property
    def branches(self) -> Mapping[str, Branch]:
        """The low-rank branch of ``F.bilinear``."""
        return {"bilinear": adapted_bilinear}

    @property
    def branch_weight(self) -> Mapping[str, int]:
        """The weight follows both inputs."""
        return {"bilinear": 2}

    @property
    def homes(self) -> tuple[type[nn.Module], ...]:
        """``nn.Bilinear``."""
        return (nn.Bilinear,)

    def operands(self, call: Call) -> tuple[Operand, ...]:
        """The third argument is the weight."""
        weight = call.arg(2, "weight")
        if not isinstance(weight, fx.Node):
            return ()
        first = call.arg(0, "input1")
        return (Operand(weight, first, shape_of(weight), out=(0,), inp=(1, 2), channel=-1),)

    def owned(self, module: nn.Module) -> Mapping[str, MatrixForm]:
        """The weight of an ``nn.Bilinear``."""
        if isinstance(module, nn.Bilinear) and has_weight(module):
            return {"weight": rows_form(tuple(module.weight.shape))}
        return {}
