"""Copies and pickles of injected graph modules: the base graph is copied, and adapted anew.

torch.fx copies of a module only what its graph names, so that adapters and records would be lost.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from lora_fx.errors import PlanError
from lora_fx.passes.runtime import AdapterState, Injected, injected

if TYPE_CHECKING:
    from lora_fx.plans import Plan


@dataclass(frozen=True)
class _Adapters:
    """All that an injected model has beside its base."""

    plans: Mapping[str, Plan]
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: AdapterState
    trainable: Mapping[str, bool]
    flags: Mapping[str, bool]
    probe: str


def deepcopy_graph(self: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    """Copy a graph module with its adapters.

    Raises:
        PlanError: the graph module is a part of an injected model, and not the model itself.
    """
    adapters = copy.deepcopy(_adapters(self), memo)
    return _adapted(_base_copy(self, memo), adapters)


def reduce_graph(self: fx.GraphModule, protocol: Any) -> tuple[Any, ...]:
    """Pickle a graph module as its base and its adapters."""
    del protocol
    return _adapted, (_base_copy(self, {}), _adapters(self))


def _base_copy(model: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    from lora_fx.passes.fold import base_only

    with base_only(model):
        return copy.deepcopy(model, memo)


def _adapters(model: fx.GraphModule) -> _Adapters:
    from lora_fx.passes.states import adapter_state

    record = _record(model)
    return _Adapters(
        plans=dict(record.plans),
        tensors={name: adapter_state(model, name) for name in record.plans},
        state=replace(record.state),
        trainable=dict(record.trainable),
        flags=dict(record.flags),
        probe=record.probe,
    )


def _adapted(base: fx.GraphModule, adapters: _Adapters) -> fx.GraphModule:
    from lora_fx.passes.insert import insert
    from lora_fx.passes.states import load_adapter_state
    from lora_fx.passes.switch import apply_trainability

    for name, plan in adapters.plans.items():
        insert(base, plan, name, seed=0)
        load_adapter_state(base, adapters.tensors[name], name)
    record = _record(base)
    vars(record.state).update(vars(adapters.state))
    record.trainable.update(adapters.trainable)
    record.flags = dict(adapters.flags)
    record.probe = adapters.probe
    apply_trainability(base, record)
    return base


def _record(model: fx.GraphModule) -> Injected:
    record = injected(model)
    if record is None:
        raise PlanError(
            f"a {type(model).__name__} inside the model",
            expected="an injected graph module to be copied by itself",
            got="a copy of what it lies in, which would lose its adapters",
            advice="Copy the model before inject, and load the adapter into the copy.",
        )
    return record
