"""An adapter's live tensors by name, its first values anew, and models that start without memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_fx.errors import AdapterFileError
from lora_fx.passes.insert import first_values, generator_of, own_name
from lora_fx.passes.registers import module_at, own_buffers, own_parameters
from lora_fx.passes.runtime import raw
from lora_fx.passes.sharded import fill, reshard, whole
from lora_fx.passes.switch import adapter_sites, require


def adapter_state(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """Return an adapter's tensors, frozen starts and buffers too, sharing memory with the model.

    The names are those of ``model.state_dict()``; a tied adapter is there once. Sharded ones are DTensors.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
    """
    _, name = require(model, adapter)
    reshard(model)
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module, _, spec in adapter_sites(model, name):
        for key in spec.names:
            tensor = raw(module, key)
            found.setdefault(id(tensor), (f"{path}.{key}" if path else key, tensor.detach()))
    return dict(found.values())


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], adapter: str | None = None) -> None:
    """Write tensors of these names into an adapter, in place; other names are left unread.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
        AdapterFileError: a tensor of the adapter is missing, or has another shape; nothing is written.
    """
    own = adapter_state(model, adapter)
    wrong = [k for k, t in own.items() if k not in state or state[k].shape != t.shape]
    if wrong:
        raise AdapterFileError(
            wrong[0],
            expected=f"{len(own)} tensors of the adapter, in their shapes",
            got=f"{len(wrong)} missing or of another shape",
            advice="Inject the plan that the state was saved under, with the same adapter name.",
        )
    for key, tensor in own.items():
        fill(tensor, whole(state[key]))


def reset_adapter(model: nn.Module, adapter: str | None = None, seed: int | None = None) -> None:
    """Give an adapter its first values again: with inject's seed, those that inject gave it.

    On a sharded model every process must call this, with the same seed.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
    """
    record, name = require(model, adapter)
    plan = record.plans[name]
    reshard(model)
    generator = generator_of(seed)
    decided = [(d.name, d) for d in (*plan.adapted, *plan.trained)]
    for weight, decision in (*decided, *((e.name, None) for e in plan.extras)):
        path, _, attribute = weight.rpartition(".")
        module = module_at(model, path)
        base = whole(raw(module, attribute).detach())
        for key, value in first_values(decision, base, generator).items():
            fill(raw(module, own_name(key, attribute, name)), value.detach())
    for buffer in plan.buffers:
        path, _, attribute = buffer.rpartition(".")
        module = module_at(model, path)
        fill(raw(module, own_name("full", attribute, name)), whole(raw(module, attribute)))


def materialise(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Give a model on the meta device memory, uninitialised; what was tied stays tied.

    ``Module.to_empty`` alone unties every weight (and adapter) that several modules hold.
    """
    tied: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in (*own_parameters(module).items(), *own_buffers(module).items()):
            if tensor is not None:
                tied.setdefault(id(tensor), []).append((module, name))
    model.to_empty(device=torch.device(device))
    for (first, first_name), *others in tied.values():
        for module, name in others:
            if first_name in own_parameters(first):
                own_parameters(module)[name] = own_parameters(first)[first_name]
            else:
                own_buffers(module)[name] = own_buffers(first)[first_name]
    return model
