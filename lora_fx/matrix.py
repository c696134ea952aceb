"""The matrix form of a weight: which of its axes are rows (out) and which columns (in).

Every kind of weight is a stack of matrices in disguise. For a parameter of shape ``shape``::

    shape --reshape--> view --permute--> (batch axes, out axes, in axes) --reshape--> (E, out, in)

so that one piece of algebra serves them all: ``delta = form.weight(B @ A)`` with
``A: (r, in)``, ``B: (out, r)``, or ``A: (E, r, in)``, ``B: (E, out, r)`` where the weight is a
stack of E > 1 matrices (experts, gates, the groups of a transposed convolution).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Rows = tuple[tuple[int, int], ...]
"""Output rows of a matrix form as half-open ranges, sorted and disjoint: ``((start, stop), ...)``."""


@dataclass(frozen=True)
class MatrixForm:
    """How a parameter is read as one matrix ``(out, in)`` or as a stack ``(E, out, in)``.

    ``shape`` is the parameter's own shape; ``view`` is ``shape`` with axes split or merged;
    ``batch``, ``out`` and ``inp`` partition the axes of ``view``.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    out: tuple[int, ...]
    inp: tuple[int, ...]
    batch: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a form whose axes do not partition the view."""
        axes = sorted(self.batch + self.out + self.inp)
        if axes != list(range(len(self.view))) or math.prod(self.view) != math.prod(self.shape):
            raise ValueError(f"not a partition of the axes: {self}")

    @property
    def transposed(self) -> MatrixForm:
        """The same weight with rows and columns exchanged."""
        return MatrixForm(self.shape, self.view, out=self.inp, inp=self.out, batch=self.batch)

    @property
    def experts(self) -> int | None:
        """The number of stacked matrices, or None where the weight is one matrix."""
        return math.prod([self.view[a] for a in self.batch]) if self.batch else None

    @property
    def out_features(self) -> int:
        """The number of rows of each matrix."""
        return math.prod([self.view[a] for a in self.out])  # a list: torch.compile follows no generator here

    @property
    def in_features(self) -> int:
        """The number of columns of each matrix."""
        return math.prod([self.view[a] for a in self.inp])

    @property
    def max_rank(self) -> int:
        """The largest rank that a matrix of this form can have."""
        return min(self.out_features, self.in_features)

    def reads_as(self, other: MatrixForm) -> bool:
        """Say whether both read the weight as the same matrices: an axis of one entry may be any."""
        return self.experts == other.experts and self._long() == other._long()

    def _long(self) -> tuple[tuple[int, ...], ...]:
        """Return the view without its axes of one entry, and which of the others are batch, out and in."""
        axes = [axis for axis, size in enumerate(self.view) if size != 1]
        places = {axis: place for place, axis in enumerate(axes)}
        kept = (tuple(places[a] for a in part if a in places) for part in (self.batch, self.out, self.inp))
        return (tuple(self.view[axis] for axis in axes), *kept)

    def matrix(self, weight: Tensor) -> Tensor:
        """Read the weight as ``(out, in)``, or ``(E, out, in)`` where there is a batch."""
        stack = weight.reshape(self.view).permute(self.batch + self.out + self.inp)
        lead = () if self.experts is None else (self.experts,)
        return stack.reshape(*lead, self.out_features, self.in_features)

    def weight(self, matrix: Tensor) -> Tensor:
        """Write a matrix (or stack) back in the parameter's own shape; inverse of ``matrix``."""
        order = self.batch + self.out + self.inp
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrix.reshape([self.view[a] for a in order]).permute(inverse).reshape(self.shape)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, read back by ``from_json``."""
        names = ("shape", "view", "out", "inp", "batch")
        return {name: list(getattr(self, name)) for name in names}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MatrixForm:
        """Read what ``to_json`` wrote."""
        return cls(**{name: tuple(int(v) for v in values) for name, values in data.items()})


def rows_form(shape: tuple[int, ...]) -> MatrixForm:
    """Axis 0 is the rows, all others the columns: linear, convolution, bilinear."""
    axes = tuple(range(1, len(shape)))
    return MatrixForm(shape, shape, out=(0,), inp=axes)


def columns_form(shape: tuple[int, ...]) -> MatrixForm:
    """Axis 0 is the columns, all others the rows: embedding, transformers' Conv1D, ``x @ W``."""
    axes = tuple(range(1, len(shape)))
    return MatrixForm(shape, shape, out=axes, inp=(0,))


def stacked_form(shape: tuple[int, ...], *, transposed: bool = False) -> MatrixForm:
    """A stack of matrices ``(E, out, in)``, or ``(E, in, out)`` where ``transposed``."""
    out, inp = ((2,), (1,)) if transposed else ((1,), (2,))
    return MatrixForm(shape, shape, batch=(0,), out=out, inp=inp)


def row_count(rows: Rows | None, form: MatrixForm) -> int:
    """Return how many rows ``rows`` names; None means all of the form's."""
    return form.out_features if rows is None else sum(stop - start for start, stop in rows)
