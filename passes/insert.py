"""Insert: rewrite the model by the Plan. Nothing is decided here.

Every adapted weight gets its A and B as Parameters on each module that owns it, and each owner the
dynamic subclass through which it reads ``W`` and, where its forward is stock, computes the branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lora_fx.errors import AdapterNameError, PlanError
from lora_fx.kinds import KINDS
from lora_fx.kinds.effective import row_norms
from lora_fx.kinds.producers import remember_norms
from lora_fx.matrix import MatrixForm
from lora_fx.passes import graph_module
from lora_fx.passes.initialise import adapter_dtype, as_parameter, start
from lora_fx.passes.made import as_made
from lora_fx.passes.norms import freeze_norms
from lora_fx.passes.overlapping import refuse_overlapping
from lora_fx.passes.registers import own_parameters, plain
from lora_fx.passes.remove import remove
from lora_fx.passes.root import watch
from lora_fx.passes.runtime import (
    BINDING,
    INJECTED,
    AdapterState,
    Binding,
    Injected,
    PartSpec,
    SiteSpec,
    binding,
    branchable,
    injected,
    raw,
)
from lora_fx.passes.stock_forward import rewrite, stock_home, trace_stock
from lora_fx.passes.subclass import attach, constants, own_class
from lora_fx.passes.switch import apply_trainability
from lora_fx.passes.unsaved import buffer_prints
from lora_fx.passes.wrapped import refuse_lazy
from lora_fx.plans import Decision, Plan


@dataclass(frozen=True)
class Owner:
    """One module that holds a weight, under one attribute name."""

    module: nn.Module
    attribute: str


Owners = Mapping[str, tuple[Owner, ...]]


def owners(model: nn.Module) -> Owners:
    """Return every module that holds each parameter, by every qualified name, tied ones included."""
    held: dict[int, list[Owner]] = {}
    names: dict[str, int] = {}
    seen: set[tuple[int, str]] = set()
    for wrapped, module in model.named_modules(remove_duplicate=False):
        path = plain(wrapped)
        for attribute, parameter in own_parameters(module).items():
            if parameter is None:
                continue
            names[f"{path}.{attribute}" if path else attribute] = id(parameter)
            if (id(module), attribute) not in seen:
                seen.add((id(module), attribute))
                held.setdefault(id(parameter), []).append(Owner(module, attribute))
    return {name: tuple(held[key]) for name, key in names.items()}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every base parameter and buffer by every qualified name, adapters left out."""
    added = {
        (id(module), name)
        for module in model.modules()
        if (held := binding(module)) is not None
        for specs in held.sites.values()
        for spec in specs.values()
        for name in spec.names
    }
    parameters = {
        name: raw(held[0].module, held[0].attribute)
        for name, held in owners(model).items()
        if not any((id(o.module), o.attribute) in added for o in held)
    }
    buffers = {plain(name): buffer for name, buffer in model.named_buffers(remove_duplicate=False)}
    return {**buffers, **parameters}


def insert(model: nn.Module, plan: Plan, adapter: str, seed: int | None = None) -> None:
    """Rewrite the model, in place, so that it trains the plan's adapters under this name.

    The first adapter of a model is active, later ones are added inactive. On an error the model is
    left as it was.

    Raises:
        AdapterNameError: there is an adapter of this name, or it cannot be part of a parameter's name.
        PlanError: the plan does not fit the model.
    """
    record = injected(model)
    check_name(adapter, record)
    refuse_lazy(model)
    holders = owners(model)
    check_fit(model, plan, holders)
    try:
        if record is None:
            record = _new_record(model)
        record.plans[adapter] = plan
        record.ties[adapter] = _ties(plan, holders)
        record.trainable[adapter] = True
        _rewrite(model, plan, adapter, record, holders, generator_of(seed))
        if record.state.active is None:
            record.state.active = adapter
        apply_trainability(model, record)
        remember_norms(model)
    except BaseException:
        remove(model, adapter)
        raise


def check_name(adapter: str, record: Injected | None) -> None:
    """Refuse a name that is taken or that cannot be part of a parameter's name."""
    if record is not None and adapter in record.plans:
        raise AdapterNameError(
            f"adapter {adapter!r}",
            expected="a name that the model does not have yet",
            got=f"adapters {sorted(record.plans)}",
            advice="Choose another name, unload this adapter first, or load over it with replace=True.",
        )
    if not adapter or not adapter.replace("-", "_").isidentifier() or "__" in adapter:
        raise AdapterNameError(
            f"adapter {adapter!r}",
            expected="letters, digits, single underscores and hyphens, not starting with a digit",
            got=repr(adapter),
            advice="Rename the adapter.",
        )


