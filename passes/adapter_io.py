"""Between a model and an adapter file: collect an adapter's tensors, or put them in."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lora_fx.adapter_file import FROZEN_STARTS, AdapterFile, tensor_key
from lora_fx.errors import PlanError
from lora_fx.fingerprints import BaseCheck, Fingerprint, fingerprint
from lora_fx.passes.extent import deltas
from lora_fx.passes.insert import base_tensors, insert
from lora_fx.passes.norms import refuse_converted
from lora_fx.passes.registers import module_at, own_buffers, own_parameters, plain
from lora_fx.passes.replaced import made_one
from lora_fx.passes.runtime import Binding, Injected, binding, raw
from lora_fx.passes.sharded import Gathered, fill, reshard, whole
from lora_fx.passes.switch import apply_trainability, record_of, require
from lora_fx.plans import Plan


def collect(model: nn.Module, adapter: str) -> AdapterFile:
    """Return an adapter of the model as it would lie in a file.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
        PlanError: a module that the plan adapted was replaced after inject.
        WrappedModelError: a frozen normalisation was replaced by a synchronised one.
    """
    record, name = require(model, adapter)
    refuse_converted(model)
    reshard(model)
    plan = record.plans[name]
    for kept, other in made_one(model, plan):
        raise PlanError(
            f"{kept} and {other}",
            expected="two weights, each with its adapter, as the plan has them",
            got="one module in both places: it was put there after inject",
            advice="Put each module back, or call lora_fx.unload and inject again.",
        )
    tensors = _apart({key: whole(tensor.detach()) for key, tensor in _tensors(model, plan, name)})
    changed = [d.name for d in (*plan.adapted, *plan.trained)] + [e.name for e in plan.extras]
    prints = {weight: _fingerprint(record, weight, *_owner(model, weight)) for weight in changed}
    prints |= {buffer: _fingerprint(record, buffer, *_owner(model, buffer)) for buffer in plan.buffers}
    on_meta = any(tensor.device.type == "meta" for tensor in tensors.values())
    ties = _ties(model, [*(e.name for e in plan.extras), *plan.buffers])
    return AdapterFile(plan, prints, tensors, {} if on_meta else deltas(model, name), ties)


def _ties(model: nn.Module, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Return the other names of these parameters and buffers, of those that have some."""
    every: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in (*own_parameters(module).items(), *own_buffers(module).items()):
            if tensor is not None:
                every.setdefault(id(tensor), []).append(plain(f"{path}.{attribute}" if path else attribute))
    found = {name: tied for tied in every.values() if len(tied) > 1 for name in tied}
    return {name: tuple(n for n in found[name] if n != name) for name in names if name in found}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy what is another's very tensor: a Parameter that was put in two places after inject."""
    first: dict[int, str] = {}
    return {
        key: tensor if first.setdefault(tensor.untyped_storage().data_ptr(), key) == key else tensor.clone()
        for key, tensor in tensors.items()
    }


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module_at(model, path), attribute


def _tensors(model: nn.Module, plan: Plan, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the file, Parameter) of everything that an adapter holds."""
    for decision in plan.adapted:
        module, attribute = _owner(model, decision.name)
        spec = _binding(module).sites[attribute][adapter]
        for part, names in zip(decision.parts, spec.parts, strict=True):
            fields = {"A": names.a, "B": names.b, "A_start": names.start_a, "B_start": names.start_b}
            for key, parameter in fields.items():
                if parameter is not None:
                    yield tensor_key(decision.name, part.role, key), raw(module, parameter)
        if spec.magnitude is not None:
            yield tensor_key(decision.name, None, "magnitude"), raw(module, spec.magnitude)
    for name in [d.name for d in plan.trained] + [e.name for e in plan.extras]:
        module, attribute = _owner(model, name)
        full = _binding(module).sites[attribute][adapter].full
        if full is not None:
            yield tensor_key(name, None, "full"), raw(module, full)
    for name in plan.buffers:
        module, attribute = _owner(model, name)
        copied = _binding(module).sites[attribute][adapter].full
        if copied is not None:
            yield tensor_key(name, None, "buffer"), raw(module, copied)


def _binding(module: nn.Module) -> Binding:
    held = binding(module)
    if held is None:
        raise PlanError(
            type(module).__name__,
            expected="the module that the plan says was adapted",
            got="one without adapters: it was put there after inject",
            advice="Put the adapted module back, or call lora_fx.unload and inject again.",
        )
    return held


def _fingerprint(record: Injected, name: str, module: nn.Module, attribute: str) -> Fingerprint:
    """Return the fingerprint of a base weight, computed anew only where the weight was written to."""
    weight = raw(module, attribute)
    stamp = (id(weight), weight._version, weight.device)
    known = record.fingerprints.get(name)
    if known is None or known[0] != stamp:
        known = (stamp, fingerprint(whole(weight.detach())))
        record.fingerprints[name] = known
    return known[1]


def install(model: nn.Module, file: AdapterFile, adapter: str, *, trainable: bool) -> None:
    """Inject the file's plan under this name and fill it with the file's tensors.

    Raises:
        AdapterNameError: the name is taken.
        PlanError: the plan does not fit the model.
        AdapterFileError: a tensor has another shape than the plan says; the model is left as it was.
    """
    file.check_shapes()
    insert(model, file.plan, adapter, seed=0)
    for key, parameter in _tensors(model, file.plan, adapter):
        fill(parameter, file.tensors[key])
    record = record_of(model)
    record.trainable[adapter] = trainable
    apply_trainability(model, record)


def refill(
    model: nn.Module, file: AdapterFile, adapter: str, *, trainable: bool | None, base_check: BaseCheck
) -> None:
    """Fill an adapter that the model has with a file's tensors, in place; the model may be wrapped.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
        PlanError: the file's adapter changes other weights, or in another way.
        BaseMismatchError: the adapter was trained on another base.
        AdapterFileError: a tensor has another shape than the plan says; the model is left as it was.
    """
    record, name = require(model, adapter)
    here, there = _changes(record.plans[name]), _changes(file.plan)
    other = sorted({w for w, _ in here ^ there})
    if other:
        raise PlanError(
            f"adapter {name!r}",
            expected="a file of an adapter of the same plan",
            got=f"{len(other)} weights that are adapted otherwise ({', '.join(other[:3])})",
            advice="Load it under another name, or unload this adapter first.",
        )
    file.check_shapes()
    reshard(model)
    file.check_base(Gathered(base_tensors(model)), base_check)
    for key, parameter in _tensors(model, record.plans[name], name):
        fill(parameter, file.tensors[key])
    if trainable is not None:
        record.trainable[name] = trainable
    apply_trainability(model, record)


def _changes(plan: Plan) -> set[tuple[str, str]]:
    """Return every weight that a plan changes, with all that decides how."""
    found = {
        (d.name, repr((d.site.form, d.parts, d.scale, d.dora, d.init in FROZEN_STARTS))) for d in plan.adapted
    }
    whole_ones = [*(d.name for d in plan.trained), *(e.name for e in plan.extras), *plan.buffers]
    return found | {(name, "whole") for name in whole_ones}
