"""Verify: the invariant, checked on this model.

The injected model, with random adapters, against the same model with its weights replaced: outputs,
and gradients with respect to the adapters, on the example inputs, on other values and on another
batch size, in train and in eval. Everything is put back.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import InputError
from lora_fx.passes.changes import weight_key
from lora_fx.passes.comparing import gradients_compared, outputs_compared, size, within_rounding
from lora_fx.passes.examples import own_copy
from lora_fx.passes.fold import folded
from lora_fx.passes.moved import note_written, written_in
from lora_fx.passes.onnx_inputs import map_tensors
from lora_fx.passes.onnx_state import cast_state
from lora_fx.passes.other_inputs import Inputs, cases
from lora_fx.passes.precisions import dtypes_through, halves_after
from lora_fx.passes.preserve import attention_spelt_out, casts_uncached, preserved
from lora_fx.passes.random_adapters import held_active, random_adapters
from lora_fx.passes.registers import plain
from lora_fx.passes.replaced import replaced
from lora_fx.passes.rounding import weights_rounded
from lora_fx.passes.runtime import Injected, effective, raw
from lora_fx.passes.sharded import refuse_sharded
from lora_fx.passes.slopes import outputs_and_slopes
from lora_fx.passes.switch import adapter_sites, require, trained_names
from lora_fx.passes.trace import trace
from lora_fx.passes.unsaved import unsaved
from lora_fx.reports import Comparison, Report

_NEARLY = 100.0
"""Up to so many times its tolerance, a difference in float32 may be rounding: float64 decides."""
_ROUNDINGS = 10.0
"""A sum of many products, and what follows it, is off by some roundings where its weights are off by one."""
_DRAWS = 2
"""So often the base's weights are rounded, each time otherwise, to see how far that moves it."""


@dataclass(frozen=True)
class _Run:
    """What one run gave: its float outputs, and the gradients of each weight's adapter."""

    outputs: list[Tensor]
    gradients: Mapping[str, list[Tensor | None]]


def verify(model: nn.Module, inputs: Inputs, adapter: str | None = None) -> Report:
    """Compare the injected model with itself folded, with random adapters; put everything back.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
        InputError: the model does not run on the inputs.
        WrappedModelError: the model is sharded by ``fully_shard`` or tensor parallelism.
    """
    _, name = require(model, adapter)
    refuse_sharded(
        model, "verify", "Verify before fully_shard or parallelize_module, or on the unsharded model."
    )
    comparisons: list[Comparison] = []
    gone = replaced(model, name)
    notes: list[str] = [] if gone is None else [gone]
    with (
        held_active(model, name),
        preserved(model),
        attention_spelt_out(),
        casts_uncached(),
        random_adapters(model, name),
        _trainable(_adapter_parameters(model, name)),
    ):
        for mode in _modes(model, notes):
            _note_writes(model, inputs, notes)
            for case, values in cases(inputs):
                label = f"{'train' if mode else 'eval'}, {case}"
                found, problem = _compare(model, name, values, label)
                comparisons += _judged(model, name, values, found, notes)
                comparisons += _widened(model, name, values, label, notes) if found else []
                if problem:
                    notes.append(problem)
    if not comparisons:
        # Where the inputs are to blame, recording the run says how.
        with held_active(model, name), folded(model, name):
            trace(model, inputs)
    return Report(tuple(comparisons), tuple(notes))


def _judged(
    model: nn.Module, adapter: str, inputs: Inputs, found: list[Comparison], notes: list[str]
) -> list[Comparison]:
    """Let float64, and then what rounding does to the base, decide on differences that may be rounding.

    In float32 these are small ones, and those that the base shows when its own weights are rounded. What
    float64 says stands in place of all comparisons of the case, if the model runs in it and all hold.
    """
    if all(c.ok for c in found):
        return found
    if _all_in(model, torch.float64):
        return _within_rounding(model, adapter, inputs, found, notes)
    if not _all_in(model, torch.float32) or not _may_be_rounding(model, adapter, inputs, found):
        return found
    again = _in(torch.float64, model, adapter, inputs, f"{found[0].case}, in float64", notes)
    return again if again and all(c.ok for c in again) else found


def _in(
    dtype: torch.dtype, model: nn.Module, adapter: str, inputs: Inputs, case: str, notes: list[str]
) -> list[Comparison] | None:
    """Compare the model cast to another dtype; None where it does not run in it."""
    cast = map_tensors(inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)
    with cast_state(model, dtype), _trainable(_adapter_parameters(model, adapter)):
        try:
            again, problem = _compare(model, adapter, cast, case)
            return None if problem else _judged(model, adapter, cast, again, notes)
        except RuntimeError:  # what torch raises on dtypes that do not meet: the model has its own
            return None