def check_fit(model: nn.Module, plan: Plan, holders: Owners) -> None:
    """Refuse a plan whose parameters the model does not have, has in another shape, or cannot be written."""
    wanted = {d.name: d.site.shape for d in (*plan.adapted, *plan.trained)}
    wanted.update({e.name: e.shape for e in plan.extras})
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    problems = [f"buffer {name} is not there" for name in plan.buffers if name not in buffers]
    for name, shape in wanted.items():
        if name not in holders:
            problems.append(f"{name} is not there")
            continue
        if any(isinstance(owner.module, torch.jit.ScriptModule) for owner in holders[name]):
            problems.append(f"{name} is held by a module that TorchScript compiled")
        owner = holders[name][0]
        found = tuple(raw(owner.module, owner.attribute).shape)
        if found != tuple(shape):
            problems.append(f"{name} is {found}, planned {tuple(shape)}")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise PlanError(
            "the plan",
            expected="every planned parameter in the model, in the planned shape",
            got=shown,
            advice="Make the plan on this model, or load the model that the plan was made on.",
        )
    first = {name: holders[name][0] for name in wanted}
    refuse_overlapping({name: raw(owner.module, owner.attribute) for name, owner in first.items()})


def _new_record(model: nn.Module) -> Injected:
    record = Injected(AdapterState())
    record.buffers = buffer_prints(model)
    record.flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    model.__dict__[INJECTED] = record
    bind(model, record.state).root = True
    watch(model)
    return record


def _ties(plan: Plan, holders: Owners) -> tuple[tuple[str, ...], ...]:
    """Return all names of every planned weight that has several."""
    wanted = {d.name for d in (*plan.adapted, *plan.trained)} | {e.name for e in plan.extras}
    names: dict[int, list[str]] = {}
    for name, held in holders.items():
        names.setdefault(id(raw(held[0].module, held[0].attribute)), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1 and wanted.intersection(group))


def generator_of(seed: int | None) -> torch.Generator:
    """Seed from the caller's number, or from torch's own random state, which moves by one draw."""
    seed = int(torch.randint(2**62, (1,), device="cpu").item()) if seed is None else seed
    return torch.Generator().manual_seed(seed)


def _rewrite(
    model: nn.Module,
    plan: Plan,
    adapter: str,
    record: Injected,
    holders: Owners,
    generator: torch.Generator,
) -> None:
    touched: dict[int, nn.Module] = {id(model): model}
    for decision in (*plan.adapted, *plan.trained):
        _add(holders[decision.name], decision, adapter, record, generator)
        touched.update({id(o.module): o.module for o in holders[decision.name]})
    for extra in plan.extras:
        _add(holders[extra.name], None, adapter, record, generator)
        touched.update({id(o.module): o.module for o in holders[extra.name]})
    for name in plan.buffers:
        module = _add_buffer(model, name, adapter, record)
        touched[id(module)] = module
    for module in touched.values():
        choose_branches(module)
        attach(module)
    own = graph_module.rewrite_graph(model, record) if isinstance(model, fx.GraphModule) else frozenset()
    freeze_norms(model, record.state)
    branched = own.union(n for n, held in holders.items() if any(_has_branch(owner) for owner in held))
    cls = own_class(model).__name__
    record.plans.update({name: as_made(plan, branched, cls) for name, plan in record.plans.items()})


def _has_branch(owner: Owner) -> bool:
    held = binding(owner.module)
    return held is not None and owner.attribute in held.branched


def _add(
    held: tuple[Owner, ...],
    decision: Decision | None,
    adapter: str,
    record: Injected,
    generator: torch.Generator,
) -> None:
    """Register one weight's adapter on every owner: the same Parameters, so that they stay tied."""
    tensors = first_values(decision, raw(held[0].module, held[0].attribute), generator)
    for owner in held:
        names = {key: own_name(key, owner.attribute, adapter) for key in tensors}
        for key, parameter in tensors.items():
            owner.module.register_parameter(names[key], parameter)
        spec = _spec(decision, names)
        bound = bind(owner.module, record.state)
        bound.sites.setdefault(owner.attribute, {})[adapter] = spec
        if len(held) > 1:
            bound.shared.add(owner.attribute)


