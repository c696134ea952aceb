"""The check that the runtime computes what the torch model does, on example and random inputs.

The reference is the folded model in float64. The runtime's error against it may be three times the
error that the *base* file has against the base model's, or that the *folded* torch model has in float32
where its weights lose more; so a tolerance is never guessed, and a wrong weight cannot hide behind a
lenient one. A base file that is itself wrong would excuse anything: its error
must be of the size of the torch model's own rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_fx.certificates import Check
from lora_fx.passes.onnx_inputs import batch_size, map_tensors, random_like, tensors, with_batch, with_length
from lora_fx.passes.onnx_parity import Outputs, RuntimeFault, distance, feeds_for, run, torch_outputs
from lora_fx.passes.onnx_state import Casts, cast_state, evaluating
from lora_fx.passes.onnx_subject import Inputs, State, Subject

FACTOR = 3.0
"""How many times the base's own error the folded file's may be."""
FLOOR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-13}
"""Errors that are not looked into: a few roundings of the outputs' dtype."""
SOUND = 100.0
"""How many times the torch model's own rounding the base file's error may be."""
SMALL = 500.0
"""Multiples of the floor up to which the base file's error is taken for rounding, whatever torch's own is."""
INJECTED = 1e-5
"""How far the injected model may lie from the folded one in float32 (the design's figure); where the base
itself loses more than that by rounding, ``FACTOR`` times what it loses."""

DIGITS = 0.1
"""Where more than this is allowed, not one digit is compared, and a note says so."""


@dataclass(frozen=True)
class Errors:
    """Distances on one set of inputs."""

    inputs: str
    base: float
    folded: float
    injected: float
    own: float = 0.0
    """Of the injected torch model against the folded one in float64."""
    rounding: float = 0.0
    """Of the folded torch model in the file's precision, where the file's error asks for a look at it."""

    def limit(self, floor: float) -> float:
        """Return what the folded file's error may be: other weights may lose more than the base's."""
        return max(FACTOR * self.base, FACTOR * min(self.rounding, SMALL * floor), floor)


@dataclass(frozen=True)
class _Case:
    """One set of inputs."""

    name: str
    inputs: Inputs


def parity_check(
    subject: Subject,
    inputs: Inputs,
    base_session: Any,
    folded_session: Any,
    *,
    precision: torch.dtype,
    notes: list[str],
) -> Check:
    """Compare the runtime with the torch model on the example and on random inputs of another size."""
    cases = _cases(subject, inputs, folded_session, notes)
    found: list[Errors] = []
    references = _references(subject, cases, notes)
    injected = _outputs(subject.injected, cases, None)
    for case, (base, folded), native in zip(cases, references, injected, strict=True):
        feeds = feeds_for(folded_session, case.inputs)
        try:
            ours, theirs = run(base_session, feeds), run(folded_session, feeds)
        except RuntimeFault as error:
            return Check("parity", ok=False, detail=str(error), place=f"{case.name} inputs")
        found.append(
            Errors(
                case.name,
                distance(ours, base),
                distance(theirs, folded),
                distance(theirs, native),
                distance(native, folded),
            )
        )
    floor, apart = FLOOR[precision], INJECTED
    if any(item.folded > item.limit(floor) for item in found):
        plain = _outputs(subject.folded_state, cases, None)
        found = [
            replace(item, rounding=distance(outputs, folded))
            for item, outputs, (_, folded) in zip(found, plain, references, strict=True)
        ]
    if any(item.injected > apart + item.limit(floor) for item in found):
        plain = _outputs(subject.base_state, cases, None)
        lost = (distance(ours, base) for ours, (base, _) in zip(plain, references, strict=True))
        apart = max(apart, FACTOR * max(lost))
    if (allowed := max(apart, *(item.limit(floor) for item in found))) > DIGITS:
        notes.append(
            f"parity compares no digit here: rounding alone moves the base's own outputs, so that up to "
            f"{allowed:.2g} is allowed; what is proven is the weights"
        )
    return _judged(found, floor, apart)


