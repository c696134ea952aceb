"""Which dimensions of an exported graph vary, which of them are one, and what they are called."""

from __future__ import annotations

import inspect
import itertools
import re
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from lora_fx.passes.onnx_canonical import all_nodes
from lora_fx.passes.onnx_inputs import Axes, batch_size, map_tensors, tensors, with_batch, with_length
from lora_fx.passes.onnx_quiet import quiet
from lora_fx.passes.onnx_subject import Inputs

Groups = tuple[frozenset[int], ...]
"""Positions of inputs that are one batch: several of them in each group."""

_MOST_INPUTS = 6
"""Up to this many inputs it is tried out which of them are one batch."""


def batches(model: nn.Module, inputs: Inputs, axes: Axes) -> Groups:
    """Return which inputs the model wants in the same batch, found by running it on batches that differ.

    An input's group is the smallest one that can be given a larger or a smaller batch than the rest: both
    inputs of a masked encoder, but not the images and the texts of a model that compares each with each.
    """
    left = sorted(position for position, axis in axes if axis == 0)
    batch = batch_size(inputs)
    if not 1 < len(left) <= _MOST_INPUTS or not batch:
        return ()
    inputs = map_tensors(inputs, _some_masked)

    def apart(group: frozenset[int]) -> bool:
        sides = (group, frozenset(left) - group)
        return all(_runs(model, with_batch(inputs, batch + 1, side)) for side in sides)

    found: list[frozenset[int]] = []
    while left:
        smallest_first = (
            frozenset((left[0], *others))
            for count in range(len(left))
            for others in itertools.combinations(left[1:], count)
        )
        group = next(filter(apart, smallest_first), None)
        if group is None:
            return ()
        found.append(group)
        left = [position for position in left if position not in group]
    return tuple(group for group in found if len(group) > 1)


def whole_batches(axes: Axes, groups: Groups) -> Axes:
    """Return the varying axes without the batch of each group in which some input's batch is fixed.

    The exporter fixes the batch of those inputs alone over which the model loops.
    """
    fixed = [group for group in groups if not all((position, 0) in axes for position in group)]
    return axes - {(position, 0) for group in fixed for position in group}


def symbolic(graph: ir.Graph) -> Axes:
    """Return the axes of a graph's inputs that may vary."""
    return frozenset(
        (position, axis)
        for position, value in enumerate(graph.inputs)
        for axis, size in enumerate(value.shape or ())
        if not isinstance(size, int)
    )


def same_symbols(groups: Groups, graph: ir.Graph) -> bool:
    """Whether a graph calls the batch alike in all inputs of each group."""
    shapes = [value.shape for value in graph.inputs]
    names = [
        {str(shape[0]) if (shape := shapes[position]) else "" for position in group if position < len(shapes)}
        for group in groups
    ]
    return all(len(each) == 1 for each in names)


def _some_masked(tensor: Tensor) -> Tensor:
    """Return a mask of ones with zeros between them: a model may pass over one that masks nothing."""
    if tensor.is_floating_point() or tensor.is_complex() or not bool((tensor == 1).all()):
        return tensor
    flat = torch.arange(tensor.numel(), device=tensor.device) % 2 == 0
    return flat.reshape(tensor.shape).to(tensor.dtype)


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    args, kwargs = inputs
    try:
        with quiet():
            model(*args, **kwargs)
    except Exception:  # noqa: BLE001 - whatever the model says against it, it does not want it
        return False
    return True


def dynamic_shapes_of(model: nn.Module, inputs: Inputs, axes: Axes, shared: Groups = ()) -> dict[str, Any]:
    """Return the varying dimensions in the form that ``torch.export`` takes.

    ``Dim.AUTO`` makes static what the model does not allow to vary. The inputs of each group in
    ``shared`` have one batch, which the exporter refuses where the model does not allow it to vary.
    """
    one_batch = {where: Dim(f"batch_of_{min(group)}") for group in shared for where in group}
    positions = iter(range(len(tensors(inputs))))

    def dims(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        position = next(positions)
        batch = one_batch.get(position, Dim.AUTO)
        return {axis: Dim.AUTO if axis else batch for where, axis in axes if where == position}

    signature = inspect.signature(model.forward)
    bound = signature.bind(*inputs[0], **inputs[1])
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        spec = pytree.tree_map(dims, value)
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named |= spec
        else:
            named[name] = spec
    return named


def not_free(model: nn.Module, inputs: Inputs, translated: ir.Model, axes: Axes) -> Axes:
    """Return the varying axes other than the batch, if the graph fixes an output that varies with them.

    The exporter has been seen to leave an input's axis open whose size it had written into the graph.
    """
    lengths = frozenset((position, axis) for position, axis in axes if axis > 0)
    if not lengths:
        return frozenset()
    args, kwargs = with_length(inputs, lengths)
    try:
        with quiet():
            leaves = pytree.tree_leaves(model(*args, **kwargs))
    except Exception:  # noqa: BLE001 - a model may refuse this length; then it says nothing
        return frozenset()
    found = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
    declared = [value.shape for value in translated.graph.outputs]
    agree = len(found) == len(declared) and all(
        shape is None
        or (
            len(shape) == len(actual)
            and all(not isinstance(dim, int) or dim == size for dim, size in zip(shape, actual, strict=True))
        )
        for shape, actual in zip(declared, found, strict=True)
    )
    return frozenset() if agree else lengths


def name_axes(translated: ir.Model, axes: Axes) -> None:
    """Call the varying axes of our own choice ``batch`` and ``sequence``, wherever they occur."""
    named: dict[str, str] = {}
    for position, axis in sorted(axes, key=lambda item: (item[1], item[0])):
        shape = translated.graph.inputs[position].shape
        symbol = None if shape is None else shape[axis]
        if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None and symbol.value not in named:
            word = "batch" if axis == 0 else "sequence"
            count = sum(each.startswith(word) for each in named.values())
            named[str(symbol.value)] = f"{word}_{count + 1}" if count else word
    if not named or not all(symbol.isidentifier() for symbol in named):
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, named)) + r")\b")
    inner = (value for node in all_nodes(translated.graph) for value in node.outputs)
    for value in itertools.chain(translated.graph.inputs, inner):
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape(
                [
                    pattern.sub(lambda found: named[found.group()], str(dim.value))
                    if isinstance(dim, ir.SymbolicDim) and dim.value is not None
                    else dim
                    for dim in value.shape
                ]
            )
