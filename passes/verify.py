"""Verify: the invariant, checked on this model.

The injected model, with random adapters, against the same model with its weights replaced: outputs,
and gradients with respect to the adapters, on the example inputs, on other values and on another
batch size, in train and in eval. Everything is put back.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import nn

from lora_fx.errors import InputError
from lora_fx.passes.comparing import gradients_compared, outputs_compared, size, within_rounding
from lora_fx.passes.fold import folded
from lora_fx.passes.moved import note_written, written_in
from lora_fx.passes.onnx_inputs import map_tensors
from lora_fx.passes.onnx_state import cast_state
from lora_fx.passes.other_inputs import Inputs, cases
from lora_fx.passes.precisions import dtypes_through, halves_after
from lora_fx.passes.preserve import attention_spelt_out, casts_uncached, preserved
from lora_fx.passes.random_adapters import held_active, random_adapters
from lora_fx.passes.replaced import replaced
from lora_fx.passes.runtime import Injected, raw
from lora_fx.passes.sharded import refuse_sharded
from lora_fx.passes.switch import adapter_sites, require
from lora_fx.passes.trace import trace
from lora_fx.passes.two_runs import Run, adapter_parameters, folded_run, injected_run, trainable
from lora_fx.passes.unsaved import unsaved
from lora_fx.reports import Comparison, Report

_NEARLY = 100.0
"""Up to so many times its tolerance, a difference in float32 may be rounding: float64 decides."""
_ROUNDINGS = 10.0
"""A sum of many products, and what follows it, is off by some roundings where its weights are off by one."""
_DRAWS = 2
"""So often the base's weights are rounded, each time otherwise, to see how far that moves it."""


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
        trainable(adapter_parameters(model, name)),
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
        return _with_doubts(model, adapter, inputs, found)
    if _all_in(model, torch.float64):
        return _within_rounding(model, adapter, inputs, found, notes)
    if _in_halves(model):
        return _excused(model, adapter, inputs, found)
    if not _all_in(model, torch.float32) or not _may_be_rounding(model, adapter, inputs, found):
        return found
    again = _in(torch.float64, model, adapter, inputs, f"{found[0].case}, in float64", notes)
    return again if again and all(c.ok for c in again) else found


def _beside_noise(
    model: nn.Module, adapter: str, inputs: Inputs, found: list[Comparison]
) -> list[Comparison]:
    """Compare gradients that rounding the base's weights moves wholly beside the largest one."""
    _, alone = _moved_by_rounding(model, adapter, inputs, found)
    noise = frozenset(c.what for c in found if not c.ok and alone.get(c.what, 0.0) >= _ROUNDINGS)
    return _compare(model, adapter, inputs, found[0].case, noise)[0] if noise else found


def _excused(model: nn.Module, adapter: str, inputs: Inputs, found: list[Comparison]) -> list[Comparison]:
    """Allow half-precision gradients what rounding the weights makes of them; float32 is asked next."""
    _, alone = _moved_by_rounding(model, adapter, inputs, found)
    return [
        c if c.ok or c.what == "outputs" else replace(c, tolerance=max(c.tolerance, alone.get(c.what, 0.0)))
        for c in found
    ]


def _with_doubts(model: nn.Module, adapter: str, inputs: Inputs, found: list[Comparison]) -> list[Comparison]:
    """Add what float64 says of gradients of which float32 shows nothing (behind a scale of 1e-6, say).

    There a difference is one if it is larger than what rounding the base's weights makes of that gradient.
    """
    doubtful = {c.what for c in found if c.doubtful}
    if not doubtful or not _all_in(model, torch.float32):
        return found
    cast = map_tensors(inputs, lambda t: t.to(torch.float64) if t.is_floating_point() else t)
    with cast_state(model, torch.float64), trainable(adapter_parameters(model, adapter)):
        try:
            again, _ = _compare(model, adapter, cast, f"{found[0].case}, in float64")
        except RuntimeError:  # the model has dtypes of its own
            return found
        wrong = [c for c in again if c.what in doubtful and not c.ok]
        alone = _moved_by_rounding(model, adapter, cast, wrong)[1] if wrong else {}
    return [*found, *(c for c in wrong if c.difference > alone.get(c.what, 0.0))]


def _in(
    dtype: torch.dtype, model: nn.Module, adapter: str, inputs: Inputs, case: str, notes: list[str]
) -> list[Comparison] | None:
    """Compare the model cast to another dtype; None where it does not run in it."""
    cast = map_tensors(inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)
    with cast_state(model, dtype), trainable(adapter_parameters(model, adapter)):
        try:
            again, problem = _compare(model, adapter, cast, case)
            return None if problem else _judged(model, adapter, cast, again, notes)
        except RuntimeError:  # what torch raises on dtypes that do not meet: the model has its own
            return None


