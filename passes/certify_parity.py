"""The check that the runtime computes what the torch model does, on example and random inputs.

The reference is the folded model in float64. The runtime's error against it may be three times the
error that the *base* file has against the base model's, or that the *folded* torch model has in float32
where its weights lose more; so a tolerance is never guessed, and a wrong weight cannot hide behind a
lenient one. A base file that is itself wrong would excuse anything: its error
must be of the size of the torch model's own rounding.

Float64 is no reference for an output that the torch model itself gives another value in it: a mask made
of float32's lowest number means something else there, and a choice among equal scores falls otherwise.
Each such output is compared natively, with the torch models in their own dtype, by the same rules; the
rounding that excuses a larger error is what noise in the last place does to the model's own run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_fx.certificates import Check
from lora_fx.passes.certify_errors import DIGITS, FACTOR, FLOOR, SMALL, Errors
from lora_fx.passes.certify_noise import Noise
from lora_fx.passes.onnx_draws import NONE, Draws
from lora_fx.passes.onnx_inputs import batch_size, map_tensors, random_like, tensors, with_batch, with_length
from lora_fx.passes.onnx_parity import (
    Outputs,
    RuntimeFault,
    distance,
    distances,
    feeds_for,
    run,
    torch_outputs,
)
from lora_fx.passes.onnx_state import Casts, cast_state, evaluating
from lora_fx.passes.onnx_subject import Inputs, State, Subject


@dataclass(frozen=True)
class _Case:
    """One set of inputs."""

    name: str
    inputs: Inputs
    drawn: Draws = NONE
    """The outputs that are not compared, since random numbers that the graph draws reach them."""

    def outputs(self, model: nn.Module, dtype: torch.dtype | None = None) -> Outputs:
        """Return what a model gives that can be compared, with floats in some dtype."""
        return self.drawn.others(
            torch_outputs(model, self.inputs if dtype is None else _cast(self.inputs, dtype))
        )


@dataclass(frozen=True)
class _Ran:
    """What one set of inputs gave: in the runtime, in float64 and in the injected model's own dtype."""

    name: str
    ours: Outputs
    theirs: Outputs
    base: Outputs
    folded: Outputs
    injected: Outputs

    def errors(self, apart: list[bool]) -> Errors:
        """Return the distances over the outputs that are not set apart."""
        pairs = (self.ours, self.base), (self.theirs, self.folded), (self.theirs, self.injected)
        base, folded, injected = (_largest(distances(*pair), apart) for pair in pairs)
        own = _largest(distances(self.injected, self.folded), apart)
        return Errors(self.name, base, folded, injected, own)


def parity_check(
    subject: Subject,
    inputs: Inputs,
    base_session: Any,
    folded_session: Any,
    *,
    precision: torch.dtype,
    notes: list[str],
    drawn: Draws = NONE,
) -> Check:
    """Compare the runtime with the torch model on the example and on random inputs of another size.

    Outputs that random numbers drawn in the graph reach (``drawn``) are left out, and a note says so.
    """
    cases = [replace(case, drawn=drawn) for case in _cases(subject, inputs, folded_session, notes)]
    notes += drawn.notes
    ran: list[_Ran] = []
    references = _references(subject, cases, notes)
    injected = _outputs(subject.injected, cases, None)
    for case, (base, folded), native in zip(cases, references, injected, strict=True):
        feeds = feeds_for(folded_session, case.inputs)
        try:
            ours, theirs = (drawn.others(run(each, feeds)) for each in (base_session, folded_session))
        except RuntimeFault as error:
            return Check("parity", ok=False, detail=str(error), place=f"{case.name} inputs")
        ran.append(_Ran(case.name, ours, theirs, base, folded, native))
    if drawn.every:
        return Check("parity", ok=True, detail=drawn.nothing)
    floor = FLOOR[precision]
    apart = _no_reference(subject, cases, ran, min(SMALL * floor, DIGITS))
    found = _widely(subject, cases, ran, apart, floor) if not all(apart) or not apart else []
    names = drawn.others([item.name for item in folded_session.get_outputs()]) if any(apart) else []
    found += _natively(subject, cases, ran, dict(enumerate(names)), apart, floor)
    notes += _vague(found, floor)
    return _judged(found, floor)


