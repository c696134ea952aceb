"""Canonical names of torch operations, however they are spelled."""

from __future__ import annotations

from typing import Any


def canonical_op(target: Any) -> str:
    """Return one name for a function, a Tensor method, an operator and an aten overload alike.

    ``torch.matmul``, ``Tensor.matmul``, ``Tensor.__rmatmul__``, ``operator.matmul`` and
    ``aten.matmul.default`` are all ``"matmul"``; in-place forms keep their underscore (``"add_"``).
    """
    if isinstance(target, str):
        name = target
    else:
        packet = getattr(target, "overloadpacket", target)
        name = getattr(packet, "__name__", type(packet).__name__)
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    return {"rmatmul": "matmul", "imatmul": "matmul_"}.get(name, name)
