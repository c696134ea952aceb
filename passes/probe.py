"""Probe: does every adapter act exactly as its delta on the weight would?

All adapters are filled with random values and the injected model is run; then the same delta is
added to every ``W0`` in place, which reaches every alias, view and reference, and the base is run,
its modules of their own classes, without adapters. The two outputs must agree. Every adapter must also
receive a gradient wherever full fine-tuning of its weight would. Everything is put back.

A model that chooses by comparing numbers (the best proposals of a detector) may answer a rounding with
another choice. Where the base itself does so, float64 decides, in which a fault stays and rounding goes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import LoraFxError, ProbeError
from lora_fx.passes.changes import changes
from lora_fx.passes.comparing import unmasked
from lora_fx.passes.examples import own_copy
from lora_fx.passes.fold import base_only, folded
from lora_fx.passes.norms import resting_norms_bare
from lora_fx.passes.onnx_inputs import map_tensors
from lora_fx.passes.onnx_state import cast_state
from lora_fx.passes.precisions import dtypes_through, tolerance_of
from lora_fx.passes.preserve import attention_spelt_out, casts_uncached, preserved
from lora_fx.passes.random_adapters import held_active, random_adapters, trained_parameters
from lora_fx.passes.registers import plain
from lora_fx.passes.runtime import BINDING, SiteSpec, effective, raw
from lora_fx.passes.slopes import float_leaves, outputs_and_slopes
from lora_fx.passes.switch import adapter_sites, disable_adapter

Runner = Callable[[], Any]
"""Runs the model once on its example inputs."""
Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest allowed |injected - reference| / |reference| by norm, per dtype of the output."""
_PAST = (
    "The weight is read past its module (a cached view, a list), or the forward asks for its class or flags: "
    "Skip it, and report it."
)
_NUDGE = 16.0
"""Roundings by which every weight is moved to see whether the model answers them with leaps."""


@dataclass(frozen=True)
class ProbeResult:
    """The largest relative difference seen, and the weights whose adapter had no gradient.

    The base gives those none either, on these inputs: it starts a branch at zero, or has one token.
    """

    difference: float
    without_effect: tuple[str, ...]


def probe(model: nn.Module, adapter: str, inputs: Inputs) -> ProbeResult:
    """Check one adapter on one run of the model.

    Raises:
        ProbeError: an adapter has another effect than its delta on the weight, or no gradient alone.
    """
    with (
        held_active(model, adapter),
        preserved(model),
        attention_spelt_out(),
        casts_uncached(),
        random_adapters(model, adapter),
    ):
        return _probe(model, adapter, inputs)


def _probe(model: nn.Module, adapter: str, inputs: Inputs) -> ProbeResult:
    def run() -> Any:
        args, kwargs = own_copy(*inputs)
        return model(*args, **kwargs)

    outputs, silent = _run_with_gradients(model, adapter, run)
    deaf = sorted(_learning(model, adapter, run, set(silent))) if silent else []
    if deaf:
        raise ProbeError(
            ", ".join(deaf[:5]),
            expected="a gradient, as full fine-tuning of the weight has one",
            got="none: the output does not depend on the adapter",
            advice=_PAST,
        )
    reference = _run_with_weights_replaced(model, adapter, run)
    difference, tolerance = compare(outputs, reference, dtypes_through(model, adapter))
    if difference > tolerance and _moved_by_rounding(model, adapter, run, reference) > tolerance:
        difference, tolerance = _compared_in_float64(model, adapter, inputs) or (difference, tolerance)
    if difference > tolerance:
        _refuse_asking(model, adapter, run, outputs, difference)
        raise ProbeError(
            _disagreeing(model, adapter, run) or "the adapters together",
            expected=f"the effect of adding the delta to the weight, to {tolerance:g}",
            got=f"a relative difference of {difference:.3g}",
            advice=_PAST,
        )
    return ProbeResult(difference, tuple(silent))


def _refuse_asking(
    model: nn.Module, adapter: str, run: Runner, outputs: list[Tensor], difference: float
) -> None:
    """Refuse a model whose difference from the base is not the weights' but the adapted modules' own.

    Raises:
        ProbeError: with ``W`` written into ``W0`` and the adapters off, but the modules as they are
            adapted, the model agrees with the injected one and not with the base.
    """
    adapted = _run_with_weights_replaced(model, adapter, run, modules=disable_adapter)
    apart, tolerance = compare(outputs, adapted, dtypes_through(model, adapter))
    if apart <= tolerance:
        raise ProbeError(
            f"the forward of {type(model).__name__}",
            expected=f"what the base computes with the same weights, to {tolerance:g}",
            got=f"a relative difference of {difference:.3g}: it asks for its modules' class or parameters",
            advice="Adapted modules have a subclass and more parameters: ask with isinstance(), and for "
            "parameters by name; or Skip the modules that are asked.",
        )


