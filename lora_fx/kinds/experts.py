"""Stacks of experts in one call: ``grouped_mm``, every group of tokens with its own matrix.

``y_g = x_g W_e`` for the tokens of group g, with ``W: (E, in, out)``; a stack read transposed, as
mixtures of experts do with ``W: (E, out, in)``, comes here through its view. Every expert has its own
A and B. Loops over ``W[e]`` and gathers ``W[ids]`` are linear or matmul calls on a part of the stack:
what they read is found by following the parameter (``passes/reach.py``).
"""

from __future__ import annotations

from torch import fx

from lora_fx.kinds.base import Call, Kind, Operand, shape_of


class GroupedKind(Kind):
    """``F.grouped_mm``, ``torch._grouped_mm`` and transformers' own form of it."""

    name = "experts"
    ops = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})

    def operands(self, call: Call) -> tuple[Operand, ...]:
        """A factor of three dimensions is a stack of matrices; one of two is shared out in groups."""
        left = call.arg(0, "mat_a", call.kwargs.get("self", call.kwargs.get("input")))
        right = call.arg(1, "mat_b", call.kwargs.get("mat2", call.kwargs.get("weight")))
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return ()
        found: list[Operand] = []
        if len(shape_of(right)) == 3:
            found.append(Operand(right, left, shape_of(right), out=(2,), inp=(1,), batch=(0,), channel=-1))
        if len(shape_of(left)) == 3:
            found.append(Operand(left, right, shape_of(left), out=(1,), inp=(2,), batch=(0,), channel=-2))
        return tuple(found)
