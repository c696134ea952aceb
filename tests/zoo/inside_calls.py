"""Look into a call that is a whole attention: the operands that its products or its fused kernel get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from tests.whole_replay import call


class _Catch(TorchDispatchMode):
    """Keeps what every product of two activations and every fused attention is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fused: list[tuple[Tensor, ...]] = []
        self.products: list[tuple[Tensor, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name:
            self.fused.append(tuple(args[:3]))
        elif name in {"bmm", "baddbmm"}:
            self.products.append(tuple(args[-2:]))
        return func(*args, **(kwargs or {}))


def operands_inside(node: fx.Node, values: Mapping[fx.Node, Any]) -> dict[str, Tensor]:
    """Run one call and return query, key and value: ``softmax(q kᵀ) v``, or of the fused kernel it calls."""
    with torch.no_grad(), _Catch() as caught:
        call(node, values)
    if caught.fused:
        ((q, k, v),) = caught.fused
    else:
        (q, k), (_, v) = caught.products
    return {"q": q, "k": k, "v": v}