def own_name(key: str, attribute: str, adapter: str) -> str:
    """Return the name, on the weight's owner, of one of an adapter's Parameters or buffers."""
    return f"lora_{key}__{attribute}__{adapter}"


def first_values(
    decision: Decision | None, weight: Tensor, generator: torch.Generator
) -> dict[str, nn.Parameter]:
    """Return what an adapter of one weight starts from, by key; without a decision it is trained whole."""
    if decision is None or decision.action == "train":
        return {"full": as_parameter(weight.detach().to(adapter_dtype(weight.dtype)))}
    return _adapter_tensors(decision, weight, generator)


def _add_buffer(model: nn.Module, name: str, adapter: str, record: Injected) -> nn.Module:
    """Give the adapter its own copy of a buffer; the base's is left alone."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    copied = own_name("full", attribute, adapter)
    module.register_buffer(copied, raw(module, attribute).detach().clone())
    spec = SiteSpec(form=None, full=copied, buffer=True)
    bind(module, record.state).sites.setdefault(attribute, {})[adapter] = spec
    return module


def bind(module: nn.Module, state: AdapterState) -> Binding:
    """Return the module's Binding, making an empty one where there is none."""
    held = binding(module)
    if held is None:
        held = Binding(state, type(module))
        module.__dict__[BINDING] = held
    return held


def part_key(role: str | None, field: str) -> str:
    """Return the key of a part's tensor: ``A``, or ``A_q`` for the part of a role."""
    return field if role is None else f"{field}_{role.replace('+', '_')}"


def _adapter_tensors(
    decision: Decision, weight: Tensor, generator: torch.Generator
) -> dict[str, nn.Parameter]:
    tensors: dict[str, nn.Parameter] = {}
    for part in decision.parts:
        begin = start(decision, part, weight, generator)
        tensors[part_key(part.role, "A")] = as_parameter(begin.a)
        tensors[part_key(part.role, "B")] = as_parameter(begin.b)
        if begin.frozen:
            tensors[part_key(part.role, "A0")] = as_parameter(begin.a, trainable=False)
            tensors[part_key(part.role, "B0")] = as_parameter(begin.b, trainable=False)
    if decision.dora:
        wide = weight.detach().to(adapter_dtype(weight.dtype))
        tensors["magnitude"] = as_parameter(row_norms(wide, decision.site.form))
    return tensors


def _spec(decision: Decision | None, names: Mapping[str, str]) -> SiteSpec:
    if decision is None or decision.action == "train":
        return SiteSpec(form=None, full=names["full"])
    parts = tuple(
        PartSpec(
            a=names[part_key(part.role, "A")],
            b=names[part_key(part.role, "B")],
            rows=part.rows,
            start_a=names.get(part_key(part.role, "A0")),
            start_b=names.get(part_key(part.role, "B0")),
        )
        for part in decision.parts
    )
    form: MatrixForm = decision.site.form
    magnitude, compute = names.get("magnitude"), decision.compute
    return SiteSpec(form, parts, decision.scale, decision.dropout, magnitude=magnitude, compute=compute)


def choose_branches(module: nn.Module) -> None:
    """Note which of the module's adapted weights its stock forward can compute as branches."""
    held: Binding = module.__dict__[BINDING]
    held.branched = {}
    forms = branchable(held)
    if not forms or held.frozen_norm:
        return
    # Modules alike in all that tracing would bake in are traced once.
    key = (held.base_class, frozenset(forms.items()), constants(module))
    if key not in _branched:
        stock = stock_home(held.base_class) is not None and _has_stock_weight(module, forms)
        _branched[key] = rewrite(trace_stock(module, held.base_class), forms) if stock else frozenset()
    held.branched = {name: how for name, how in forms.items() if name in _branched[key]}


def _has_stock_weight(module: nn.Module, names: Iterable[str]) -> bool:
    """Say whether a stock forward reads one of these itself, and not what a hook makes of them."""
    owned = {name for kind in KINDS for name in kind.owned(module)}
    return not owned.isdisjoint(names)


_branched: dict[tuple[Any, ...], frozenset[str]] = {}
