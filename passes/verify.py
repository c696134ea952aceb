"""Verify: the invariant, checked on this model.

The injected model, with random adapters, against the same model with its weights replaced: outputs,
and gradients with respect to the adapters, on the example inputs, on other values and on another
batch size, in train and in eval. Everything is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_fx.errors import InputError
from lora_fx.passes.changes import weight_key
from lora_fx.passes.examples import own_copy
from lora_fx.passes.fold import folded
from lora_fx.passes.moved import note_written, written_in
from lora_fx.passes.onnx_inputs import map_tensors
from lora_fx.passes.onnx_state import cast_state
from lora_fx.passes.precisions import dtypes_through, tolerance_of
from lora_fx.passes.preserve import attention_spelt_out, casts_uncached, preserved
from lora_fx.passes.random_adapters import held_active, random_adapters
from lora_fx.passes.registers import plain
from lora_fx.passes.runtime import effective, raw
from lora_fx.passes.sharded import refuse_fully_sharded
from lora_fx.passes.slopes import outputs_and_slopes
from lora_fx.passes.switch import adapter_sites, require, trained_names
from lora_fx.passes.trace import trace
from lora_fx.passes.unsaved import unsaved
from lora_fx.reports import Comparison, Report

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest allowed |injected - folded| / |folded| by norm, by the dtype of the output."""


_ROUNDING = 256.0
"""Gradients below so many times the rounding of the largest one are rounding themselves."""
_NEARLY = 100.0
"""Up to so many times its tolerance, a difference in float32 may be rounding: float64 decides."""
_DISCOUNT = 4.0
"""So many roundings of the largest gradient are no difference: what reaches a small one went through it."""


@dataclass(frozen=True)
class _Run:
    """What one run gave: its float outputs, and the gradient of each weight's adapter."""

    outputs: list[Tensor]
    gradients: Mapping[str, Tensor | None]


def verify(model: nn.Module, inputs: Inputs, adapter: str | None = None) -> Report:
    """Compare the injected model with itself folded, with random adapters; put everything back.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
        InputError: the model does not run on the inputs.
        WrappedModelError: the model is sharded by ``fully_shard``.
    """
    _, name = require(model, adapter)
    refuse_fully_sharded(model, "verify", "Verify before fully_shard, or on the unsharded model.")
    comparisons: list[Comparison] = []
    notes: list[str] = []
    with (
        held_active(model, name),
        preserved(model),
        attention_spelt_out(),
        casts_uncached(),
        random_adapters(model, name),
    ):
        for mode in _modes(model, notes):
            _note_writes(model, inputs, notes)
            for case, values in _cases(inputs):
                label = f"{'train' if mode else 'eval'}, {case}"
                found, problem = _compare(model, name, values, label)
                comparisons += found if all(c.ok for c in found) else _judged(model, name, values, found)
                if problem:
                    notes.append(problem)
    if not comparisons:
        # Where the inputs are to blame, recording the run says how.
        with held_active(model, name), folded(model, name):
            trace(model, inputs)
    return Report(tuple(comparisons), tuple(notes))


def _judged(model: nn.Module, adapter: str, inputs: Inputs, found: list[Comparison]) -> list[Comparison]:
    """Let float64 decide where float32 differs by little: a network may lose that much by rounding alone.

    What float64 says stands in place of all comparisons of the case, if the model runs in it and all hold.
    """
    if not all(c.difference <= _NEARLY * c.tolerance for c in found) or not _in_float32(model):
        return found
    wide = map_tensors(inputs, lambda t: t.double() if t.is_floating_point() else t)
    case = f"{found[0].case}, in float64"
    with cast_state(model, torch.float64):
        for _, module, _, spec in adapter_sites(model, adapter):
            for key in trained_names(spec):
                raw(module, key).requires_grad_(not spec.buffer)
        try:
            again, problem = _compare(model, adapter, wide, case)
        except RuntimeError:  # what torch raises on dtypes that do not meet: the model has its own
            return found
    return again if problem is None and again and all(c.ok for c in again) else found


def _in_float32(model: nn.Module) -> bool:
    return {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}


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


