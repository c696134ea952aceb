"""Effective weights kept between forwards that nothing is trained in, as generation runs them.

A weight is kept for a module in eval mode, without gradients, on the CPU, until anything it was computed
from changes: W0, A, B (by identity, memory and version) or inference mode. Writes through ``.data`` pass
versions by, so A, B and magnitudes are compared by value too, and of W0 one element in every row and in
every column is: a ``.data`` write of less than a row or a column of W0 may go unseen until the next
training step. Any other use drops what is kept. It costs one copy of W0's memory.

What is kept could be written by who gets past its guard, and later readings would see it: such a write is
looked for in the same way, and refused at the next reading.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fx.passes.guard import refuse_written

_PLAIN = frozenset({Tensor, nn.Parameter})
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class _Kept:
    inference: bool
    scale: float
    stamp: _Stamp
    values: tuple[Tensor, ...]
    weight: Tensor
    version: int
    crossing: Tensor


_weights: weakref.WeakKeyDictionary[nn.Module, dict[str, _Kept]] = weakref.WeakKeyDictionary()


def kept(
    module: nn.Module,
    name: str,
    base: Tensor,
    small: tuple[Tensor, ...],
    scale: float,
    compute: Callable[[], Tensor],
) -> Tensor:
    """Return the module's weight as it was computed last if nothing has changed, else compute it.

    ``small`` are the adapter's tensors; the weight depends on them, on ``base`` and ``scale`` alone.

    Raises:
        WeightWriteError: what was kept has been written to since.
    """
    if torch.compiler.is_compiling():
        return compute()  # compilers cannot follow a look into weak references
    if not _may_keep(module, (base, *small)):
        if module in _weights:
            del _weights[module]
        return compute()
    held = _weights.setdefault(module, {})
    values = (*small, _crossing(base))
    found, stamp = held.get(name), tuple((id(t), t.data_ptr(), t._version) for t in (base, *small))
    inference = torch.is_inference_mode_enabled()
    if (
        found is None
        or (found.inference, found.scale, found.stamp) != (inference, scale, stamp)
        or not all(torch.equal(t, value) for t, value in zip(values, found.values, strict=True))
    ):
        copies, weight = tuple(t.detach().clone() for t in values), compute()
        own = _version(weight), _crossing(weight).clone()
        found = held[name] = _Kept(inference, scale, stamp, copies, weight, *own)
    elif _version(found.weight) != found.version or not torch.equal(_crossing(found.weight), found.crossing):
        del held[name]
        fresh = compute()
        if not torch.allclose(found.weight, fresh, rtol=0.0, atol=0.0, equal_nan=True):
            raise refuse_written(f"{name!r} of {type(module).__name__}")
        return fresh
    return found.weight


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _crossing(base: Tensor) -> Tensor:
    """Return a view of the weight that meets every row and every column, as a diagonal does.

    Of a contiguous ``(n, m)``, every k-th element: k at most n and m, and without a divisor in common with
    m, so that all columns come in turn.
    """
    if not base.is_contiguous() or base.dim() == 0:
        return base
    columns = base.numel() // max(base.shape[0], 1)
    step = min(base.shape[0], columns)
    while step > 1 and math.gcd(step, columns) > 1:
        step -= 1
    return base.detach().view(-1)[:: max(step, 1)]


def _may_keep(module: nn.Module, tensors: tuple[Tensor, ...]) -> bool:
    if torch.is_grad_enabled() or module.training:
        return False
    return all(type(t) in _PLAIN and t.device.type == "cpu" and not t.is_inference() for t in tensors)
