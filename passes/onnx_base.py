"""The base graph: one whose structure does not depend on the weights' values, and its map.

The exporter's optimiser looks at values: it drops a bias of zeros and a factor of ones, and merges
small initializers of equal bytes. An adapter that trains such a parameter would then give another
graph than its base. So parameters that leave no trace are set to arbitrary values while the graph is
optimised, and their true values are put back through the map.

The map is tested by what it claims: with other values for all matrices, optimising again must give
exactly what the recipes say, and change nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir
import torch
from torch import Tensor

from lora_fx.fingerprints import fingerprint
from lora_fx.passes.onnx_canonical import all_initializers, all_nodes
from lora_fx.passes.onnx_content import subgraphs, tensor_hash
from lora_fx.passes.onnx_diff import compare
from lora_fx.passes.onnx_mapping import ParameterMap, Placement, Recipe
from lora_fx.passes.onnx_match import Found, Parameters, find_placements, held_as_they_are
from lora_fx.passes.onnx_program import Program
from lora_fx.passes.onnx_tensors import as_torch, can_hold_weights, from_torch, same_bits, same_tensor

Placements = dict[str, Placement]
Values = dict[str, Tensor]

_MOST_GROUPS = 8


def make_base(program: Program, parameters: Parameters) -> tuple[ir.Model, ParameterMap]:
    """Return the optimised base graph, with the exporter's metadata, and its map."""
    job = _Base(program, parameters)
    model, found = job.graph()
    placements = dict(found.placements)
    placements |= job.fused(model, placements, [name for name in job.used if not found.known(name)])
    placements |= job.tested(model, placements)
    return model, ParameterMap({name: job.completed(name, placements[name]) for name in parameters})


def make_graph(program: Program, parameters: Parameters) -> ir.Model:
    """Return the optimised graph alone, made as a base's is."""
    return _Base(program, parameters).graph()[0]


