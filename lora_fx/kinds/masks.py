"""Dropout masks that are drawn again instead of kept.

A mask is 16 random bits per element from a generator of its own, seeded by one draw from torch's random
state: the backward draws the very same bits from the seed. An element is dropped with probability
``q = round(2^16 p) / 2^16`` and what is kept is scaled by ``1 / (1 - q)``, so the expectation is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LANES = 1 << 16


class Mask(NamedTuple):
    """The mask of one input: ``dropped`` of 65536 values of its bits mean that an element is dropped."""

    seed: int
    dropped: int

    @property
    def factor(self) -> float:
        """What is kept is multiplied by this."""
        return _LANES / (_LANES - self.dropped)

    def ones(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Return ones where elements are kept and zeros where they are dropped, of ``like``'s dtype."""
        count = shape[0] * shape[1]
        generator = torch.Generator(like.device).manual_seed(self.seed)
        words = torch.empty((count + 3) // 4, dtype=torch.int64, device=like.device)
        bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
        keep = torch.empty(shape, dtype=like.dtype, device=like.device)
        return torch.ge(bits.view(shape), self.dropped - _LANES // 2, out=keep)


def draw(p: float, stream: int = 0) -> Mask:
    """Return a mask that drops with probability ``p``; torch's random state moves by one draw.

    From the same random state, another ``stream`` gives another mask.
    """
    seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_()) ^ stream
    return Mask(seed, min(round(p * _LANES), _LANES - 1))
