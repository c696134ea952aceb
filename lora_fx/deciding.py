"""From what a user gives to a Plan: the model is traced, matched and named, and the policy decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import nn

from lora_fx.diffs import refuse_misfit
from lora_fx.errors import PolicyError
from lora_fx.fingerprints import dtype_name
from lora_fx.passes.examples import own_examples
from lora_fx.passes.expect import expect
from lora_fx.passes.fold import base_only
from lora_fx.passes.match import match
from lora_fx.passes.norms import running_statistics
from lora_fx.passes.roles import assign_roles
from lora_fx.passes.trace import Trace, trace
from lora_fx.passes.tree import sites_from_modules
from lora_fx.passes.unsaved import unsaved
from lora_fx.passes.wrapped import refuse_lazy, refuse_parts
from lora_fx.planning import make_plan, restate
from lora_fx.plans import Extra, Plan
from lora_fx.policy import Policy, checked_policy

Model: TypeAlias = nn.Module | Trace
"""What the public functions take: a module, or a trace of one."""


def module_of(source: Any) -> nn.Module:
    """Return the module that a user's model, trace or exported program stands for.

    Raises:
        PolicyError: it is none of these.
    """
    if isinstance(source, Trace):
        return source.model
    if isinstance(source, nn.Module):
        return source
    if hasattr(source, "module") and hasattr(source, "graph_signature"):
        module: nn.Module = source.module()
        return module
    raise PolicyError(
        "the model",
        expected="an nn.Module, a Trace, a GraphModule or an ExportedProgram",
        got=type(source).__name__,
        advice="Pass the model itself.",
    )


def source_of(given: Any) -> Model:
    """Resolve what the user gave, once: an ExportedProgram makes a new module at each asking."""
    return given if isinstance(given, Trace) else module_of(given)


def trace_of(source: Model, example_inputs: Any) -> Trace | None:
    """Return a trace of the *base*, or None where there are no example inputs."""
    model = module_of(source)
    if isinstance(source, Trace):
        if example_inputs is None and not _shows_adapters(source):
            return source
        example_inputs = example_inputs if example_inputs is not None else (source.args, dict(source.kwargs))
    elif example_inputs is None and own_examples(model) is None:
        return None
    with base_only(model):
        return trace(model, example_inputs)


def _shows_adapters(source: Trace) -> bool:
    """Say whether a trace was made of an injected model: then its graph is not the base's."""
    base = {name for name, _ in source.model.named_parameters(remove_duplicate=False)}
    with base_only(source.model):
        base &= {name for name, _ in source.model.named_parameters(remove_duplicate=False)}
    read = {n.meta["parameter"] for n in source.graph.nodes if n.meta.get("parameter") is not None}
    return not read <= base


def plan_of(source: Model, policy: Policy, example_inputs: Any) -> tuple[Plan, Trace | None]:
    """Return what the policy decides about the model, and the trace it was decided on (None: there was none).

    Raises:
        InputError: the model does not run on the example inputs.
        PlanError: a part of the model has adapters of its own, or a parameter has no shape yet.
        PolicyError: a rule matches nothing, or needs a trace where there are no example inputs.
    """
    model, policy = module_of(source), checked_policy(policy)
    refuse_lazy(model)
    refuse_parts(model)
    traced = trace_of(source, example_inputs)
    # What is replayed for roles runs on the CPU, whatever the default device.
    with base_only(model), torch.device("cpu"):
        sites = sites_from_modules(model) if traced is None else assign_roles(traced, match(traced))
        held = _held(model)
        shared = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
        total = sum(p.numel() for p in model.parameters())
        classes = {path: type(m).__name__ for path, m in model.named_modules()}
    decided = make_plan(
        sites,
        policy,
        traced=traced is not None,
        model=type(model).__name__,
        examples=None if traced is None else traced.examples,
        parameters=held,
        base_parameters=total,
        owners=classes,
    )
    decided = replace(decided, extras=_distinct(decided.extras, shared))
    if traced is not None:
        decided = expect(decided, traced)
    moves = None if traced is None else unsaved(model, traced.graph)
    if moves is not None:
        decided = replace(decided, notes=(*decided.notes, moves))
    if policy.norm_stats == "train":
        decided = replace(decided, buffers=running_statistics(model))
    return decided, traced


def fitted(model: nn.Module, planned: Plan, traced: Trace | None) -> Plan:
    """Return a plan that was made elsewhere as it is carried out on this model, as far as its run shows.

    Raises:
        PlanError: it does not fit this model; it says exactly where.
        PolicyError: dropout or a branch is asked for where an adapter is an effective weight here.
    """
    # What is replayed for roles runs on the CPU, whatever the default device.
    with base_only(model), torch.device("cpu"):
        sites = sites_from_modules(model) if traced is None else assign_roles(traced, match(traced))
        held = _held(model)
        buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    refuse_misfit(planned, sites, held, buffers, traced=traced is not None and planned.examples is not None)
    if traced is None:
        return planned
    return expect(restate(planned, sites, type(model).__name__, traced.examples), traced)


def _held(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and dtype of every parameter that can be replaced, by every qualified name."""
    scripted = {path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)}
    return {
        name: (tuple(p.shape), dtype_name(p))
        for name, p in model.named_parameters(remove_duplicate=False)
        if name.rpartition(".")[0] not in scripted
    }


def _distinct(extras: tuple[Extra, ...], identities: Mapping[str, int]) -> tuple[Extra, ...]:
    """Keep one name of each Parameter: a bias of a module with two names is trained and saved once."""
    first = {identities[extra.name]: extra for extra in reversed(extras)}
    return tuple(extra for extra in extras if first[identities[extra.name]] is extra)
