"""Canonical names of torch operations, however they are spelled."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

_SPELLINGS = {
    "rmatmul": "matmul",
    "imatmul": "matmul_",
    "radd": "add",
    "iadd": "add_",
    "rmul": "mul",
    "imul": "mul_",
    "isub": "sub_",
    "truediv": "div",
    "itruediv": "div_",
    "idiv": "div_",
    "rtruediv": "rdiv",
    "ipow": "pow_",
    "to_copy": "to",
}


@lru_cache(maxsize=4096)
def canonical_op(target: Any) -> str:
    """Return one name for a function, a Tensor method, an operator and an aten overload alike.

    ``torch.matmul``, ``Tensor.matmul``, ``Tensor.__rmatmul__``, ``operator.matmul`` and
    ``aten.matmul.default`` are all ``"matmul"``; in-place forms keep their underscore (``"add_"``),
    private forms lose theirs (``aten._softmax`` is ``"softmax"``).
    """
    if isinstance(target, str):
        name = target
    else:
        packet = getattr(target, "overloadpacket", target)
        name = getattr(packet, "__name__", type(packet).__name__)
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    name = name.lstrip("_") or name
    return _SPELLINGS.get(name, name)