def _widened(model: nn.Module, adapter: str, inputs: Inputs, case: str, notes: list[str]) -> list[Comparison]:
    """Compare a half-precision model in float32 too: what halves may lose hides a wrong factor."""
    if not (_all_in(model, torch.bfloat16, adapter) or _all_in(model, torch.float16, adapter)):
        return []
    record, _ = require(model, adapter)
    cast = map_tensors(inputs, lambda t: t.float() if t.is_floating_point() else t)
    again: list[Comparison] | None = None
    with cast_state(model, torch.float32), suppress(InputError):
        if not halves_after(trace(model, cast).graph, record.plans[adapter]):
            with _halves_of(record, adapter, frozenset()):
                again = _in(torch.float32, model, adapter, inputs, f"{case}, in float32", notes)
    if again is None:
        notes.append(f"{case}: compared in half precision alone, since not all of the model runs in float32")
    return again or []


@contextmanager
def _halves_of(record: Injected, adapter: str, halves: frozenset[torch.dtype]) -> Generator[None]:
    """Say for a while that these are the half precisions after the adapter's weights."""
    before = record.halves.get(adapter)
    record.halves[adapter] = halves
    try:
        yield
    finally:
        record.halves.pop(adapter)
        if before is not None:
            record.halves[adapter] = before


def _may_be_rounding(model: nn.Module, adapter: str, inputs: Inputs, found: list[Comparison]) -> bool:
    """Say whether differences in float32 are small, or no larger than what rounding does to the base."""
    if all(c.difference <= _NEARLY * c.tolerance for c in found):
        return True
    moved = _moved_by_rounding(model, adapter, inputs, found)
    # Where rounding moves all of a value, no digit of the others is left to compare either.
    return max(moved.values()) >= 1 or all(c.ok or c.difference <= moved.get(c.what, 0.0) for c in found)


def _within_rounding(
    model: nn.Module, adapter: str, inputs: Inputs, found: list[Comparison], notes: list[str]
) -> list[Comparison]:
    """Allow what the base itself loses in float64, but never more than float32 is allowed."""
    moved = _moved_by_rounding(model, adapter, inputs, found)
    again = [c if c.ok else within_rounding(c, moved.get(c.what, 0.0)) for c in found]
    furthest = max(moved.get(c.what, 0.0) for c in found if not c.ok) / _ROUNDINGS
    notes.append(
        f"{found[0].case}: rounding every weight once moves the base itself by up to {furthest:.1e}, so that "
        f"{'the comparison allows' if all(c.ok for c in again) else 'no comparison can hold to less than'} "
        f"{_ROUNDINGS:.0f} times as much"
    )
    return again if all(c.ok for c in again) else found


def _moved_by_rounding(
    model: nn.Module, adapter: str, inputs: Inputs, found: list[Comparison]
) -> dict[str, float]:
    """Return how far the model without adapters goes when its weights are rounded, for each comparison."""
    moved: dict[str, float] = {}
    plain_run = _reference(model, adapter, inputs)
    for seed in range(_DRAWS):
        rounded = _reference(model, adapter, inputs, seed=seed)
        for c in _compared(rounded, plain_run, found[0].case, dtypes_through(model, adapter)):
            moved[c.what] = max(moved.get(c.what, 0.0), _ROUNDINGS * c.difference)
    return moved


def _all_in(model: nn.Module, dtype: torch.dtype, apart: str | None = None) -> bool:
    """Say whether all float parameters, without those of an adapter, have this dtype."""
    own = set[int]() if apart is None else {id(p) for p in _adapter_parameters(model, apart)}
    return {p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in own} == {dtype}


def _modes(model: nn.Module, notes: list[str]) -> Iterator[bool]:
    """Put the model in eval and in train mode; an exported program's module has one mode alone."""
    for mode in (False, True):
        try:
            model.train(mode)
        except NotImplementedError as error:
            notes.append(f"{'train' if mode else 'eval'} mode was not compared: {error}")
            if mode == model.training:
                yield mode
        else:
            yield mode


def _note_writes(model: nn.Module, inputs: Inputs, notes: list[str]) -> None:
    """Record one run, so that what the forward itself writes into is put back after each of the others."""
    try:
        graph = trace(model, inputs).graph
    except InputError as error:
        notes.append(f"{'train' if model.training else 'eval'}: not recorded ({error})")
        return
    note_written(model, written_in(graph))
    moves = unsaved(model, graph)
    if moves is not None:
        notes.append(f"{'train' if model.training else 'eval'}: {moves}")