class _Base:
    """The unoptimised graph with its parameters' values, and under which names it holds them."""

    def __init__(self, program: Program, parameters: Parameters) -> None:
        self.program = program
        self.parameters = parameters
        self.used: dict[str, str] = {}
        self.kept: dict[str, Tensor] = {}
        self.refuted: frozenset[str] = frozenset()
        for name, (value, names) in parameters.items():
            if not value.is_floating_point():
                continue  # a counter, or a table of indices: what is in the graph of it never changes
            held = next((each for each in (name, *names) if each in program.names), None)
            if held is not None:
                self.used[name] = held
        self.names = {held: name for name, held in self.used.items()}
        outputs = (value for node in all_nodes(program.model.graph) for value in node.outputs)
        self.producers = {value.name or "": value.producer() for value in outputs}

    def value(self, name: str) -> Tensor:
        """Return a parameter's true value."""
        return self.parameters[name][0].detach().cpu()

    def optimised(self, values: Mapping[str, Tensor]) -> ir.Model:
        """Return the optimised graph with other values for some parameters."""
        values = {**self.kept, **values}
        return self.program.optimised({self.used[name]: value for name, value in values.items()})

    def completed(self, name: str, placement: Placement) -> Placement:
        """Return a placement with the true value's fingerprint."""
        unused = placement.unused or name not in self.used
        return replace(placement, fingerprint=fingerprint(self.parameters[name][0]), unused=unused)

    def graph(self) -> tuple[ir.Model, Found]:
        """Return the optimised graph, and where it holds the parameters."""
        model = self.program.optimised()
        found = find_placements(model, self.parameters)
        unclear = [name for name in self.used if not found.known(name)]
        if unclear:
            model, found = self.with_traces(unclear, model, found)
        obscure = {name: _obscured(found.placements[name]) for name in self.refuted}
        return model, replace(found, placements={**found.placements, **obscure})

    def with_traces(self, unclear: Sequence[str], model: ir.Model, found: Found) -> tuple[ir.Model, Found]:
        """Return a graph in which parameters are to be found that left no clear trace for their values."""
        values = {name: _arbitrary(self.value(name), seed) for seed, name in enumerate(unclear)}
        graph, traced, kept = self._traceable(values, model)
        self.refuted = self._refuted(graph, traced, kept)
        if self.refuted:
            values = {name: value for name, value in values.items() if name not in self.refuted}
            graph, traced, kept = self._traceable(values, model)
        if not kept or not all(traced.known(name) for name in kept):
            return model, found
        restored = {name: self._put_back(graph, traced.placements[name], name) for name in kept}
        if not _holds_only(graph, model, {r.initializer for p in restored.values() for r in p.recipes}):
            return model, found
        self.kept = kept
        # Whatever was clear before is so with the same values in this graph.
        true = find_placements(graph, self.parameters)
        return graph, Found({**true.placements, **restored}, true.ambiguous - set(kept))

    def _traceable(self, values: Values, model: ir.Model) -> tuple[ir.Model, Found, Values]:
        """Return the graph and what is found in it with those of the values that leave a clear trace.

        Parameters that are computed into one constant hide each other (the biases of a convolution and
        of its normalisation). Where the constant is dropped for their true values, those that are used
        alike are tried without the others.
        """
        whole, traced = self._found_with(values, model)
        kept = {name: value for name, value in values.items() if traced.known(name)}
        if len(kept) == len(values):
            return whole, traced, kept
        graph, traced = self._found_with(kept, model) if kept else (model, Found({}))
        for group in self._used_alike([name for name in values if name not in kept]):
            if compare(whole, graph).difference is None:
                break
            together = {**kept, **{name: values[name] for name in group}}
            made = self._found_with(together, model)
            tried = {name: value for name, value in together.items() if name in kept or made[1].known(name)}
            if len(kept) < len(tried) < len(together):
                made = self._found_with(tried, model)
            if len(tried) > len(kept) and all(made[1].known(name) for name in tried):
                (graph, traced), kept = made, tried
        return graph, traced, kept

    def _refuted(self, graph: ir.Model, traced: Found, kept: Values) -> frozenset[str]:
        """Return those of the parameters whose recipe gives one value alone: others are computed otherwise.

        A factor for each element makes any value from any other (an exponential from its exponent), rows
        that are found leave others that may come from the same parameter (a gather's), and what is positive
        is its own absolute value: the test is other values, of both signs.
        """
        others = {
            name: _signed(_arbitrary(v, len(self.used) + i)) for i, (name, v) in enumerate(kept.items())
        }
        wrong = self._unexplained(graph, traced.placements, others, explained=others) if others else ()
        return frozenset(
            name
            for name in others
            if wrong is None or any(r.initializer in wrong for r in traced.placements[name].recipes)
        )

    def _used_alike(self, names: Sequence[str]) -> list[list[str]]:
        """Part parameters by the operators that use them, and as which operand."""
        groups: dict[tuple[tuple[str, int], ...], list[str]] = {}
        for name in names:
            uses = self.program.model.graph.initializers[self.used[name]].uses()
            groups.setdefault(tuple(sorted((u.node.op_type, u.idx) for u in uses)), []).append(name)
        return list(groups.values())

    def _found_with(self, values: Values, model: ir.Model) -> tuple[ir.Model, Found]:
        """Optimise with some arbitrary values; return the graph, and where it holds the parameters.

        A constant that the graph of the true values lacks needs no name to be known by: nothing else
        holds such values.
        """
        graph = self.optimised(values)
        changed = {n: (values.get(n, value), names) for n, (value, names) in self.parameters.items()}
        found = find_placements(graph, changed)
        lost = {n: value for n, value in values.items() if found.placements[n].status == "absent"}
        added = [v for name, v in graph.graph.initializers.items() if name not in model.graph.initializers]
        placements = {**found.placements}
        for name, recipe in held_as_they_are(lost, added).items():
            placements[name] = replace(placements[name], recipes=(recipe,))
        return graph, Found(placements, found.ambiguous)

    def _put_back(self, graph: ir.Model, placement: Placement, name: str) -> Placement:
        """Put a parameter's true value into a graph that was made with another."""
        recipes: list[Recipe] = []
        for recipe in placement.recipes:
            value = graph.graph.initializers[recipe.initializer]
            assert value.const_value is not None
            true = recipe.apply(self.value(name), as_torch(value.const_value))
            value.const_value = from_torch(true, recipe.initializer)
            if recipe.scale is not None and recipe.perm is None:
                recipe = replace(recipe, scale=recipe.scale.exact(self.value(name), true))  # noqa: PLW2901
            recipes.append(recipe)
        return replace(placement, recipes=tuple(recipes))

    def fused(self, model: ir.Model, placements: Placements, names: Sequence[str]) -> Placements:
        """Find which initializers were computed from parameters that lie nowhere as they are.

        With other values, what changes was computed from them, unless a recipe gives the new value.
        What provenance proposed and does not change was computed from a parameter's shape alone.
        """
        found: Placements = {}
        for group in _groups(names):
            moved = {name: _moved(self.value(name), seed) for seed, name in enumerate(group)}
            changed = self._unexplained(model, placements, moved, explained={**self.kept, **moved})
            if changed is None:
                continue
            origins = {place: self._origins(place) for place in changed}
            for name in group:
                opaque = tuple(p for p, known in origins.items() if known is None or name in known)
                found[name] = replace(placements[name], opaque=opaque)
        absent = [name for name, placement in found.items() if placement.status == "absent"]
        return found | self._without_effect(model, placements | found, absent)

    def _without_effect(self, model: ir.Model, placements: Placements, absent: list[str]) -> Placements:
        """Find which of these have no effect on the graph: whatever their values and signs, it is the same.

        They multiplied an empty tensor, say, which the optimiser does away with.
        """
        turned = {name: -self.value(name) for name in absent}
        if not absent or self._unexplained(model, placements, turned, explained=self.kept) != ():
            return {}
        return {name: replace(placements[name], unused=True) for name in absent}

    def _origins(self, place: str) -> frozenset[str] | None:
        """Return the parameters that an initializer was computed from, by the unoptimised graph.

        None: it is no value of that graph, but was made by a rule that fuses operators.
        """
        producer = self.producers.get(place)
        if producer is None:
            return None
        found: set[str] = set()
        met: set[ir.Node] = set()
        stack = [producer]
        while stack:
            node = stack.pop()
            if node in met:
                continue
            met.add(node)
            inner = [each for _, graph in subgraphs(node) for each in all_nodes(graph)]
            for value in itertools.chain(node.inputs, *(each.inputs for each in inner)):
                maker = None if value is None else value.producer()
                if maker is not None:
                    stack.append(maker)
                elif value is not None and value.name in self.names:
                    found.add(self.names[value.name])
        return frozenset(found)

    def tested(self, model: ir.Model, placements: Placements) -> Placements:
        """Optimise with other matrices; return the placements of those that the map does not explain."""
        matrices = [n for n in self.used if placements[n].status == "known" and self.value(n).dim() > 1]
        moved = {name: self.kept.get(name, self.value(name)) * -2 for name in matrices}
        wrong = self._unexplained(model, placements, moved, explained={**self.kept, **moved})
        if wrong is None:
            # Constants that equal each other for their true values alone make it another graph.
            thin = {n: _obscured(placements[n]) for n in matrices if self._fits_anything(placements[n])}
            if thin:
                return thin | self.tested(model, placements | thin)
            wrong = tuple(model.graph.initializers)
        doubtful: Placements = {}
        for place in wrong:
            # Nothing says which matrix an unexplained change comes from, unless a recipe claims the place.
            owners = [n for n in matrices if any(r.initializer == place for r in placements[n].recipes)]
            for owner in owners or matrices:
                before = doubtful.get(owner, placements[owner])
                doubtful[owner] = replace(before, opaque=(*before.opaque, place))
        return doubtful

    def _fits_anything(self, placement: Placement) -> bool:
        """Whether a recipe has a factor for each element, or says nothing of some rows."""
        return any(
            r.runs is not None or (r.scale is not None and len(r.scale.factors) == math.prod(r.shape))
            for r in placement.recipes
        )

    def _unexplained(
        self,
        model: ir.Model,
        placements: Mapping[str, Placement],
        values: Mapping[str, Tensor],
        *,
        explained: Mapping[str, Tensor],
    ) -> tuple[str, ...] | None:
        """Optimise with other values; return the initializers that recipes for some do not explain.

        None: the graph is another.
        """
        comparison = compare(model, self.optimised(values))
        if comparison.difference is not None:
            return None
        expected: dict[str, Tensor] = {}
        for name, value in explained.items():
            for recipe in placements[name].recipes:
                tensor = model.graph.initializers[recipe.initializer].const_value
                assert tensor is not None
                current = expected.get(recipe.initializer, as_torch(tensor))
                expected[recipe.initializer] = recipe.apply(value, current)
        return tuple(
            ours.name or ""
            for ours, theirs in comparison.pairs
            if not _as_expected(ours, theirs, expected.get(ours.name or ""))
        )