def _widened(model: nn.Module, adapter: str, inputs: Inputs, case: str, notes: list[str]) -> list[Comparison]:
    """Compare a half-precision model in float32 too: what halves may lose hides a wrong factor."""
    if not _in_halves(model):
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
    moved, alone = _moved_by_rounding(model, adapter, inputs, found)
    # Where rounding moves all of a value, no digit of the others is left to compare either: but for a
    # gradient that is nothing beside the largest one (a bias before a normalisation), of which none ever was.
    return max(moved.values()) >= 1 or all(
        c.difference <= max(_NEARLY * c.tolerance, moved.get(c.what, 0.0))
        or alone.get(c.what, 0.0) >= _ROUNDINGS
        for c in found
    )


def _within_rounding(
    model: nn.Module, adapter: str, inputs: Inputs, found: list[Comparison], notes: list[str]
) -> list[Comparison]:
    """Allow what the base itself loses in float64, but never more than float32 is allowed."""
    found = _beside_noise(model, adapter, inputs, found)
    moved, _ = _moved_by_rounding(model, adapter, inputs, found)
    again = [c if c.ok else within_rounding(c, moved.get(c.what, 0.0)) for c in found]
    if all(c.ok for c in found):
        return found
    furthest = max(moved.get(c.what, 0.0) for c in found if not c.ok) / _ROUNDINGS
    notes.append(
        f"{found[0].case}: rounding every weight once moves the base itself by up to {furthest:.1e}, so that "
        f"{'the comparison allows' if all(c.ok for c in again) else 'no comparison can hold to less than'} "
        f"{_ROUNDINGS:.0f} times as much"
    )
    return again if all(c.ok for c in again) else found


def _moved_by_rounding(
    model: nn.Module, adapter: str, inputs: Inputs, found: list[Comparison]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return how far the folded model goes when its weights are rounded, for each comparison.

    In the second, gradients that are nothing beside the largest one are measured by themselves.
    """
    moved, alone = dict[str, float](), dict[str, float]()
    plain_run, through = folded_run(model, adapter, inputs), dtypes_through(model, adapter)
    for seed in range(_DRAWS):
        rounded = folded_run(model, adapter, inputs, seed=seed)
        for largest, into in ((None, moved), (0.0, alone)):
            for c in _compared(rounded, plain_run, found[0].case, through, largest=largest):
                into[c.what] = max(into.get(c.what, 0.0), _ROUNDINGS * c.difference)
    return moved, alone


def _all_in(model: nn.Module, dtype: torch.dtype, *, base: bool = False) -> bool:
    """Say whether all float parameters, or all that are no adapter's, have this dtype."""
    own = set[int]()
    if base:
        plans = require(model, None)[0].plans
        held = ((module, spec) for name in plans for _, module, _, spec in adapter_sites(model, name))
        own = {id(raw(module, n)) for module, spec in held for n in spec.names}
    return {p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in own} == {dtype}


def _in_halves(model: nn.Module) -> bool:
    """Say whether the base is in half precision."""
    return any(_all_in(model, dtype, base=True) for dtype in (torch.bfloat16, torch.float16))


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
    model: nn.Module, adapter: str, inputs: Inputs, case: str, noise: frozenset[str] = frozenset()
) -> tuple[list[Comparison], str | None]:
    try:
        wanted = folded_run(model, adapter, inputs)
    except Exception as error:  # noqa: BLE001 - whatever the base itself refuses is no finding about adapters
        return [], f"{case}: the base itself does not run ({type(error).__name__}: {error})"
    found = injected_run(model, adapter, inputs)
    return _compared(found, wanted, case, dtypes_through(model, adapter), noise=noise), None


def _compared(
    found: Run,
    wanted: Run,
    case: str,
    through: frozenset[torch.dtype],
    *,
    largest: float | None = None,
    noise: frozenset[str] = frozenset(),
) -> list[Comparison]:
    """Compare the outputs of two runs, and the gradients of each adapter beside the largest of them."""
    if largest is None:
        largest = max((size(gradient) for gradient in wanted.gradients.values()), default=0.0)
    return [
        outputs_compared(found.outputs, wanted.outputs, case, through),
        *(
            gradients_compared(
                name, found.gradients[name], gradient, case, largest, through, noise=name in noise
            )
            for name, gradient in wanted.gradients.items()
        ),
    ]
