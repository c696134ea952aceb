"""Manifests: which weights of a base ONNX file an adapter changes, by the names that runtimes refit by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from lora_fx.tables import as_text, shape_text

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Refit:
    """One initializer that the adapter changes.

    ``name`` is the initializer's name in the base, ``folded_name`` that in the folded file (exporters make
    some up anew); ``parameters`` maps the model's parameters in it to how they lie there (identity,
    transpose, row scale, rows), empty where that is not known. ``sha256`` is that of the new value's bytes.
    """

    name: str
    folded_name: str
    parameters: Mapping[str, str]
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The changed initializers of a folded file against its base, whose hash it records.

    ``base_sha256`` are the hashes of the base's files, by name: the .onnx file and its data.
    """

    base: str
    folded: str
    base_sha256: Mapping[str, str] = field(hash=False)
    weights: tuple[Refit, ...]

    def to_json(self) -> str:
        """Return the manifest as JSON text."""
        data: dict[str, Any] = {"manifest_version": MANIFEST_VERSION, **vars(self)}
        data["weights"] = [vars(weight) for weight in self.weights]
        return json.dumps(data, indent=1)

    def table(self) -> Table:
        """Return the manifest as a rich table."""
        total = sum(weight.bytes for weight in self.weights)
        table = Table(title=f"{len(self.weights)} initializers of {self.base} to refit ({total:,} bytes)")
        for column in ("initializer", "parameters", "shape", "dtype", "bytes"):
            table.add_column(column, overflow="fold")
        for weight in self.weights:
            held = ", ".join(f"{name} ({how})" for name, how in weight.parameters.items())
            table.add_row(weight.name, held, shape_text(weight.shape), weight.dtype, f"{weight.bytes:,}")
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Print as a table where rich prints."""
        yield self.table()

    def __str__(self) -> str:
        """Return the table as plain text."""
        return as_text(self.table())
