"""A GraphModule or an exported program's module is rewritten in its own graph."""

from __future__ import annotations

import copy

from torch import fx

from lora_fx.passes.runtime import Injected, binding, branchable
from lora_fx.passes.stock_forward import rewrite


def rewrite_graph(model: fx.GraphModule, record: Injected) -> frozenset[str]:
    """Replace, in the user's graph, every call on an adapted weight that has a branch; return these weights.

    Other reads of the weight go through the owner's property, so nothing is lost where there is none.
    """
    if record.graph is None:
        record.graph = copy.deepcopy(model.graph)
    else:
        model.graph = copy.deepcopy(record.graph)
    adapted = {
        f"{path}.{name}" if path else name: how
        for path, module in model.named_modules(remove_duplicate=False)
        if (held := binding(module)) is not None
        for name, how in branchable(held).items()
    }
    done = rewrite(model.graph, adapted)
    model.recompile()
    return done


def restore_graph(model: fx.GraphModule, record: Injected) -> None:
    """Give the module its own graph back."""
    if record.graph is not None:
        model.graph = record.graph
        model.recompile()
        record.graph = None