def _no_reference(subject: Subject, cases: list[_Case], ran: list[_Ran], least: float) -> list[bool]:
    """Return for each output whether float64 is no reference for it.

    The base or the folded torch model, in its own dtype, lies farther from itself in float64 than rounding
    takes it; they are run only where something else lies so far from it.
    """
    near = [(item.injected, item.folded) for item in ran] + [(item.ours, item.base) for item in ran]
    if all(distance(*pair) <= least for pair in near):
        return [False] * len(ran[0].injected)
    base, folded = (_outputs(state, cases, None) for state in (subject.base_state, subject.folded_state))
    plain = [(found, item.base) for found, item in zip(base, ran, strict=True)]
    plain += [(found, item.folded) for found, item in zip(folded, ran, strict=True)]
    each = [distances(*pair) for pair in plain]
    return [not max(over) <= least for over in zip(*each, strict=True)]


def _widely(
    subject: Subject, cases: list[_Case], ran: list[_Ran], apart: list[bool], floor: float
) -> list[Errors]:
    """Return the errors against float64."""
    found = [item.errors(apart) for item in ran]
    if any(item.folded > item.limit(floor) for item in found):
        plain = _outputs(subject.folded_state, cases, None)
        found = [
            replace(item, rounding=_largest(distances(outputs, each.folded), apart))
            for item, outputs, each in zip(found, plain, ran, strict=True)
        ]
    allowances = _injected_allowances(subject, cases, ran, apart, floor)
    while any(item.injected > item.apart + item.limit(floor) for item in found):
        allowed = next(allowances, None)
        if allowed is None:
            break
        found = [replace(item, apart=max(item.apart, allowed)) for item in found]
    return found


def _injected_allowances(
    subject: Subject, cases: list[_Case], ran: list[_Ran], apart: list[bool], floor: float
) -> Iterator[float]:
    """Yield how far the injected model may lie from the file, by what costs less to find out first.

    It is what the base loses by rounding; then what noise does to the folded model, whose other weights may
    amplify every rounding. The injected one rounds in other places, so that one run of the folded one in its
    own dtype says little of it; the noise counts up to the bound that the file's error has.
    """
    plain = _outputs(subject.base_state, cases, None)
    yield FACTOR * max(
        _largest(distances(ours, each.base), apart) for ours, each in zip(plain, ran, strict=True)
    )
    plain = _outputs(subject.folded_state, cases, None)
    noise = _largest(_noise(subject.folded_state, cases, plain).moved(), apart)
    yield FACTOR * min(noise, SMALL * floor, DIGITS)


def _natively(
    subject: Subject,
    cases: list[_Case],
    ran: list[_Ran],
    names: dict[int, str],
    apart: list[bool],
    floor: float,
) -> list[Errors]:
    """Return the errors of each output set apart, against the torch models in their own dtype."""
    if not any(apart):
        return []
    states = (subject.base_state, subject.folded_state)
    base, folded = (_outputs(state, cases, None) for state in states)

    def errors(noise: list[float]) -> Iterator[Errors]:
        for item, before, after in zip(ran, base, folded, strict=True):
            pairs = (item.ours, before), (item.theirs, after), (item.theirs, item.injected)
            each = zip(*(distances(*pair) for pair in pairs), strict=True)
            for index, (ours, theirs, trained) in enumerate(each):
                if apart[index]:
                    name = names.get(index, f"output {index}")
                    yield Errors(item.name, ours, theirs, trained, own=noise[index], output=name)

    found = list(errors([0.0] * len(apart)))
    if any(item.fault(floor) for item in found):
        noises = [_noise(state, cases, plain) for state, plain in zip(states, (base, folded), strict=True)]
        found = list(errors([max(each) for each in zip(*(noise.moved() for noise in noises), strict=True)]))
        excused = {item.output for item in found if item.limit(floor) > DIGITS}
        chosen = {index: name for index, name in names.items() if apart[index] and name in excused}
        found += _steady(ran, noises, chosen, floor)
    return found


