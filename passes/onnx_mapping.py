"""From parameters to initializers: how each one lies in an ONNX file, and the same for other values.

An initializer ``T`` holds a parameter ``V`` as::

    T[rows] = cast(permute(V * scale))[rows]

with an optional scale along one axis of ``V`` (a fused normalisation), a permutation of its axes
(``MatMul`` wants the transpose), a cast, and runs of rows where only some are held or their order is
another (recurrent gates, slices, concatenations). The map is kept in the base file's metadata.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import Tensor

from lora_fx.errors import ExportError
from lora_fx.fingerprints import Fingerprint
from lora_fx.passes.onnx_tensors import as_torch

MAPPING_KEY = "lora_fx.mapping"
MAPPING_VERSION = 1

Run = tuple[int, int, int]
"""Rows of an initializer that hold rows of a parameter: (start in it, start in the parameter, length)."""

Status = Literal["known", "opaque", "absent", "unused"]


@dataclass(frozen=True)
class Scale:
    """A factor along one axis of a parameter, and what brings the parameter back in every bit.

    Dividing by the factor misses the parameter by a unit in the last place or two; ``residue`` holds
    these units, one small integer for each element.
    """

    axis: int
    factors: tuple[float, ...]
    residue: bytes = b""

    def along(self, weight: Tensor) -> Tensor:
        """Return the factors, shaped to multiply the weight with."""
        shape = [1] * weight.dim()
        shape[self.axis] = -1
        return torch.tensor(self.factors, dtype=torch.float32).reshape(shape).to(weight.dtype)

    def undo(self, scaled: Tensor) -> Tensor:
        """Return the parameter from its scaled value."""
        quotient = (scaled / self.along(scaled)).contiguous()
        if not self.residue:
            return quotient
        units = torch.frombuffer(bytearray(zlib.decompress(self.residue)), dtype=torch.int8)
        bits = _as_bits(quotient) + units.reshape(scaled.shape).to(_bits(scaled.dtype))
        return bits.view(scaled.dtype)

    def exact(self, weight: Tensor, scaled: Tensor) -> Scale:
        """Return the same scale with the residue for this weight, where one byte holds it."""
        gap = _as_bits(weight) - _as_bits(scaled / self.along(scaled))
        if int(gap.abs().max()) > 127:
            return self
        packed = zlib.compress(gap.to(torch.int8).numpy().tobytes(), 6)
        return Scale(self.axis, self.factors, packed)

    def to_json(self) -> dict[str, Any]:
        """Return plain data: the factors as base64 of little-endian float32, the residue as base64."""
        packed = torch.tensor(self.factors, dtype=torch.float32).numpy().astype("<f4").tobytes()
        return {
            "axis": self.axis,
            "factors": base64.b64encode(packed).decode(),
            "residue": base64.b64encode(self.residue).decode(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scale:
        """Read what ``to_json`` wrote."""
        packed = bytearray(base64.b64decode(data["factors"]))
        factors = torch.frombuffer(packed, dtype=torch.float32).tolist()
        return cls(int(data["axis"]), tuple(factors), base64.b64decode(data["residue"]))


def _bits(dtype: torch.dtype) -> torch.dtype:
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def _as_bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_bits(tensor.dtype))


@dataclass(frozen=True)
class Recipe:
    """How one initializer holds one parameter (see the module's text).

    ``shape`` and ``dtype`` are the initializer's. Without ``runs`` it holds the whole parameter,
    reshaped; with them, both are read as matrices whose rows run over all axes but the last (of a
    vector, and of what holds a vector: over every element).
    """

    initializer: str
    shape: tuple[int, ...]
    dtype: str
    perm: tuple[int, ...] | None = None
    scale: Scale | None = None
    runs: tuple[Run, ...] | None = None

    @property
    def label(self) -> str:
        """Say in a few words how it lies there."""
        steps = [
            "row scale" if self.scale else "",
            "transpose" if self.perm else "",
            "rows" if self.runs is not None else "",
        ]
        return " + ".join(filter(None, steps)) or "identity"

    def apply(self, weight: Tensor, current: Tensor) -> Tensor:
        """Return the initializer's value for a parameter's; ``current`` gives the rows it does not hold."""
        made = weight if self.scale is None else weight * self.scale.along(weight)
        if self.perm is not None:
            made = made.permute(self.perm)
        made = made.to(getattr(torch, self.dtype))
        if self.runs is None:
            return made.reshape(self.shape).contiguous()
        result = current.clone()
        target, source = _rows(result, vector=made.dim() < 2), _rows(made.contiguous())
        for start, origin, length in self.runs:
            target[start : start + length] = source[origin : origin + length]
        return result

    def restore(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the parameter, of this shape, from the initializer's value, in every bit.

        It is a view of the value where it lies there as it is, or transposed.
        """
        order = self.perm if self.perm is not None else tuple(range(len(shape)))
        permuted = tuple(shape[axis] for axis in order)
        if self.runs is None:
            made = values.reshape(permuted)
        else:
            made = values.new_full(permuted, float("nan"))
            source, target = _rows(values.contiguous(), vector=len(shape) < 2), _rows(made)
            for start, origin, length in self.runs:
                target[origin : origin + length] = source[start : start + length]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        made = made.permute(inverse)
        return made if self.scale is None else self.scale.undo(made.contiguous())

    def to_json(self) -> dict[str, Any]:
        """Return plain data, read back by ``from_json``."""
        data: dict[str, Any] = {
            "initializer": self.initializer,
            "shape": list(self.shape),
            "dtype": self.dtype,
        }
        if self.perm is not None:
            data["perm"] = list(self.perm)
        if self.scale is not None:
            data["scale"] = self.scale.to_json()
        if self.runs is not None:
            data["runs"] = [list(run) for run in self.runs]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Read what ``to_json`` wrote."""
        perm, scale, runs = data.get("perm"), data.get("scale"), data.get("runs")
        return cls(
            data["initializer"],
            tuple(data["shape"]),
            data["dtype"],
            None if perm is None else tuple(perm),
            None if scale is None else Scale.from_json(scale),
            None if runs is None else tuple((int(a), int(b), int(c)) for a, b, c in runs),
        )


def _rows(tensor: Tensor, *, vector: bool = False) -> Tensor:
    """View a tensor as a matrix whose rows run over all axes but the last; of a vector, over all."""
    return tensor.view(-1, 1) if vector or tensor.dim() < 2 else tensor.view(-1, tensor.shape[-1])


@dataclass(frozen=True)
class Placement:
    """Where a parameter lies: in initializers with a recipe, in some without (opaque), or nowhere.

    ``names`` are all its qualified names, ``fingerprint`` that of the value that was exported, ``shape``
    the parameter's own. ``unused`` says that the exported graph does not use it at all.
    """

    recipes: tuple[Recipe, ...] = ()
    opaque: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    fingerprint: Fingerprint | None = None
    shape: tuple[int, ...] = ()
    unused: bool = False

    def restored(self, tensor: ir.TensorProtocol) -> Tensor:
        """Return the parameter from its first initializer's tensor."""
        return self.recipes[0].restore(as_torch(tensor), self.shape)

    @property
    def status(self) -> Status:
        """Whether a change to the parameter can be carried over to the file."""
        if self.unused:
            return "unused"
        if self.opaque:
            return "opaque"
        return "known" if self.recipes else "absent"

    @property
    def label(self) -> str:
        """Say in a few words how it lies there."""
        return ", ".join(recipe.label for recipe in self.recipes) if self.status == "known" else self.status


@dataclass(frozen=True)
class ParameterMap:
    """Every parameter's placement, by its qualified name."""

    placements: Mapping[str, Placement] = field(default_factory=dict[str, Placement])

    def find(self, name: str) -> Placement | None:
        """Return a parameter's placement by any of its names."""
        if name in self.placements:
            return self.placements[name]
        return next((p for p in self.placements.values() if name in p.names), None)

    def to_json(self) -> str:
        """Return the map as JSON text, read back by ``from_json``."""
        data = {
            name: {
                "opaque": list(placement.opaque),
                "shape": list(placement.shape),
                "unused": placement.unused,
                "names": list(placement.names),
                "fingerprint": None if placement.fingerprint is None else placement.fingerprint.to_json(),
                "recipes": [recipe.to_json() for recipe in placement.recipes],
            }
            for name, placement in self.placements.items()
        }
        return json.dumps({"mapping_version": MAPPING_VERSION, "parameters": data})

    @classmethod
    def from_json(cls, text: str) -> ParameterMap:
        """Read what ``to_json`` wrote.

        Raises:
            ExportError: the text is not such a map, or of another version.
        """
        try:
            data = json.loads(text)
            if data["mapping_version"] != MAPPING_VERSION:
                raise ValueError(f"mapping_version {data['mapping_version']}")
            return cls({name: _placement(item) for name, item in data["parameters"].items()})
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(
                f"the metadata {MAPPING_KEY!r}",
                expected=f"a map of parameters, version {MAPPING_VERSION}",
                got=f"{type(error).__name__}: {error}",
                advice="Export the base again with this version of lora_fx.",
            ) from error


def _placement(data: Mapping[str, Any]) -> Placement:
    stored = data["fingerprint"]
    return Placement(
        tuple(Recipe.from_json(recipe) for recipe in data["recipes"]),
        tuple(data["opaque"]),
        tuple(data["names"]),
        None if stored is None else Fingerprint.from_json(stored),
        tuple(data["shape"]),
        bool(data["unused"]),
    )
