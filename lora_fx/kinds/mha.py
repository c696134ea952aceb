"""``F.multi_head_attention_forward``: the packed or separate projections of ``nn.MultiheadAttention``.

``in_proj_weight: (3 E, E)`` holds the rows of q, k and v one after the other; the separate
projections and ``out_proj_weight`` are ordinary (out, in) matrices. All take the weight form: the
function multiplies inside.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn

from lora_fx.kinds.base import Call, Kind, Operand, shape_of
from lora_fx.matrix import MatrixForm, Rows, rows_form

_WEIGHTS: tuple[tuple[int, str, int, str], ...] = (
    (18, "q_proj_weight", 0, "q"),
    (19, "k_proj_weight", 1, "k"),
    (20, "v_proj_weight", 2, "v"),
    (11, "out_proj_weight", -1, "o"),
)
"""Position and name of each weight, the position of its input (-1: inside), and its role."""


class AttentionKind(Kind):
    """The weights of ``F.multi_head_attention_forward``; the operation itself names their roles."""

    name = "attention"
    ops = frozenset({"multi_head_attention_forward"})

    def operands(self, call: Call) -> tuple[Operand, ...]:
        """The in-projection, packed or separate, and the out-projection."""
        found: list[Operand] = []
        packed = call.arg(5, "in_proj_weight")
        if isinstance(packed, fx.Node):
            found.append(_operand(packed, call.arg(0, "query"), _thirds(shape_of(packed)[0])))
        for position, name, source, role in _WEIGHTS:
            weight = call.arg(position, name)
            if isinstance(weight, fx.Node):
                given = None if source < 0 else call.args[source] if source < len(call.args) else None
                found.append(_operand(weight, given, {role: None}))
        return tuple(found)

    def owned(self, module: nn.Module) -> Mapping[str, MatrixForm]:
        """The in-projections of an ``nn.MultiheadAttention``; its out-projection is a linear's weight."""
        if not isinstance(module, nn.MultiheadAttention):
            return {}
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = {name: getattr(module, name, None) for name in names}
        return {name: rows_form(tuple(w.shape)) for name, w in weights.items() if isinstance(w, Tensor)}


def _thirds(rows: int) -> dict[str, Rows | None]:
    step = rows // 3
    return {role: ((i * step, (i + 1) * step),) for i, role in enumerate("qkv")}


def _operand(weight: fx.Node, given: object, roles: dict[str, Rows | None]) -> Operand:
    source = given if isinstance(given, fx.Node) else None
    return Operand(weight, source, shape_of(weight), out=(0,), inp=(1,), roles=roles)
