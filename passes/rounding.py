"""What rounding alone does to a model: every weight is moved by one unit in its last place, or left.

An adapter and the weight that it makes are rounded differently, ``fl(x W0^T) + s fl(x A^T) B^T`` against
``x fl(W0 + s B A)^T``: the second is the first with every weight moved by a rounding. How far the model
*without adapters* goes when its weights move by so much is how well the two can agree (the backward error
of Higham, Accuracy and Stability of Numerical Algorithms, 1.5).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def weights_rounded(model: nn.Module, seed: int) -> Generator[None]:
    """Inside, every parameter is off by -1, 0 or 1 roundings; afterwards as it was, bit for bit."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    kept = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(_moved(value, generator))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


def _moved(value: Tensor, generator: torch.Generator) -> Tensor:
    steps = torch.randint(-1, 2, value.shape, generator=generator, dtype=torch.int8)
    return value + value * steps.to(value.device, value.dtype) * torch.finfo(value.dtype).eps