def _compare(
    model: nn.Module, adapter: str, inputs: Inputs, case: str
) -> tuple[list[Comparison], str | None]:
    try:
        wanted = _reference(model, adapter, inputs)
    except Exception as error:  # noqa: BLE001 - whatever the base itself refuses is no finding about adapters
        return [], f"{case}: the base itself does not run ({type(error).__name__}: {error})"
    found = _injected_run(model, adapter, inputs)
    return _compared(found, wanted, case, dtypes_through(model, adapter)), None


def _compared(found: _Run, wanted: _Run, case: str, through: frozenset[torch.dtype]) -> list[Comparison]:
    """Compare the outputs of two runs, and the gradients of each adapter."""
    largest = max((size(gradient) for gradient in wanted.gradients.values()), default=0.0)
    return [
        outputs_compared(found.outputs, wanted.outputs, case, through),
        *(
            gradients_compared(name, found.gradients[name], gradient, case, largest, through)
            for name, gradient in wanted.gradients.items()
        ),
    ]


def _reference(model: nn.Module, adapter: str, inputs: Inputs, seed: int | None = None) -> _Run:
    """Run the folded model, with its weights rounded if there is a seed.

    Its gradients are with respect to the weights themselves: they go on to the adapters that made them.
    """
    with folded(model, adapter), nullcontext() if seed is None else weights_rounded(model, seed):
        named = model.named_parameters(remove_duplicate=False)
        weights = {plain(name): p for name, p in named if p.is_floating_point()}
        outputs, slopes = _run(model, inputs, list({id(p): p for p in weights.values()}.values()))
    by_name = {name: slopes.get(id(p)) for name, p in weights.items()}
    made = dict(_effective_weights(model, adapter))
    shares: dict[int, Tensor] = {}
    for name, (weight, parameters) in made.items():
        slope = by_name.get(name)
        if slope is None:
            continue
        parts = torch.autograd.grad(weight, parameters, slope.to(weight.dtype))
        for parameter, share in zip(parameters, parts, strict=True):
            # Weights that were tied and then assigned apart share one adapter.
            known = shares.get(id(parameter))
            shares[id(parameter)] = share if known is None else known + share
    return _Run(
        outputs,
        {
            name: [shares.get(id(p)) for p in parameters]
            for name, (_, parameters) in made.items()
            if by_name.get(name) is not None
        },
    )


def _injected_run(model: nn.Module, adapter: str, inputs: Inputs) -> _Run:
    sites = {name: parameters for name, (_, parameters) in _effective_weights(model, adapter)}
    distinct = list({id(p): p for parameters in sites.values() for p in parameters}.values())
    outputs, slopes = _run(model, inputs, distinct)
    return _Run(outputs, {name: [slopes.get(id(p)) for p in ps] for name, ps in sites.items()})


def _run(
    model: nn.Module, inputs: Inputs, distinct: list[nn.Parameter]
) -> tuple[list[Tensor], dict[int, Tensor | None]]:
    """Return the float outputs, and the slope of each of these parameters by its identity."""

    def run() -> Any:
        args, kwargs = own_copy(*inputs)
        return model(*args, **kwargs)

    with preserved(model), _trainable(distinct):
        outputs, slopes = outputs_and_slopes(model, run, distinct)
    if slopes is None:
        return outputs, {}
    return outputs, {id(p): g for p, g in zip(distinct, slopes, strict=True)}


def _adapter_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """Return what the adapter trains, or would: one that was loaded is frozen."""
    found = (raw(m, n) for _, m, _, spec in adapter_sites(model, adapter) for n in trained_names(spec))
    return list({id(p): p for p in found if isinstance(p, nn.Parameter)}.values())


@contextmanager
def _trainable(parameters: list[nn.Parameter]) -> Generator[None]:
    flags = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


def _effective_weights(
    model: nn.Module, adapter: str
) -> Iterator[tuple[str, tuple[Tensor, list[nn.Parameter]]]]:
    """Yield (first name, (W with its graph, the adapter's trained Parameters)) of every base weight."""
    seen: set[tuple[int, ...]] = set()
    for path, module, attribute, spec in adapter_sites(model, adapter):
        key = weight_key(module, attribute, spec)
        if key in seen:
            continue
        seen.add(key)
        parameters = [p for n in trained_names(spec) if isinstance(p := raw(module, n), nn.Parameter)]
        with torch.enable_grad(), _trainable(parameters):
            weight = effective(module, attribute, spec)
        yield (f"{path}.{attribute}" if path else attribute), (weight, parameters)
