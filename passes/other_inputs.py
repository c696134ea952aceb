"""Other inputs like the example ones: other values, and another batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def cases(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """Yield the example inputs, others of the same shapes, and one more in the batch where there is one."""
    yield "example inputs", inputs
    yield "other values", _map(inputs, _other_values)
    batch = _batch_size(inputs)
    if batch is not None:
        yield f"batch of {batch + 1}", _map(inputs, lambda t: _one_more(t, batch))


def _map(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    leaves, spec = pytree.tree_flatten(inputs)
    changed = [_leaf(change(v), v.requires_grad) if _is_dense(v) else v for v in leaves]
    mapped: Inputs = pytree.tree_unflatten(changed, spec)
    return mapped


def _is_dense(value: Any) -> bool:
    """Say whether a value is a tensor that other numbers can be made of: a sparse one is left as it is."""
    return isinstance(value, Tensor) and value.layout is torch.strided


def _leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    """Cut a made input off from what it was made of: every run takes gradients of its own."""
    return tensor.detach().requires_grad_(requires_grad)


def _other_values(tensor: Tensor) -> Tensor:
    """Other numbers of the same range: the same numbers in another order, floats moved a little."""
    moved = tensor.roll(1, dims=-1) if tensor.dim() else tensor
    return moved * 0.9 if tensor.is_floating_point() else moved


def _batch_size(inputs: Inputs) -> int | None:
    sizes = {t.shape[0] for t in pytree.tree_leaves(inputs) if _is_dense(t) and t.dim() > 1}
    return sizes.pop() if len(sizes) == 1 else None


def _one_more(tensor: Tensor, batch: int) -> Tensor:
    if tensor.dim() < 1 or tensor.shape[0] != batch:
        return tensor
    return torch.cat([tensor, tensor[:1]])
