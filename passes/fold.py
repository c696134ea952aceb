"""Fold: the effective weights in the base's place, for a while or for good.

The delta is added in float32 or wider, once, out of place, and cast once; ``W0`` is never recovered
by subtraction. Inside ``folded`` and ``base_only`` the modules run their original classes and
forwards, so what is exported there is the base model's own graph.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lora_fx.errors import WrappedModelError
from lora_fx.fingerprints import dtype_name
from lora_fx.kinds.spread import is_sharded
from lora_fx.passes.changes import Change, changes, refuse_rounded_away, sums_and_changes
from lora_fx.passes.managed import refuse_unknown_sharding
from lora_fx.passes.registers import module_at, own_buffers, own_parameters
from lora_fx.passes.remove import unload
from lora_fx.passes.runtime import BINDING, INJECTED, Binding, Injected, binding, injected
from lora_fx.passes.sharded import local, reshard
from lora_fx.passes.subclass import attach, detach
from lora_fx.passes.switch import require


@contextmanager
def folded(model: nn.Module, adapter: str | None = None) -> Generator[nn.Module]:
    """Inside, the model is the base model with ``W`` in place of ``W0``; bitwise restored afterwards.

    Normalisations that are frozen in the injected model stay frozen, so that the function is the
    injected model's in train mode too.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
        AdapterValueError: an adapter holds NaN or infinity.
    """
    _, name = require(model, adapter)
    new = {n: change.after for change in changes(model, name).values() for n in change.names}
    with _as_base(model, new, name):
        yield model


@contextmanager
def base_only(model: nn.Module, adapter: str | None = None) -> Generator[nn.Module]:
    """Inside, the model is the base model: original classes, forwards and parameters, no adapters.

    Frozen normalisations stay frozen, but for those whose statistics this adapter has its own copy of.
    """
    with _as_base(model, {}, adapter):
        yield model


@dataclass
class _Held:
    """What one module is put back to."""

    module: nn.Module
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    binding: Any


@contextmanager
def _as_base(model: nn.Module, weights: Mapping[str, Tensor], adapter: str | None) -> Generator[None]:
    record = injected(model)
    if record is None:
        yield
        return
    reshard(model)
    saved = [
        _Held(module, dict(own_parameters(module)), dict(own_buffers(module)), held)
        for module in model.modules()
        if (held := binding(module)) is not None
    ]
    written: list[tuple[Tensor, Tensor]] = []
    try:
        _strip(model, saved, record, adapter)
        _place(model, weights, written)
        yield
    finally:
        reshard(model)
        for shard, bits in written:
            shard.copy_(bits)
        _restore(model, saved, record)


def _strip(model: nn.Module, saved: list[_Held], record: Injected, adapter: str | None) -> None:
    del model.__dict__[INJECTED]
    if isinstance(model, fx.GraphModule) and record.graph is not None:
        model.graph, record.graph = record.graph, model.graph
        model.recompile()
    for held in saved:
        module = held.module
        detach(module)
        del module.__dict__[BINDING]
        moves = adapter in held.binding.sites.get("running_mean", {})
        if held.binding.frozen_norm and not moves:
            module.__dict__[BINDING] = Binding(record.state, held.binding.base_class, frozen_norm=True)
            attach(module)
        for specs in held.binding.sites.values():
            for spec in specs.values():
                for name in spec.names:
                    own_parameters(module).pop(name, None)
                    own_buffers(module).pop(name, None)


def _place(model: nn.Module, weights: Mapping[str, Tensor], written: list[tuple[Tensor, Tensor]]) -> None:
    """Put weights in place of the base's: as new Parameters, or into the very shards.

    FSDP2 gathers from the shards that it knows: there, what was written and its old bits are noted.
    """
    shared: dict[int, nn.Parameter] = {}
    sharded: set[int] = set()
    for name, weight in weights.items():
        path, _, attribute = name.rpartition(".")
        module = module_at(model, path)
        if attribute in own_buffers(module):
            own_buffers(module)[attribute] = weight.clone()
            continue
        old = own_parameters(module)[attribute]
        if old is not None and is_sharded(old):
            if id(old) not in sharded:
                sharded.add(id(old))
                written.append((local(old), local(old).clone()))
                local(old).copy_(local(weight))
            continue
        if id(weight) not in shared:
            shared[id(weight)] = nn.Parameter(
                weight, requires_grad=bool(old is not None and old.requires_grad)
            )
        own_parameters(module)[attribute] = shared[id(weight)]


def _restore(model: nn.Module, saved: list[_Held], record: Injected) -> None:
    model.__dict__[INJECTED] = record
    for held in saved:
        own_parameters(held.module).clear()
        own_parameters(held.module).update(held.parameters)
        own_buffers(held.module).clear()
        own_buffers(held.module).update(held.buffers)
        held.module.__dict__[BINDING] = held.binding
        attach(held.module)
    if isinstance(model, fx.GraphModule) and record.graph is not None:
        model.graph, record.graph = record.graph, model.graph
        model.recompile()


def fold(model: nn.Module, adapter: str | None = None, *, min_retained: float = 0.25) -> nn.Module:
    """Put ``W`` in the base's place for good and take all adapters out (peft: merge_and_unload).

    ``min_retained`` is the smallest share of a delta that a half-precision weight must keep of it.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
        AdapterValueError: an adapter holds NaN or infinity, or is rounded away by the weight's dtype;
            the model is left as it was.
        WrappedModelError: the model is sharded by a ``fully_shard`` that is not known, or has a sharded
            weight that others read with another adapter.
    """
    _, name = require(model, adapter)
    refuse_unknown_sharding(model, "fold")
    reshard(model)
    sums, others = sums_and_changes(model, name)
    _refuse_shared_shards(others.values())
    refuse_rounded_away(
        ((c.names[0], dtype_name(c.after), c.retained) for c in others.values()), min_retained
    )
    unload(model)
    # Nothing below can fail: every value was checked, so the base is written to where it lies.
    with torch.no_grad():
        for each in sums:
            each.add()
        for change in others.values():
            _write(model, change)
    return model


def _refuse_shared_shards(found: Iterable[Change]) -> None:
    """Refuse a sharded weight that must stay as it is for others: FSDP2 knows one Parameter of it.

    Raises:
        WrappedModelError: there is one.
    """
    for change in found:
        if change.apart and is_sharded(change.before):
            raise WrappedModelError(
                change.names[0],
                expected="a sharded weight that is read with one adapter everywhere",
                got="one that was tied after inject, and is read without it too",
                advice="Tie before inject, or save the adapter and fold it unsharded.",
            )


def _write(model: nn.Module, change: Change) -> None:
    """Write ``W`` to where ``W0`` lies, so that lists of references (a recurrence's) stay true.

    Where that memory cannot be written to, or is read by others too, the parameter is replaced. Of a
    sharded weight every process has gathered ``W`` and writes its own shard.
    """
    lies = change.before
    repeated = any(step == 0 and size > 1 for step, size in zip(lies.stride(), lies.shape, strict=True))
    if change.apart or type(lies) is not Tensor or lies.is_inference() or repeated:
        _place(model, dict.fromkeys(change.names, change.after), [])
    else:
        lies.copy_(change.after)
