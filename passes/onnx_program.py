"""From a torch model to an unoptimised ONNX graph, whose initializers still bear the parameters' names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_fx.errors import ExportError
from lora_fx.passes.onnx_axes import (
    Groups,
    batches,
    dynamic_shapes_of,
    name_axes,
    not_free,
    same_symbols,
    symbolic,
    whole_batches,
)
from lora_fx.passes.onnx_canonical import all_nodes
from lora_fx.passes.onnx_inputs import Axes, batch_size, tensors, varying, with_batch
from lora_fx.passes.onnx_operators import translations
from lora_fx.passes.onnx_quiet import quiet
from lora_fx.passes.onnx_subject import Inputs
from lora_fx.passes.onnx_tensors import TORCH, as_torch, can_hold_weights, from_torch
from lora_fx.passes.onnx_unmerge import unmerge

_UNKNOWN_OUTPUT = re.compile(r"Found <class '([^']+)'> in output, which is not a known type")
"""What torch says of an output that holds an object which is neither a tensor nor a known container."""

_SAME_TYPES = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

DynamicShapes = dict[str, Any] | tuple[Any, ...] | list[Any]


@dataclass(frozen=True)
class Program:
    """An unoptimised ONNX graph: initializers are parameters, by qualified name and in their own layout.

    ``attempt`` says what may vary in it, and whether less could: see ``program``.
    """

    model: ir.Model
    notes: tuple[str, ...] = ()
    attempt: str = ""
    last: bool = True
    _prepared: list[ir.Model] = field(default_factory=list[ir.Model], init=False, repr=False, compare=False)

    @property
    def names(self) -> frozenset[str]:
        """The names of the initializers."""
        return frozenset(self.model.graph.initializers)

    def holding(self, values: Mapping[str, Tensor]) -> Program:
        """Return a copy that holds other values for the named parameters."""
        model = self.model.clone()
        for name, value in values.items():
            model.graph.initializers[name].const_value = from_torch(value, name)
        return replace(self, model=model)

    def prepare(self) -> None:
        """Optimise once, to see that the optimiser works on the graph; the first to ask gets the result.

        Raises:
            ExportError: the exporter's optimiser fails on the graph, with its own reason.
        """
        self._prepared.append(self.optimised())

    def optimised(self, values: Mapping[str, Tensor] | None = None) -> ir.Model:
        """Return an optimised copy, holding other values for the named parameters.

        Raises:
            ExportError: the exporter's optimiser fails on the graph, with its own reason.
        """
        from onnxscript.optimizer import optimize_ir

        if not values and self._prepared:
            return self._prepared.pop()
        model = self.holding(values or {}).model
        try:
            with quiet(), _rules_in_order():
                optimize_ir(model)
        except ir.passes.PassError as error:
            raise ExportError(
                "the model's ONNX graph",
                expected="one that the exporter's own optimiser works on",
                got=reason(error),
                advice="torch.onnx.export fails on the base alike: write that operation otherwise.",
            ) from error
        unmerge(model, self.model)
        _mend_types(model)
        return model


def _mend_types(model: ir.Model) -> None:
    """Cast fused weights back to the dtype of what they are multiplied with.

    Fusing a bfloat16 convolution with its normalisation leaves float32 weights, which no runtime takes.
    """
    for node in all_nodes(model.graph):
        first = node.inputs[0] if node.op_type in _SAME_TYPES and node.inputs else None
        if first is None or first.dtype is None:
            continue
        for value in node.inputs[1:]:
            tensor = None if value is None or not value.is_initializer() else value.const_value
            if value is None or not can_hold_weights(tensor) or tensor is None or tensor.dtype == first.dtype:
                continue
            cast = as_torch(tensor).to(TORCH[first.dtype])
            value.const_value = from_torch(cast, value.name or "")
            value.dtype = first.dtype


def program(
    model: nn.Module,
    inputs: Inputs,
    *,
    dynamic_shapes: DynamicShapes | None,
    opset: int | None,
    like: ir.Model | None = None,
    passed_over: Mapping[str, str] | None = None,
) -> Program:
    """Translate a model as it stands (eval mode, plain forwards) to an unoptimised ONNX graph.

    Without ``dynamic_shapes`` the batch and, for inputs of two or three dimensions, the sequence may
    vary where the model allows it; where translation fails so, less and less may vary, and a note
    says so. Inputs that the model wants in the same batch are given one dimension, unless ``like``, an
    earlier export that the new one is to equal, gave them several. ``passed_over`` are attempts whose
    files were found to be wrong, with the reason: the next ones in which less varies are made.

    Raises:
        ExportError: the model cannot be translated, with the exporter's own reason.
    """
    wrong = dict(passed_over or {})
    notes = [f"not exported with {name}: {why}" for name, why in wrong.items()]
    last: Exception | None = None
    attempts = list(_attempts(model, inputs, dynamic_shapes, like))
    failed = [attempt for attempt in attempts if attempt.name in wrong]
    attempts = [each for each in attempts if not any(each.axes >= other.axes for other in failed)]
    for attempt in attempts:
        try:
            made = _attempted(model, attempt, opset, notes)
            made = replace(made, attempt=attempt.name, last=attempt is attempts[-1])
            made.prepare()
            return made
        except Exception as error:  # the exporter raises many classes  # noqa: BLE001
            last = error
            notes.append(f"not exported with {attempt.name}: {reason(error)}")
    got = reason(last) if last is not None else "nothing to try"
    unknown = _UNKNOWN_OUTPUT.search(got)
    if unknown is not None:
        raise _holds(model, unknown.group(1).rpartition(".")[2]) from last
    raise ExportError(
        type(model).__name__,
        expected="a model that torch.onnx.export can translate",
        got=got,
        advice=_GROUPED if "grouped_mm" in got else _REPORT,
    ) from last


_REPORT = (
    "The model itself is at fault or torch.onnx.export lacks an operator; "
    "torch.onnx.export(model, inputs, dynamo=True, report=True) writes a full report."
)
_GROUPED = (
    "ONNX has no grouped product: let the experts compute otherwise for the export (transformers: "
    'model.set_experts_implementation("batched_mm")).'
)


def _holds(model: nn.Module, kind: str) -> ExportError:
    """Return the error of a model whose output holds, beside tensors, an object of another kind."""
    advice = "Pass example inputs with which it returns tensors alone"
    if "use_cache" in inspect.signature(model.forward).parameters:
        advice += ': with a cache in its outputs, add "use_cache": False to them'
    return ExportError(
        type(model).__name__,
        expected="a model that returns tensors, or containers of them",
        got=f"a {kind} in its output, which torch.export does not know",
        advice=f"{advice}, or wrap it in a module whose forward returns the tensors you need.",
    )


@dataclass(frozen=True)
class _Attempt:
    """One way to translate: with given dynamic shapes, or with axes of our own choice.

    ``together``: the inputs that the model wants in one batch; ``shared``: these have one dimension.
    """

    name: str
    inputs: Inputs
    given: DynamicShapes | None = None
    axes: Axes = frozenset()
    together: Groups = ()
    shared: bool = False


def _attempts(
    model: nn.Module, inputs: Inputs, given: DynamicShapes | None, like: ir.Model | None
) -> Iterator[_Attempt]:
    if given is not None:
        yield _Attempt("the given dynamic shapes", inputs, given)
        return
    # A dimension of size 1 may be taken for a constant: record with a batch of two.
    widened = with_batch(inputs, 2) if batch_size(inputs) == 1 else inputs
    batch, sequence = varying(widened, sequence=False), varying(widened, sequence=True)
    if like is not None and len(like.graph.inputs) == len(tensors(widened)):
        batch, sequence = batch & symbolic(like.graph), sequence & symbolic(like.graph)
    together = batches(model, widened, batch)
    shared = together if like is None or same_symbols(together, like.graph) else ()
    tried = [("a varying batch and sequence", sequence)] if sequence != batch else []
    tried += [("a varying batch", batch)] if batch else []
    for name, axes in tried:
        if shared:
            yield _Attempt(f"{name}, the same batch in several inputs", widened, None, axes, together, True)
        yield _Attempt(name, widened, axes=axes, together=together)
    yield _Attempt("static shapes", inputs)


def _attempted(model: nn.Module, attempt: _Attempt, opset: int | None, notes: list[str]) -> Program:
    exported = _translate(model, attempt, opset)
    kept = whole_batches(attempt.axes - _specialised(exported), attempt.together)
    kept -= not_free(model, attempt.inputs, exported.model, kept)
    if attempt.given is None and kept != attempt.axes:
        # What the model fixes stays a symbol with a range of one in the graph: translate without it.
        fixed = ", ".join(f"dimension {axis} of input {where}" for where, axis in sorted(attempt.axes - kept))
        notes = [*notes, f"the model fixes {fixed}"]
        attempt = replace(attempt, axes=kept)
        exported = _translate(model, attempt, opset)
    translated: ir.Model = exported.model
    _name_outputs(model, attempt.inputs, translated)
    name_axes(translated, attempt.axes)
    return Program(translated, tuple(notes))


def _translate(model: nn.Module, attempt: _Attempt, opset: int | None) -> Any:
    args, kwargs = attempt.inputs
    dynamic = attempt.given
    if attempt.axes:
        dynamic = dynamic_shapes_of(
            model, attempt.inputs, attempt.axes, attempt.together if attempt.shared else ()
        )
    with quiet():
        exported: Any = torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamo=True,
            dynamic_shapes=dynamic,
            opset_version=opset,
            optimize=False,
            verify=False,
            verbose=False,
            custom_translation_table=dict(translations()),
        )
    return exported


def _specialised(exported: Any) -> Axes:
    """Return the axes whose symbol's range is a single size."""
    program: torch.export.ExportedProgram = exported.exported_program
    ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    user = set(program.graph_signature.user_inputs)
    shapes = [
        node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in user and isinstance(node.meta.get("val"), Tensor)
    ]
    return frozenset(
        (position, axis)
        for position, shape in enumerate(shapes)
        for axis, size in enumerate(shape)
        if isinstance(size, int) or _single(ranges.get(str(size)))
    )


