"""What peft's adapters are written against: a model's parameters as peft would wrap them. No module here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lora_fx.matrix import MatrixForm, rows_form, stacked_form
from lora_fx.sites import Site

LayerKind = Literal["linear", "conv", "embedding", "attention", "attention-out", "parameter"]
"""Which of peft's wrappers a parameter gets: ``attention`` is the packed in-projection of an
``nn.MultiheadAttention``, ``attention-out`` its output projection, ``parameter`` what
``target_parameters`` reaches."""

BASE = ".base_layer"
"""What peft puts into a path at every module that it wraps."""


@dataclass(frozen=True)
class Layer:
    """One parameter as peft would adapt it.

    ``path`` is its module's; ``form`` how peft reads it, ``B A`` being a delta of that matrix.
    ``obstacle`` says why a peft adapter of it is no change of the weight (None: it is one); ``branch``
    whether the module's own forward is one that lora_fx computes as a branch.
    """

    path: str
    attribute: str
    kind: LayerKind
    form: MatrixForm
    obstacle: str | None = None
    branch: bool = False

    @property
    def name(self) -> str:
        """The parameter's qualified name."""
        return f"{self.path}.{self.attribute}" if self.path else self.attribute

    @property
    def key(self) -> str:
        """The name that peft matches rank and alpha patterns against."""
        if self.kind == "parameter":
            return self.name
        return self.path.rpartition(".")[0] if self.kind == "attention-out" else self.path


@dataclass(frozen=True)
class Layout:
    """A model as peft files see it: ``layers`` by parameter name, every module's path, the base's state.

    ``state`` holds every parameter and saved buffer by every qualified name, ``parameters`` which of
    them are parameters; ``origin`` is where the base was loaded from, as the model says.
    """

    layers: Mapping[str, Layer]
    sites: tuple[Site, ...]
    modules: tuple[str, ...]
    state: Mapping[str, Tensor]
    parameters: frozenset[str]
    model: str = ""
    origin: str | None = None
    base_parameters: int = 0
    by_path: Mapping[str, tuple[Layer, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Index the layers by their modules, each in the order of its module's parameters."""
        found: dict[str, tuple[Layer, ...]] = {}
        for layer in self.layers.values():
            found[layer.path] = (*found.get(layer.path, ()), layer)
        object.__setattr__(self, "by_path", found)


def as_parameter(layer: Layer) -> Layer:
    """Return a parameter as ``target_parameters`` reads it: one matrix, or a stack of experts."""
    shape = layer.form.shape
    form = layer.form if layer.kind == "parameter" or len(shape) > 3 else stacked_or_rows(shape)
    obstacle = layer.obstacle if layer.kind in ("parameter", "attention-out", "conv") else None
    return Layer(layer.path, layer.attribute, "parameter", form, obstacle)


def stacked_or_rows(shape: tuple[int, ...], *, transposed: bool = False) -> MatrixForm:
    """Return how peft reads a parameter that is no layer's weight: (out, in), or experts of these."""
    return stacked_form(shape, transposed=transposed) if len(shape) == 3 else rows_form(shape)


def wrapped_path(path: str, wrappers: Mapping[str, int]) -> str:
    """Return a module's path in a model in which peft wraps modules, each so many times."""
    done: list[str] = []
    parts = path.split(".") if path else []
    for index, part in enumerate(parts):
        done.append(
            part + BASE * (wrappers.get(".".join(parts[: index + 1]), 0) if index + 1 < len(parts) else 0)
        )
    return ".".join(done)


def plain_path(path: str) -> str:
    """Return a path without what peft's wrappers put into it."""
    return path.replace(BASE, "")


def matching_key(patterns: Iterable[str], key: str) -> str | None:
    """Return the first of peft's patterns that matches a key: whole, or what follows a dot."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", key)), None)