def _run_with_gradients(model: nn.Module, adapter: str, run: Runner) -> tuple[list[Tensor], list[str]]:
    """Run the injected model; return its outputs and the weights whose adapter had no gradient."""
    sites = list(_sites(model, adapter))
    parameters = {name: trained_parameters(module, spec) for name, module, _, spec in sites}
    wanted = list({id(p): p for ps in parameters.values() for p in ps}.values())
    for parameter in wanted:
        parameter.requires_grad_(True)
    # The gradient is taken before the buffers are put back: putting back is a write that autograd sees.
    with preserved(model), _failures_named(model):
        outputs, slopes = outputs_and_slopes(model, run, wanted)
    if slopes is None:
        return outputs, list(parameters)
    moved = {id(p) for p, g in zip(wanted, slopes, strict=True) if g is not None and bool(g.any())}
    silent = [name for name, ps in parameters.items() if not any(id(p) in moved for p in ps)]
    return outputs, silent


@contextmanager
def _failures_named(model: nn.Module) -> Generator[None]:
    """Inside, what the model's own forward or backward raises is a ProbeError; the base's forward ran.

    Raises:
        ProbeError: with the model's own error, chained.
    """
    try:
        yield
    except (LoraFxError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ProbeError(
            f"the forward or backward of {type(model).__name__}",
            expected="both to run with frozen weights and with adapters",
            got=f"{type(error).__name__}: {error}",
            advice="The base's forward ran: this one takes its modules' parameters for all weights, or has "
            "no backward; the model's own error is chained.",
        ) from error


def _learning(model: nn.Module, adapter: str, run: Runner, names: set[str]) -> set[str]:
    """Return which of these weights would give their adapter a gradient, by the folded model's own."""
    with folded(model, adapter):
        named = model.named_parameters(remove_duplicate=False)
        weights = {plain(n): p for n, p in named if plain(n) in names}
        for weight in weights.values():
            weight.requires_grad_(True)
        with preserved(model):
            _, slopes = outputs_and_slopes(model, run, list(weights.values()))
    if slopes is None:
        return set()
    given = dict(zip(weights, slopes, strict=True))
    return {n for n, m, a, spec in _sites(model, adapter) if _passed_on(given.get(n), m, a, spec)}


def _passed_on(slope: Tensor | None, module: nn.Module, attribute: str, spec: SiteSpec) -> bool:
    """Say whether the slope of ``W`` gives any slope to the adapter that makes ``W``."""
    if slope is None or not bool(slope.any()):
        return False
    parameters = trained_parameters(module, spec)
    with torch.enable_grad():
        weight = effective(module, attribute, spec)
        passed: list[Tensor | None] = list(
            torch.autograd.grad(weight, parameters, slope.to(weight.dtype), allow_unused=True)
        )
    return any(p is not None and bool(p.any()) for p in passed)


def _sites(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module, str, SiteSpec]]:
    for path, module, attribute, spec in adapter_sites(model, adapter):
        if spec.buffer:
            continue
        yield (f"{path}.{attribute}" if path else attribute), module, attribute, spec


def _run_with_weights_replaced(
    model: nn.Module,
    adapter: str,
    run: Runner,
    only: str | None = None,
    nudged: Callable[[Tensor], Tensor] = lambda weight: weight,
    modules: Callable[[nn.Module], AbstractContextManager[Any]] | None = None,
) -> list[Tensor]:
    """Run the base with ``W`` written into the very tensors of ``W0``, then write the bits back.

    ``modules`` says which modules are run; by default those of the base: their own classes, no adapters.
    """
    found = changes(model, adapter)
    kept = {name: change.before.clone() for name, change in found.items()}
    try:
        for change in found.values():
            if only is None or only in change.names:
                change.before.copy_(nudged(change.after))
        # With gradients, for a forward that takes some itself.
        with (modules or partial(_base, adapter=adapter))(model), preserved(model), torch.enable_grad():
            # Cloned: an output may be a weight, or a view of one, whose bits are written back.
            return [o.detach().clone() for o in float_leaves(run())]
    finally:
        for name, change in found.items():
            change.before.copy_(kept[name])


