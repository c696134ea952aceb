"""Effective weights kept between forwards that nothing is trained in, as generation runs them.

A weight is kept for a module in eval mode, without gradients, on the CPU, until anything it was computed
from changes: W0, A, B (by identity, memory and version; A, B and magnitudes by their values too, since
``.data`` writes pass versions by) or inference mode. Any other use drops it. What is kept costs one copy
of W0's memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_PLAIN = frozenset({Tensor, nn.Parameter})
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class _Kept:
    inference: bool
    scale: float
    stamp: _Stamp
    values: tuple[Tensor, ...]
    weight: Tensor


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
    """
    if not _may_keep(module, (base, *small)):
        if module in _weights:
            del _weights[module]
        return compute()
    held = _weights.setdefault(module, {})
    found, stamp = held.get(name), tuple((id(t), t.data_ptr(), t._version) for t in (base, *small))
    inference = torch.is_inference_mode_enabled()
    if (
        found is None
        or (found.inference, found.scale, found.stamp) != (inference, scale, stamp)
        or not all(torch.equal(t, value) for t, value in zip(small, found.values, strict=True))
    ):
        values = tuple(t.detach().clone() for t in small)
        found = held[name] = _Kept(inference, scale, stamp, values, compute())
    return found.weight


def _may_keep(module: nn.Module, tensors: tuple[Tensor, ...]) -> bool:
    if torch.is_grad_enabled() or module.training or torch.compiler.is_compiling():
        return False
    return all(type(t) in _PLAIN and t.device.type == "cpu" and not t.is_inference() for t in tensors)