def _single(bounds: Any) -> bool:
    return bounds is not None and bounds.lower == bounds.upper


def _name_outputs(model: nn.Module, inputs: Inputs, translated: ir.Model) -> None:
    """Name outputs by their place in what the model returns: ``logits``, ``output_0``, ``output``."""
    with quiet():
        paths, _ = pytree.tree_flatten_with_path(model(*inputs[0], **inputs[1]))
    names = [_path_name(path) for path, leaf in paths if isinstance(leaf, Tensor)]
    outputs = translated.graph.outputs
    taken = {value.name for value in translated.graph.inputs}
    if len(names) != len(outputs) or len(set(names)) != len(names) or taken & set(names):
        return
    inner = {value.name: value for node in translated.graph for value in node.outputs}
    for value, name in zip(outputs, names, strict=True):
        clash = inner.get(name)
        if clash is not None and clash is not value:
            clash.name = f"{name}__inner"
    if len(set(outputs)) == len(outputs) and not any(v.is_graph_input() for v in outputs):
        for value, name in zip(outputs, names, strict=True):
            value.name = name


def _path_name(path: tuple[Any, ...]) -> str:
    steps = [getattr(step, "key", getattr(step, "idx", getattr(step, "name", step))) for step in path]
    text = "_".join(str(step) for step in steps)
    text = re.sub(r"\W+", "_", text)
    return text if text and not text[0].isdigit() else f"output_{text}".rstrip("_")


def reason(error: Exception) -> str:
    """Return the innermost cause of an exporter's error, in one line."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    text = str(inner).strip().splitlines()
    return f"{type(inner).__name__}: {text[0]}" if text else type(inner).__name__


def _rules_in_order() -> AbstractContextManager[None]:
    """Return what makes the optimiser's rules fast, where this onnxscript is one that it knows."""
    try:
        from lora_fx.passes.onnx_matching import first_node_first
    except ImportError:
        return nullcontext()
    return first_node_first()
