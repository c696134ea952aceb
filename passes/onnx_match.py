"""Finding the recipes: provenance proposes initializers, values decide.

An initializer is a candidate for a parameter when it bears its name or the exporter's optimiser noted
that it was folded from it. A name alone proves nothing (a convolution fused with its normalisation
keeps its weight's name and holds other values), so each recipe must give the initializer's bits
exactly, and what no recipe gives is called opaque.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from lora_fx.fingerprints import Fingerprint, fingerprint
from lora_fx.passes.onnx_canonical import all_initializers
from lora_fx.passes.onnx_mapping import ParameterMap, Placement, Recipe, Run, Scale
from lora_fx.passes.onnx_tensors import as_torch, can_hold_weights, dtype_name, same_bits, sha256, shape_of
from lora_fx.passes.onnx_unmerge import FOLDED_FROM

_MAX_SCALED = 4


Parameters = Mapping[str, tuple[Tensor, tuple[str, ...]]]
"""Values, and all their names, by the first of these."""


@dataclass(frozen=True)
class Found:
    """Placements without fingerprints, and the parameters whose values fit two recipes that differ."""

    placements: Mapping[str, Placement]
    ambiguous: frozenset[str] = frozenset()

    def known(self, name: str) -> bool:
        """Whether it is certain how a parameter lies in the file."""
        return self.placements[name].status == "known" and name not in self.ambiguous


def find_placements(model: ir.Model, parameters: Parameters) -> Found:
    """Return how every parameter lies in an optimised model, which still has its exporter's metadata.

    ``parameters`` gives, by qualified name, the value that was exported and all the names.
    """
    sources = provenance(all_initializers(model.graph))
    placements: dict[str, Placement] = {}
    ambiguous: set[str] = set()
    for name, (value, names) in parameters.items():
        candidates = {v.name or "": v for each in (name, *names) for v in sources.get(each, ())}
        fitting = {label: recipes_for(value, candidate) for label, candidate in candidates.items()}
        if any(len(recipes) > 1 for recipes in fitting.values()):
            ambiguous.add(name)
        known = tuple(recipes[0] for recipes in fitting.values() if recipes)
        obscure = tuple(label for label, recipes in fitting.items() if not recipes)
        placements[name] = Placement(known, obscure, names, shape=tuple(value.shape))
    return Found(placements, frozenset(ambiguous))


def held_as_they_are(values: Mapping[str, Tensor], initializers: Iterable[ir.Value]) -> dict[str, Recipe]:
    """Return which of the values an initializer holds bit for bit, whatever it is called."""
    found: dict[str, Recipe] = {}
    for initializer in initializers if values else ():
        tensor = initializer.const_value
        if tensor is None or not can_hold_weights(tensor):
            continue
        held = as_torch(tensor)
        for name, value in values.items():
            if same_bits(value, held):
                found[name] = Recipe(initializer.name or "", tuple(held.shape), dtype_name(tensor))
    return found


def map_by_fingerprint(model: ir.Model, fingerprints: Mapping[str, Fingerprint]) -> ParameterMap:
    """Return where a file of any make holds the weights of these fingerprints, as they are or transposed."""
    wanted = {(stored.shape, stored.dtype) for stored in fingerprints.values()}
    held: dict[tuple[tuple[int, ...], str], list[Recipe]] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or not can_hold_weights(tensor):
            continue
        recipe = Recipe(value.name or "", shape_of(tensor), dtype_name(tensor))
        if (recipe.shape, recipe.dtype) in wanted:
            held.setdefault((recipe.shape, sha256(tensor)), []).append(recipe)
        if len(recipe.shape) == 2 and (recipe.shape[::-1], recipe.dtype) in wanted:
            moved = fingerprint(as_torch(tensor).t())
            held.setdefault((moved.shape, moved.sha256), []).append(replace(recipe, perm=(1, 0)))
    return ParameterMap(
        {
            name: Placement(
                tuple(held.get((stored.shape, stored.sha256), ())), (), (name,), stored, stored.shape
            )
            for name, stored in fingerprints.items()
        }
    )


def provenance(initializers: Iterable[ir.Value]) -> dict[str, list[ir.Value]]:
    """Return the float initializers by the names of what they were made from."""
    found: dict[str, list[ir.Value]] = {}
    for value in initializers:
        if not can_hold_weights(value.const_value):
            continue
        noted = value.metadata_props.get(FOLDED_FROM)
        origins = {value.name or "", *(ast.literal_eval(noted) if noted else ())}
        for origin in origins:
            found.setdefault(origin, []).append(value)
    return found


def recipes_for(value: Tensor, initializer: ir.Value) -> tuple[Recipe, ...]:
    """Return the recipes that make an initializer from a parameter's value, bit for bit.

    There are several where the value is too regular to tell (zeros, a symmetric matrix), unless they
    would do the same to any value.
    """
    tensor = initializer.const_value
    assert tensor is not None
    held = as_torch(tensor)
    value = value.detach().cpu()
    fitting: list[Recipe] = []
    for recipe in _proposals(value, held, initializer.name or "", dtype_name(tensor)):
        if fitting and (recipe.scale is not None or recipe.runs is not None):
            break
        if not same_bits(recipe.apply(value, held), held):
            continue
        if not fitting:
            fitting.append(recipe)
        elif not _same_effect(fitting[0], recipe, value, held):
            return (fitting[0], recipe)
    return tuple(fitting)


def _same_effect(a: Recipe, b: Recipe, value: Tensor, held: Tensor) -> bool:
    """Whether two recipes agree on a value of which no two elements are the same."""
    count = torch.arange(value.numel(), dtype=torch.float64).reshape(value.shape)
    wide = [replace(recipe, dtype="float64") for recipe in (a, b)]
    return torch.equal(*(recipe.apply(count, held.double()) for recipe in wide))


def _proposals(value: Tensor, held: Tensor, name: str, dtype: str) -> Iterator[Recipe]:
    shape = tuple(held.shape)
    cast = value.to(held.dtype)
    for perm in _permutations(cast, held):
        yield Recipe(name, shape, dtype, perm)
    for axis in range(value.dim()) if value.shape == held.shape and value.dim() > 1 else ():
        scale = _scale(cast, held, axis)
        if scale is not None:
            yield Recipe(name, shape, dtype, scale=scale.exact(cast, held))
    for perm in (None, (1, 0)) if value.dim() == 2 else (None,):
        runs = _runs(cast if perm is None else cast.permute(perm), held)
        if runs:
            yield Recipe(name, shape, dtype, perm, runs=runs)


def _permutations(value: Tensor, held: Tensor) -> Iterator[tuple[int, ...] | None]:
    """Yield the permutations under which the first elements agree."""
    if value.numel() != held.numel():
        return
    yield None
    probe = held.reshape(-1)[:64]
    for perm in itertools.permutations(range(value.dim())) if 1 < value.dim() <= 4 else ():
        moved = value.permute(perm)
        if perm != tuple(range(value.dim())) and same_bits(_first(moved, len(probe)), probe):
            yield perm


def _first(tensor: Tensor, count: int) -> Tensor:
    """Return the first elements in row-major order without copying the whole tensor."""
    while tensor.dim() > 1:
        inner = tensor[0].numel()
        tensor = tensor[: -(-count // inner)].flatten(0, 1) if inner < count else tensor[0]
    return tensor[:count]


def _scale(value: Tensor, held: Tensor, axis: int) -> Scale | None:
    """Return the factor along an axis that gives ``held = value * factor`` in every bit.

    The quotient of the largest elements fixes each factor to a few neighbours; the product decides.
    """
    count = value.shape[axis]
    ours = value.movedim(axis, 0).reshape(count, -1)
    theirs = held.movedim(axis, 0).reshape(count, -1)
    peak = ours.abs().argmax(dim=1, keepdim=True)
    guess = (theirs.double().gather(1, peak) / ours.double().gather(1, peak)).to(value.dtype)
    if not bool(guess.isfinite().all()):
        return None
    found = torch.full_like(guess, float("nan"))
    for candidate in _neighbours(guess):
        fits = (ours * candidate == theirs).all(dim=1, keepdim=True) & found.isnan()
        found = torch.where(fits, candidate, found)
    if bool(found.isnan().any()):
        return None
    return Scale(axis, tuple(found.flatten().float().tolist()))


def _neighbours(guess: Tensor) -> Iterator[Tensor]:
    yield guess
    up = down = guess
    for _ in range(_MAX_SCALED):
        up = torch.nextafter(up, torch.full_like(up, float("inf")))
        down = torch.nextafter(down, torch.full_like(down, float("-inf")))
        yield up
        yield down


def _runs(value: Tensor, held: Tensor) -> tuple[Run, ...] | None:
    """Return the rows of ``held`` that are rows of ``value``, as runs; None where none or ambiguous."""
    ours = value.contiguous().view(-1, 1) if value.dim() < 2 else value.contiguous().view(-1, value.shape[-1])
    theirs = held.reshape(-1, 1) if value.dim() < 2 or held.dim() < 2 else held.reshape(-1, held.shape[-1])
    if ours.shape[1] != theirs.shape[1]:
        return None
    index: dict[bytes, int] = {}
    for row, content in enumerate(_row_bytes(ours)):
        if content in index:
            return None
        index[content] = row
    pairs = [(row, index[content]) for row, content in enumerate(_row_bytes(theirs)) if content in index]
    # Every row of the parameter must be accounted for, or a change to it could go astray.
    return _compress(pairs) if {origin for _, origin in pairs} == set(index.values()) else None


def _row_bytes(matrix: Tensor) -> list[bytes]:
    # Not contiguous(): a dimension of one entry may keep any stride, and bytes ask for one of 1.
    whole = matrix.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
    return [row.tobytes() for row in whole]


def _compress(pairs: Sequence[tuple[int, int]]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for row, origin in pairs:
        if runs and runs[-1][0] + runs[-1][2] == row and runs[-1][1] + runs[-1][2] == origin:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((row, origin, 1))
    return tuple(runs)