def _steady(ran: list[_Ran], noises: Sequence[Noise], names: dict[int, str], floor: float) -> list[Errors]:
    """Return the errors over what rounding leaves alone of outputs that it excuses as a whole."""
    found: list[Errors] = []
    before, after = noises
    for (case, item), (index, name) in itertools.product(enumerate(ran), names.items()):
        least = min(SMALL * floor, DIGITS)
        alone = max(noise.alone(index, least) for noise in noises)
        first, second = (noise.steady(case, index, least, alone) for noise in noises)
        if first is None or second is None:
            continue
        base = first.distance(item.ours[index], before.plain[case][index])
        folded = second.distance(item.theirs[index], after.plain[case][index])
        trained = second.distance(item.theirs[index], item.injected[index])
        own = max(
            mask.distance(run[case][index], noise.plain[case][index])
            for mask, noise in ((first, before), (second, after))
            for run in noise.noisy
        )
        share = second.share
        found.append(Errors(item.name, base, folded, trained, own=own, output=name, steady=share))
    return found


def _noise(state: State, cases: list[_Case], plain: Sequence[Outputs]) -> Noise:
    """Return what noise does to a model in some state on the inputs."""
    return Noise.of(state, lambda model: [case.outputs(model) for case in cases], plain)


def _largest(measured: list[float], apart: list[bool]) -> float:
    """Return the largest distance over the outputs that are not set apart."""
    if len(measured) != len(apart):
        return max(measured, default=0.0)
    return max((each for each, alone in zip(measured, apart, strict=True) if not alone), default=0.0)


def _vague(found: list[Errors], floor: float) -> list[str]:
    """Return a note on the outputs of which so much is allowed that not one digit is compared."""
    allowed = {item: max(item.apart, item.limit(floor)) for item in found}
    vague = {item.output or "the other outputs" for item in found if allowed[item] > DIGITS}
    steady = dict.fromkeys(item.what for item in found if item.steady is not None and allowed[item] <= DIGITS)
    if not vague:
        return []
    where = "here" if len(vague) == len({item.output for item in found}) else f"of {', '.join(sorted(vague))}"
    why = "rounding alone moves the base's own outputs, so that up to"
    most = max(allowed.values())
    but = f" but in {' and '.join(steady)}" if steady else ""
    return [
        f"parity compares no digit {where}{but}: {why} {most:.2g} is allowed; what is proven is the weights"
    ]


def _judged(found: list[Errors], floor: float) -> Check:
    """Return the check."""
    data = {item.name: vars(item) for item in found}
    for item in found:
        fault = item.fault(floor)
        if fault is not None:
            place = f"{item.inputs} inputs" + (
                f", {item.what} in the model's own dtype" if item.output else ""
            )
            return Check("parity", ok=False, detail=fault, place=place, data=data)
    clear = [item for item in found if item.limit(floor) <= DIGITS] or found
    worst = max(clear, key=lambda item: item.folded)
    natively = sorted({item.output for item in found if item.output})
    detail = (
        f"error {worst.folded:.2g} on {' and '.join(dict.fromkeys(i.inputs for i in found))} inputs "
        f"(the base file's: {worst.base:.2g}; against the injected model: {worst.injected:.2g})"
    )
    if natively:
        detail += f"; float64 is no reference for {', '.join(natively)}, compared in the model's own dtype"
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


def _outputs(state: State, cases: list[_Case], casts: Casts | None) -> list[Outputs]:
    """Return the outputs of a model in some state on each set of inputs."""
    with state() as model, evaluating(model):
        if casts is None:
            return [case.outputs(model) for case in cases]
        with cast_state(model, casts):
            return [case.outputs(model, torch.float64) for case in cases]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return map_tensors(inputs, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
