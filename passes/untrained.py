"""Adapters that a training does not train: their optimiser was made before they, or their shards, were.

``inject``, ``parallelize_module`` and ``fully_shard`` put new Parameters into a model; an optimiser made
before holds the old ones, and its steps move nothing of what the model computes with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.notices import warn_user
from lora_fx.passes.switch import require, trained_parameters

_ADVICE = "build it after inject, and after parallelize_module or fully_shard, from lora_fx.parameters(model)"


def warn_unknown(model: nn.Module, optimisers: Iterable[Any]) -> None:
    """Warn where no optimiser holds anything that the active adapter trains.

    Only torch's own kind of optimiser is asked: others may hold copies.
    """
    given = list(optimisers)
    if not given or not all(isinstance(one, torch.optim.Optimizer) for one in given):
        return
    held = {id(p) for one in given for group in one.param_groups for p in group["params"]}
    _, name = require(model, None)
    slow, fast = trained_parameters(model, name)
    wanted = [p for p in (*slow, *fast) if p.requires_grad]
    if wanted and held.isdisjoint(map(id, wanted)):
        warn_user(
            f"the optimiser holds none of the {len(wanted)} parameters of adapter {name!r}, and trains "
            f"nothing of it: {_ADVICE}."
        )


def warn_unchanged(adapter: str, deltas: Mapping[str, float]) -> None:
    """Warn of an adapter that changes no weight: if it was trained, it was by another's optimiser."""
    if deltas and not any(deltas.values()):
        warn_user(
            f"adapter {adapter!r} changes no weight: |W - W0| is 0 for all {len(deltas)}. If it was trained, "
            f"its optimiser held other parameters: {_ADVICE}."
        )
