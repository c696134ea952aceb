"""The check that the runtime computes what the torch model does, on example and random inputs.

The reference is the folded model in float64. The runtime's error against it may be three times the
error that the *base* file has against the base model's; so a tolerance is never guessed, and a wrong
weight cannot hide behind a lenient one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lora_fx.certificates import Check
from lora_fx.passes.onnx_inputs import batch_size, map_tensors, random_like, tensors, with_batch, with_length
from lora_fx.passes.onnx_parity import Outputs, RuntimeFault, distance, feeds_for, run, torch_outputs
from lora_fx.passes.onnx_state import cast_state, evaluating
from lora_fx.passes.onnx_subject import Inputs, State, Subject

FACTOR = 3.0
"""How many times the base's own error the folded file's may be."""
FLOOR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-13}
"""Errors that are not looked into: a few roundings of the outputs' dtype."""
INJECTED = 1e-5
"""How far the injected model may lie from the folded one in float32 (the design's figure)."""


@dataclass(frozen=True)
class Errors:
    """Distances on one set of inputs."""

    inputs: str
    base: float
    folded: float
    injected: float

    def limit(self, floor: float) -> float:
        """Return what the folded file's error may be."""
        return max(FACTOR * self.base, floor)


def parity_check(
    subject: Subject,
    inputs: Inputs,
    base_session: Any,
    folded_session: Any,
    *,
    precision: torch.dtype | None,
    notes: list[str],
) -> Check:
    """Compare the runtime with the torch model on several sets of inputs."""
    found: list[Errors] = []
    for name, given in input_sets(inputs, folded_session):
        if name == "other length" and not _accepts(subject, given, notes):
            continue
        try:
            found.append(_errors(name, subject, given, base_session, folded_session, precision, notes))
        except RuntimeFault as error:
            return Check("parity", ok=False, detail=str(error), place=f"{name} inputs")
    floor = FLOOR[precision or torch.float32]
    data = {item.inputs: vars(item) for item in found}
    for item in found:
        if item.folded > item.limit(floor):
            detail = (
                f"error {item.folded:.3g} against the folded model; the base file's own is {item.base:.3g}"
            )
            return Check("parity", ok=False, detail=detail, place=f"{item.inputs} inputs", data=data)
        if item.injected > INJECTED + item.limit(floor):
            detail = f"error {item.injected:.3g} against the injected model"
            return Check("parity", ok=False, detail=detail, place=f"{item.inputs} inputs", data=data)
    worst = max(found, key=lambda item: item.folded)
    return Check(
        "parity",
        ok=True,
        detail=f"error {worst.folded:.2g} on {', '.join(i.inputs for i in found)} inputs "
        f"(the base file's: {worst.base:.2g}; against the injected model: {worst.injected:.2g})",
        data=data,
    )


def input_sets(inputs: Inputs, session: Any) -> Iterator[tuple[str, Inputs]]:
    """Yield the example, random inputs of its shape, and other sizes where the file says they may vary."""
    declared = [list(item.shape) for item in session.get_inputs()]
    batch = batch_size(inputs)
    varies = batch is not None and any(shape and not isinstance(shape[0], int) for shape in declared)
    small = with_batch(inputs, min(batch, 2)) if varies and batch else inputs
    yield "example", small
    yield "random", random_like(small, seed=0)
    if varies:
        yield "batch of 3", random_like(with_batch(inputs, 3), seed=1)
    lengths = [axis_is_free(shape, 1) for shape in declared]
    if any(lengths) and len(lengths) == len(tensors(inputs)):
        free = frozenset((position, 1) for position, is_free in enumerate(lengths) if is_free)
        yield "other length", with_length(random_like(small, seed=2), free)


def axis_is_free(shape: list[Any], axis: int) -> bool:
    """Whether a declared shape leaves the size of an axis open."""
    return len(shape) > axis and not isinstance(shape[axis], int)


def _accepts(subject: Subject, inputs: Inputs, notes: list[str]) -> bool:
    """Whether the torch model itself takes other lengths; if not, the file's word for it is not tested."""
    try:
        _native(subject.base_state, inputs)
    except Exception as error:  # noqa: BLE001 - any refusal has the same consequence
        notes.append(f"not run with another length, which the model refuses: {type(error).__name__}: {error}")
        return False
    return True


def _errors(
    name: str,
    subject: Subject,
    inputs: Inputs,
    base_session: Any,
    folded_session: Any,
    precision: torch.dtype | None,
    notes: list[str],
) -> Errors:
    fed = inputs if precision is None else _cast(inputs, precision)
    feeds = feeds_for(folded_session, fed)
    base, folded = run(base_session, feeds), run(folded_session, feeds)
    return Errors(
        name,
        base=distance(base, _reference(subject.base_state, inputs, notes)),
        folded=distance(folded, _reference(subject.folded_state, inputs, notes)),
        injected=distance(folded, _native(subject.injected, inputs)),
    )


def _reference(state: State, inputs: Inputs, notes: list[str]) -> Outputs:
    """Return the outputs in float64, or in the model's own dtype where it cannot run in float64."""
    try:
        with state() as model, evaluating(model), cast_state(model, torch.float64):
            return torch_outputs(model, _cast(inputs, torch.float64))
    except Exception as error:  # noqa: BLE001 - any refusal of float64 has the same consequence
        note = f"the reference is the model in its own dtype, not float64: {type(error).__name__}: {error}"
        if note not in notes:
            notes.append(note)
        return _native(state, inputs)


def _native(state: State, inputs: Inputs) -> Outputs:
    with state() as model, evaluating(model):
        return torch_outputs(model, inputs)


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return map_tensors(inputs, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