def _cases(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    yield "example inputs", inputs
    yield "other values", _map(inputs, _other_values)
    batch = _batch_size(inputs)
    if batch is not None:
        yield f"batch of {batch + 1}", _map(inputs, lambda t: _one_more(t, batch))


def _map(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    leaves, spec = pytree.tree_flatten(inputs)
    changed = [_leaf(change(v), v.requires_grad) if _is_dense(v) else v for v in leaves]
    mapped: Inputs = pytree.tree_unflatten(changed, spec)
    return mapped


def _is_dense(value: Any) -> bool:
    """Say whether a value is a tensor that other numbers can be made of: a sparse one is left as it is."""
    return isinstance(value, Tensor) and value.layout is torch.strided


def _leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    """Cut a made input off from what it was made of: every run takes gradients of its own."""
    return tensor.detach().requires_grad_(requires_grad)


def _other_values(tensor: Tensor) -> Tensor:
    """Other numbers of the same range: the same numbers in another order, floats moved a little."""
    moved = tensor.roll(1, dims=-1) if tensor.dim() else tensor
    return moved * 0.9 if tensor.is_floating_point() else moved


def _batch_size(inputs: Inputs) -> int | None:
    sizes = {t.shape[0] for t in pytree.tree_leaves(inputs) if _is_dense(t) and t.dim() > 1}
    return sizes.pop() if len(sizes) == 1 else None


def _one_more(tensor: Tensor, batch: int) -> Tensor:
    if tensor.dim() < 1 or tensor.shape[0] != batch:
        return tensor
    return torch.cat([tensor, tensor[:1]])


def _compare(
    model: nn.Module, adapter: str, inputs: Inputs, case: str
) -> tuple[list[Comparison], str | None]:
    try:
        with folded(model, adapter):
            wanted = _reference_run(model, inputs)
    except Exception as error:  # noqa: BLE001 - whatever the base itself refuses is no finding about adapters
        return [], f"{case}: the base itself does not run ({type(error).__name__}: {error})"
    found = _injected_run(model, adapter, inputs)
    through = dtypes_through(model, adapter)
    comparisons = [_outputs(found.outputs, wanted.outputs, case, through)]
    weights = dict(_effective_weights(model, adapter))
    shares: dict[int, Tensor] = {}
    for name, (weight, parameters) in weights.items():
        slope = wanted.gradients.get(name)
        if slope is None:
            continue
        slopes = torch.autograd.grad(weight, parameters, slope.to(weight.dtype))
        for parameter, share in zip(parameters, slopes, strict=True):
            # Weights that were tied and then assigned apart share one adapter.
            known = shares.get(id(parameter))
            shares[id(parameter)] = share if known is None else known + share
    pairs: dict[str, tuple[list[Tensor | None], list[Tensor | None]]] = {}
    for name, (_, parameters) in weights.items():
        if wanted.gradients.get(name) is not None:
            got = [found.gradients.get(f"{name}/{i}") for i in range(len(parameters))]
            pairs[name] = got, [shares.get(id(p)) for p in parameters]
    largest = max((_size(wanted) for _, wanted in pairs.values()), default=0.0)
    comparisons += [_gradients(name, *pair, case, largest, through) for name, pair in pairs.items()]
    return comparisons, None


def _reference_run(model: nn.Module, inputs: Inputs) -> _Run:
    """Run the folded model; its gradients are with respect to the weights themselves."""
    named = model.named_parameters(remove_duplicate=False)
    weights = {plain(name): p for name, p in named if p.is_floating_point()}
    distinct = list({id(p): p for p in weights.values()}.values())
    return _run(model, inputs, weights, distinct)


def _injected_run(model: nn.Module, adapter: str, inputs: Inputs) -> _Run:
    named: dict[str, nn.Parameter] = {}
    for name, (_, parameters) in _effective_weights(model, adapter):
        named.update({f"{name}/{i}": p for i, p in enumerate(parameters)})
    distinct = list({id(p): p for p in named.values()}.values())
    return _run(model, inputs, named, distinct)


def _run(
    model: nn.Module, inputs: Inputs, named: Mapping[str, nn.Parameter], distinct: list[nn.Parameter]
) -> _Run:
    def run() -> Any:
        args, kwargs = own_copy(*inputs)
        return model(*args, **kwargs)

    with preserved(model), _trainable(distinct):
        outputs, slopes = outputs_and_slopes(model, run, distinct)
    gradients = {} if slopes is None else {id(p): g for p, g in zip(distinct, slopes, strict=True)}
    return _Run(outputs, {n: gradients.get(id(p)) for n, p in named.items()})


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


def _outputs(
    found: list[Tensor], wanted: list[Tensor], case: str, through: frozenset[torch.dtype]
) -> Comparison:
    worst = Comparison(case, "outputs", 0.0, TOLERANCES[torch.float32])
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return Comparison(case, "outputs", float("inf"), worst.tolerance)
    for got, expected in zip(found, wanted, strict=True):
        tolerance = tolerance_of(TOLERANCES, expected.dtype, *through)
        one = Comparison(case, "outputs", relative(got, expected), tolerance)
        if not one.difference / tolerance <= worst.difference / worst.tolerance:
            worst = one
    return worst


def _gradients(
    name: str,
    found: list[Tensor | None],
    wanted: list[Tensor | None],
    case: str,
    largest: float,
    through: frozenset[torch.dtype],
) -> Comparison:
    """Compare one adapter's gradients as one vector; gradients may lose ten times what outputs may.

    Where both are nothing but rounding beside the largest gradient of the model (a weight before a
    normalisation of single numbers), their difference is taken against that one; where one is small (the
    query of keys that are nearly alike), a few roundings of the largest are no difference.
    """
    pairs = [(g, w) for g, w in zip(found, wanted, strict=True) if g is not None or w is not None]
    dtype = next((t.dtype for pair in pairs for t in pair if t is not None), torch.float32)
    left = [torch.zeros_like(w) if g is None and w is not None else g for g, w in pairs]
    right = [torch.zeros_like(g) if w is None and g is not None else w for g, w in pairs]
    got = torch.cat([t.flatten() for t in left if t is not None])
    expected = torch.cat([t.flatten() for t in right if t is not None])
    tolerance = 10 * tolerance_of(TOLERANCES, dtype, *through)
    rounding = torch.finfo(dtype).eps * largest
    gap = _size([got - expected])
    if max(_size([got]), _size([expected])) <= _ROUNDING * rounding:
        return Comparison(case, name, gap / largest if largest else 0.0, tolerance)
    if gap <= _DISCOUNT * rounding:
        return Comparison(case, name, 0.0, tolerance)
    return Comparison(case, name, relative(got, expected), tolerance)


def _size(tensors: list[Tensor | None]) -> float:
    """Return the norm of tensors as one vector."""
    return float(sum(float(t.double().norm()) ** 2 for t in tensors if t is not None) ** 0.5)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted| by norm; where both are infinite or NaN alike they agree."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return float("inf")
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    wide = torch.promote_types(wanted.dtype, torch.float64)
    gap = torch.where(same, 0.0, found.to(wide) - wanted.to(wide)).norm()
    size = torch.where(wanted.isfinite(), wanted.to(wide), 0.0).norm()
    if float(gap) == 0.0:
        return 0.0
    return float(gap / size) if float(size) > 0 else float("inf")
