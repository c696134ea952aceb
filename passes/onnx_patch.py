"""Patches: what an adapter makes of a base file's initializers, computed when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
from torch import Tensor

from lora_fx.errors import ExportError
from lora_fx.passes.new_values import Observe, changed_in_bands, new_value
from lora_fx.passes.onnx_mapping import ParameterMap, Placement, Recipe
from lora_fx.passes.onnx_tensors import as_torch, from_torch, shape_of
from lora_fx.passes.weights import Weights


@dataclass(frozen=True)
class Step:
    """One parameter in one initializer."""

    name: str
    recipe: Recipe
    placement: Placement


@dataclass(frozen=True)
class Patch:
    """One initializer that the adapter changes: its tensor in the base, and the parameters in it."""

    initializer: str
    base: ir.TensorProtocol
    steps: tuple[Step, ...]
    weights: Weights

    @property
    def owner(self) -> str:
        """The names of the parameters that it holds."""
        return ", ".join(step.name for step in self.steps)

    def value(self, observe: Observe | None = None) -> Tensor:
        """Return the initializer's new value, of the same shape and dtype."""
        held = as_torch(self.base)
        own = isinstance(self.base, ir.ExternalTensor)  # read for this, and so ours to write into
        for step in self.steps:
            if not own or not self._banded(step, held, observe):
                held = self._stepped(step, held, observe)
        return held

    def _banded(self, step: Step, held: Tensor, observe: Observe | None) -> bool:
        """Change a large weight where it lies; False: it cannot be."""
        recipe = step.recipe
        if recipe.runs is not None or recipe.scale is not None:
            return False
        return changed_in_bands(self.weights, step.name, recipe.restore(held, step.placement.shape), observe)

    def _stepped(self, step: Step, held: Tensor, observe: Observe | None) -> Tensor:
        before = step.recipe.restore(held, step.placement.shape).contiguous()
        return step.recipe.apply(new_value(self.weights, step.name, before, observe), held)

    def lazy(self, observe: Observe | None = None) -> ir.LazyTensor:
        """Return the new value as a tensor that is computed when it is written, and not kept."""
        return ir.LazyTensor(
            lambda: from_torch(self.value(observe), self.initializer),
            dtype=self.base.dtype,
            shape=ir.Shape(shape_of(self.base)),
            name=self.initializer,
            cache=False,
        )


@dataclass(frozen=True)
class Patches:
    """Every patch, and what cannot be patched.

    ``opaque`` maps initializers without a recipe to the parameter that is in them; ``missing`` are
    parameters that the file should hold and does not, ``unused`` those that its graph has no use for.
    """

    patches: tuple[Patch, ...]
    opaque: dict[str, str] = field(default_factory=dict[str, str])
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def require(self, where: str) -> tuple[Patch, ...]:
        """Return the patches, where they are all there is to do.

        Raises:
            ExportError: a parameter is opaque or missing.
        """
        for initializer, name in self.opaque.items():
            raise ExportError(
                f"{where}: {name}",
                expected="a weight that lies in the file in a known way",
                got=f"the initializer {initializer!r}, which was computed from it and from others",
                advice="Export the adapted model instead: export_onnx(model, path, inputs, base=...).",
            )
        for name in self.missing:
            raise ExportError(
                f"{where}: {name}",
                expected="the file to hold this weight",
                got="no initializer for it",
                advice="The file is of another model, or its exporter dropped the weight: export the adapted "
                "model with a new base.",
            )
        return self.patches


def find_patches(base: ir.Model, mapping: ParameterMap, weights: Weights) -> Patches:
    """Return how a base model is changed by an adapter."""
    steps: dict[str, list[Step]] = {}
    opaque: dict[str, str] = {}
    missing: list[str] = []
    unused: list[str] = []
    for name in weights.names:
        placement = mapping.find(name)
        if placement is not None and placement.unused:
            unused.append(name)
            continue
        if placement is None or placement.status == "absent":
            missing.append(name)
            continue
        opaque |= dict.fromkeys(placement.opaque, name)
        for recipe in placement.recipes:
            steps.setdefault(recipe.initializer, []).append(Step(name, recipe, placement))
    initializers = base.graph.initializers
    made: list[Patch] = []
    for initializer, listed in steps.items():
        if initializer in opaque:
            continue
        tensor = initializers[initializer].const_value
        assert tensor is not None
        made.append(Patch(initializer, tensor, tuple(listed), weights))
    return Patches(tuple(made), opaque, tuple(missing), tuple(unused))