def _judged(found: list[Errors], floor: float, apart: float) -> Check:
    """Return the check; ``apart`` is how far the injected model may lie from the folded one."""
    data = {item.inputs: vars(item) for item in found}
    for item in found:
        limit = item.limit(floor)
        if item.base > max(SMALL * floor, SOUND * item.own):
            detail = (
                f"error {item.base:.3g} of the base file against the base model, whose own rounding is "
                f"{item.own:.2g}: the exporter or onnxruntime computes something else"
            )
        elif item.folded > limit:
            detail = (
                f"error {item.folded:.3g} against the folded model; the base file's own is {item.base:.3g}"
            )
        elif item.injected > apart + limit:
            detail = f"error {item.injected:.3g} against the injected model"
        else:
            continue
        return Check("parity", ok=False, detail=detail, place=f"{item.inputs} inputs", data=data)
    worst = max(found, key=lambda item: item.folded)
    detail = (
        f"error {worst.folded:.2g} on {' and '.join(item.inputs for item in found)} inputs "
        f"(the base file's: {worst.base:.2g}; against the injected model: {worst.injected:.2g})"
    )
    return Check("parity", ok=True, detail=detail, data=data)


def _cases(subject: Subject, inputs: Inputs, session: Any, notes: list[str]) -> list[_Case]:
    """Return the example, and random inputs of other sizes where the file says that they may vary.

    What the model itself refuses is not tried on the file, and a note says so.
    """
    declared = [list(item.shape) for item in session.get_inputs()]

    def accepted(what: str, *tried: Inputs) -> bool:
        refused = next(filter(None, (_refusal(subject, each) for each in tried)), None)
        if refused is not None:
            notes.append(f"{what} was not tried, since the model refuses it: {refused}")
        return refused is None

    example, name, other = inputs, "random", random_like(inputs, seed=0)
    batch = frozenset(position for position, shape in enumerate(declared) if _is_free(shape, 0))
    if batch_size(inputs) is not None and batch:
        # One item of the example is as good as many, and float64 is slow.
        single, pair = with_batch(inputs, 1, batch), random_like(with_batch(inputs, 2, batch), seed=0)
        if accepted("another batch", single, pair):
            example, name, other = single, "random, in a batch of 2", pair
    if name == "random" and not accepted("a random input", other):
        return [_Case("example", inputs)]
    free = frozenset((position, 1) for position, shape in enumerate(declared) if _is_free(shape, 1))
    if free and len(declared) == len(tensors(inputs)):
        resized = with_length(other, free)
        if accepted("another length", resized):
            name, other = f"{name} and another length", resized
    return [_Case("example", example), _Case(name, other)]


def _refusal(subject: Subject, inputs: Inputs) -> str | None:
    """Return why the base model cannot run on these inputs, or None where it can."""
    try:
        _outputs(subject.base_state, [_Case("", inputs)], None)
    except Exception as error:  # noqa: BLE001 - any refusal has the same consequence
        return _line(error)
    return None


def _is_free(shape: list[Any], axis: int) -> bool:
    """Whether a declared shape leaves the size of an axis open."""
    return len(shape) > axis and not isinstance(shape[axis], int)


def _references(subject: Subject, cases: list[_Case], notes: list[str]) -> list[tuple[Outputs, Outputs]]:
    """Return the base's and the folded model's outputs in float64, or in their own dtype if need be."""
    casts = Casts(torch.float64)
    try:
        base = _outputs(subject.base_state, cases, casts)
        folded = _outputs(subject.folded_state, cases, casts) if subject.adapted else base
    except Exception as error:  # noqa: BLE001 - any refusal of float64 has the same consequence
        notes.append(f"the reference is the model in its own dtype, which refuses float64: {_line(error)}")
        base, folded = (_outputs(state, cases, None) for state in (subject.base_state, subject.folded_state))
    return list(zip(base, folded, strict=True))


def _outputs(state: State, cases: list[_Case], casts: Casts | None) -> list[list[Tensor]]:
    """Return the outputs of a model in some state on each set of inputs."""
    with state() as model, evaluating(model):
        if casts is None:
            return [torch_outputs(model, case.inputs) for case in cases]
        with cast_state(model, casts):
            return [torch_outputs(model, _cast(case.inputs, torch.float64)) for case in cases]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return map_tensors(inputs, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
