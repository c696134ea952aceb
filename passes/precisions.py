"""The precisions that a model's numbers go through: what a comparison of two runs may ask for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from lora_fx.passes.runtime import injected, raw
from lora_fx.passes.switch import adapter_sites
from lora_fx.plans import Plan

_HALVES = frozenset({torch.float16, torch.bfloat16})


def tolerance_of(table: Mapping[torch.dtype, float], *dtypes: torch.dtype) -> float:
    """Return what the coarsest of the dtypes that a number went through allows."""
    return max(table.get(dtype, table[torch.float32]) for dtype in dtypes)


def dtypes_through(model: nn.Module, adapter: str) -> frozenset[torch.dtype]:
    """Return the dtypes that what an adapter changes goes through: its weights' own, and halves after them.

    These are the ones that the run at ``inject`` showed, and what autocast asks for now.
    """
    sites = [raw(m, name) for _, m, name, spec in adapter_sites(model, adapter) if not spec.buffer]
    devices = {weight.device.type for weight in sites} - {"meta"}
    cast = {torch.get_autocast_dtype(d) for d in devices if torch.is_autocast_enabled(d)}
    record = injected(model)
    seen = frozenset[torch.dtype]() if record is None else record.halves.get(adapter, frozenset())
    return frozenset({weight.dtype for weight in sites}) | cast | seen


def halves_after(graph: fx.Graph, plan: Plan) -> frozenset[torch.dtype]:
    """Return the half precisions among the recorded results that depend on a planned weight."""
    decided = (*plan.adapted, *plan.trained)
    names = {name for d in decided for name in (d.name, *d.site.names)} | {e.name for e in plan.extras}
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        if node.meta.get("parameter") in names or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return _HALVES & {node.meta.get("dtype") for node in reached}
