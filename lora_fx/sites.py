"""Facts about a model's weights: the records that matching writes and policies read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_fx.matrix import MatrixForm, Rows

ROLES = ("q", "k", "v", "o", "up", "gate", "down", "stem", "head", "router", "embedding")
"""What a site can be seen to do in the dataflow."""

OTHER = "other"
"""The kind of a weight that no kind of the registry knows."""
NO_EFFECT = "no-effect"
"""What ``Site.unfit`` starts with where the uses of a weight reach no output of the run."""


@dataclass(frozen=True)
class Use:
    """One place in the recorded run where a weight is multiplied with something.

    ``op`` is the canonical operation (``linear``, ``conv2d``, ``embedding``, ``matmul``...);
    ``home`` the path of the module whose ``forward`` made the call ("" is the root); ``node`` the
    name of the call's node in the trace's graph; ``rows`` the output rows of the matrix form that
    this use reads (None: all). ``branch`` says whether the use can be computed as a low-rank
    branch, and ``why`` gives the reason.
    """

    op: str
    home: str
    node: str
    rows: Rows | None = None
    branch: bool = False
    why: str = ""


@dataclass(frozen=True)
class Site:
    """A parameter of two or more dimensions that the model multiplies with; one per parameter.

    ``name`` is the weight's qualified name and ``names`` all of them (tied ones too); ``kind`` the
    registry's name for how it is used; ``form`` its matrix form; ``module`` the path of the module
    that owns ``name`` and ``module_class`` that module's class. ``roles`` maps a role to the output
    rows that play it, or to None for all of them. ``depth`` is the place along the dataflow, 0.0
    (first) to 1.0 (last); ``block`` is (index, total) of the repeated block it lies in. ``unfit``
    says why the site cannot be adapted (None: it can); ``notes`` are remarks for the audit.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    form: MatrixForm
    names: tuple[str, ...] = ()
    uses: tuple[Use, ...] = ()
    roles: Mapping[str, Rows | None] = field(default_factory=dict[str, "Rows | None"], hash=False)
    depth: float | None = None
    block: tuple[int, int] | None = None
    module: str = ""
    module_class: str = ""
    twin: str | None = None
    unfit: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def attribute(self) -> str:
        """The parameter's own name inside its module."""
        return self.name.rpartition(".")[2]

    def to_json(self) -> dict[str, Any]:
        """Return plain data, read back by ``from_json``."""
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "form": self.form.to_json(),
            "names": list(self.names),
            "uses": [vars(use) for use in self.uses],
            "roles": {role: _rows_json(rows) for role, rows in self.roles.items()},
            "depth": self.depth,
            "block": None if self.block is None else list(self.block),
            "module": self.module,
            "module_class": self.module_class,
            "twin": self.twin,
            "unfit": self.unfit,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Site:
        """Read what ``to_json`` wrote."""
        fields = dict(data)
        fields["shape"] = tuple(data["shape"])
        fields["form"] = MatrixForm.from_json(data["form"])
        fields["names"] = tuple(data.get("names", ()))
        fields["uses"] = tuple(_use_from_json(use) for use in data.get("uses", ()))
        fields["roles"] = {role: rows_from_json(rows) for role, rows in data.get("roles", {}).items()}
        block = data.get("block")
        fields["block"] = None if block is None else (int(block[0]), int(block[1]))
        fields["notes"] = tuple(data.get("notes", ()))
        return cls(**fields)


def _use_from_json(data: Mapping[str, Any]) -> Use:
    fields = dict(data)
    fields["rows"] = rows_from_json(data.get("rows"))
    return Use(**fields)


def _rows_json(rows: Rows | None) -> list[list[int]] | None:
    return None if rows is None else [list(r) for r in rows]


def rows_from_json(data: Any) -> Rows | None:
    """Read rows from JSON: None, or a list of [start, stop]."""
    return None if data is None else tuple((int(start), int(stop)) for start, stop in data)
