"""Which weights an adapter changes, and its rule for each: what folding into files needs to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lora_fx.adapter_file import AdapterFile

Effective = Callable[[str, Tensor], Tensor]
"""The effective weight ``W`` of a parameter, from its qualified base name and ``W0``."""

Band = Callable[[str, Tensor, int], Tensor | None]
"""Some entries of ``W`` along axis 0, from those of ``W0`` and the first one's number; None: needs more."""


@dataclass(frozen=True)
class Weights:
    """Which base weights an adapter changes, by qualified name, and what it makes of each.

    ``band`` makes a part of a weight from the same part of ``W0``, for weights that are large.
    """

    names: tuple[str, ...]
    effective: Effective
    plan: str | None = None
    band: Band | None = None


def adapter_weights(file: AdapterFile) -> Weights:
    """Return which weights an adapter file changes, and its rule for each."""
    names = [decision.name for decision in (*file.plan.adapted, *file.plan.trained)]
    names += [*(extra.name for extra in file.plan.extras), *file.plan.buffers]
    return Weights(tuple(names), file.effective, file.plan.to_json(), file.effective_band)
