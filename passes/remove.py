"""Remove: take adapters out again, so that the model is what it was: classes, flags, bits."""

from __future__ import annotations

from torch import fx, nn

from lora_fx.passes import graph_module
from lora_fx.passes.managed import forget_removed, refuse_unknown_sharding
from lora_fx.passes.registers import own_buffers, own_parameters, plain
from lora_fx.passes.root import unwatch
from lora_fx.passes.runtime import BINDING, INJECTED, binding, injected
from lora_fx.passes.sharded import reshard
from lora_fx.passes.subclass import attach, detach
from lora_fx.passes.switch import apply_trainability, record_of, require


def unload(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Take one adapter out of the model, or all of them; the last one restores it entirely.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
        WrappedModelError: the model is sharded by a ``fully_shard`` that is not known.
    """
    record = record_of(model)
    refuse_unknown_sharding(model, "unload")
    reshard(model)
    names = list(record.plans) if adapter is None else [adapter]
    for name in names:
        require(model, name)
        remove(model, name)
    forget_removed(model)
    return model


def remove(model: nn.Module, adapter: str) -> None:
    """Take one adapter's Parameters, properties and record out; restore the model after the last."""
    record = injected(model)
    if record is None:
        return
    last = set(record.plans) <= {adapter}
    if last and isinstance(model, fx.GraphModule):
        graph_module.restore_graph(model, record)
    for module in list(model.modules()):
        held = binding(module)
        if held is None:
            continue
        _drop(module, adapter)
        if last:
            held.frozen_norm = held.root = False
        held.sites = {name: specs for name, specs in held.sites.items() if specs}
        held.branched = {name: how for name, how in held.branched.items() if name in held.sites}
        detach(module)
        if held.sites or held.frozen_norm or held.root:
            attach(module)
        else:
            del module.__dict__[BINDING]
    record.plans.pop(adapter, None)
    record.ties.pop(adapter, None)
    record.trainable.pop(adapter, None)
    record.halves.pop(adapter, None)
    if record.state.active == adapter:
        record.state.active = next(iter(record.plans), None)
    if last:
        unwatch(model)
        _restore_flags(model, record.flags)
        del model.__dict__[INJECTED]
    else:
        apply_trainability(model, record)


def _drop(module: nn.Module, adapter: str) -> None:
    held = module.__dict__[BINDING]
    for specs in held.sites.values():
        spec = specs.pop(adapter, None)
        if spec is not None:
            for name in spec.names:
                own_parameters(module).pop(name, None)
                own_buffers(module).pop(name, None)


def _restore_flags(model: nn.Module, flags: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if plain(name) in flags:
            parameter.requires_grad_(flags[plain(name)])