@contextmanager
def _base(model: nn.Module, adapter: str) -> Generator[None]:
    """Inside, the model is the base; normalisations in eval mode, too, are of their own class."""
    with base_only(model, adapter), resting_norms_bare(model):
        yield


def _moved_by_rounding(model: nn.Module, adapter: str, run: Runner, reference: list[Tensor]) -> float:
    """Return how far a few roundings of the weights alone move the base's outputs."""
    generator = torch.Generator().manual_seed(1)

    def nudged(weight: Tensor) -> Tensor:
        noise = torch.rand(weight.shape, generator=generator, dtype=torch.float32).to(weight.device) - 0.5
        # Not weight * (1 + step): in float32 that is no step at all.
        return weight + weight * (_NUDGE * torch.finfo(weight.dtype).eps * noise).to(weight.dtype)

    moved = _run_with_weights_replaced(model, adapter, run, nudged=nudged)
    return compare(moved, reference, dtypes_through(model, adapter))[0]


def _compared_in_float64(model: nn.Module, adapter: str, inputs: Inputs) -> tuple[float, float] | None:
    """Compare once more in float64; None where the model does not run in it.

    Where the base's own rounding is beyond float64's tolerance, it is the tolerance, up to float32's.
    """
    wide = map_tensors(inputs, lambda t: t.double() if t.is_floating_point() else t)

    def run() -> Any:
        args, kwargs = own_copy(*wide)
        return model(*args, **kwargs)

    with cast_state(model, torch.float64):
        try:
            with preserved(model), torch.enable_grad():
                outputs = [o.detach() for o in float_leaves(run())]
            reference = _run_with_weights_replaced(model, adapter, run)
            difference, tolerance = compare(outputs, reference)
            if difference > tolerance:
                moved = _moved_by_rounding(model, adapter, run, reference)
                tolerance = max(tolerance, min(moved, _TOLERANCE[torch.float32]))
            return difference, tolerance
        except RuntimeError:  # what torch raises on dtypes that do not meet: the model has its own
            return None


def _disagreeing(model: nn.Module, adapter: str, run: Runner) -> str | None:
    """Name the weights that disagree, one at a time with all other adapters at zero."""
    found: list[str] = []
    for name, module, attribute, _ in list(_sites(model, adapter)):
        with _silenced(model, adapter, raw(module, attribute)):
            with preserved(model), torch.enable_grad():
                outputs = [o.detach() for o in float_leaves(run())]
            reference = _run_with_weights_replaced(model, adapter, run, only=name)
        difference, tolerance = compare(outputs, reference, dtypes_through(model, adapter))
        if difference > tolerance:
            found.append(name)
    return ", ".join(found[:5]) or None


@contextmanager
def _silenced(model: nn.Module, adapter: str, keep: Tensor) -> Generator[None]:
    """Inside, every other weight's adapter is at its start."""
    saved: list[tuple[dict[str, SiteSpec], SiteSpec]] = []
    for _, module, attribute, spec in list(adapter_sites(model, adapter)):
        if raw(module, attribute) is keep or spec.buffer:
            continue
        specs = module.__dict__[BINDING].sites[attribute]
        saved.append((specs, specs.pop(adapter)))
    try:
        yield
    finally:
        for specs, spec in saved:
            specs[adapter] = spec


def compare(
    outputs: list[Tensor], reference: list[Tensor], through: Iterable[torch.dtype] = ()
) -> tuple[float, float]:
    """Return the largest |difference| / |reference| by norm, and the tolerance of its dtype.

    ``through`` are the dtypes on the way: what a model computes in half precision and returns in single
    is as exact as half precision.
    """
    dtypes = tuple(through)
    worst, tolerance = 0.0, tolerance_of(_TOLERANCE, torch.float32, *dtypes)
    if len(outputs) != len(reference):
        return float("inf"), tolerance
    for found, wanted in zip(outputs, reference, strict=True):
        if found.shape != wanted.shape:
            return float("inf"), tolerance
        finite = wanted.isfinite() & unmasked(found, wanted)
        wide = torch.promote_types(wanted.dtype, torch.float32)
        gap = torch.where(finite, (found - wanted).to(wide), 0).norm()
        ratio = float(gap / torch.where(finite, wanted.to(wide), 0).norm().clamp_min(1e-30))
        limit = tolerance_of(_TOLERANCE, wanted.dtype, *dtypes)
        if ratio / limit > worst / tolerance:
            worst, tolerance = ratio, limit
    return worst, tolerance