def _holds_only(graph: ir.Model, model: ir.Model, but: set[str]) -> bool:
    """Whether a graph's float initializers, except some, hold what the other's do."""
    known = {_content(value) for value in all_initializers(model.graph)}
    return all(value.name in but or _content(value) in known for value in all_initializers(graph.graph))


def _obscured(placement: Placement) -> Placement:
    """Return a placement in which nothing is known of the initializers that there were recipes for."""
    claimed = (recipe.initializer for recipe in placement.recipes)
    return replace(placement, recipes=(), opaque=tuple(dict.fromkeys((*placement.opaque, *claimed))))


def _content(value: ir.Value) -> str:
    return "" if value.const_value is None else tensor_hash(value.const_value)


def _as_expected(ours: ir.Value, theirs: ir.Value, expected: Tensor | None) -> bool:
    if expected is None:
        return same_tensor(ours.const_value, theirs.const_value)
    tensor = theirs.const_value
    return tensor is not None and can_hold_weights(tensor) and same_bits(as_torch(tensor), expected)


def _arbitrary(value: Tensor, seed: int) -> Tensor:
    """Return values that no rule of an optimiser asks for, unlike those of any other parameter."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(value.shape, generator=generator, dtype=torch.float64) + 1.5).to(value.dtype)


def _signed(value: Tensor) -> Tensor:
    """Return the same magnitudes, every other one negative, the first among them."""
    signs = torch.ones(value.numel(), dtype=value.dtype)
    signs[::2] = -1
    return value * signs.reshape(value.shape)


def _groups(names: Sequence[str]) -> list[list[str]]:
    """Part parameters by their last name, so that what a bias does is told from what a weight does."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[2], []).append(name)
    return list(groups.values()) if len(groups) <= _MOST_GROUPS else [list(names)]


def _moved(value: Tensor, seed: int) -> Tensor:
    """Return other values, of the same signs where they are large, that no normalisation undoes."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.rand(value.shape, generator=generator, dtype=torch.float64) + 1.0
    return (value.detach().cpu().double() * factor + 0.375).to(value.dtype)
