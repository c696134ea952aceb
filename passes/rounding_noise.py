"""What a run makes of other roundings: every operator's result is moved by a rounding, or left.

Two programs that compute one function round in other places, so that their outputs may lie as far apart
as a run of the one does from a run of it with noise in the last place of every intermediate result (Monte
Carlo arithmetic: Parker, UCLA CSD-970002, 1997). That holds where moved weights show nothing: a choice
among scores that are equal but for their rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class RoundingNoise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every new float is left or moved towards zero by one rounding; whole numbers are exact."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._generator: torch.Generator | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator, and move what it computed; what it returns of its arguments stays theirs."""
        del types
        made = func(*args, **(kwargs or {}))
        if any(each.alias_info is not None for each in func._schema.returns):
            return made
        return pytree.tree_map(self._moved, made)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if self._generator is None or self._generator.device != value.device:
            self._generator = torch.Generator(value.device).manual_seed(self._seed)
        steps = torch.randint(0, 2, value.shape, generator=self._generator, device=value.device)
        moved = value - value * steps.to(value.dtype) * torch.finfo(value.dtype).eps
        return torch.where(value == value.trunc(), value, moved)
