"""From a use to the parameter: its matrix form, and the output rows that the use reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lora_fx.kinds import Operand
from lora_fx.matrix import MatrixForm, Rows
from lora_fx.passes.layout import Layout, Piece, pieces, starts, whole

Indices = NDArray[np.int64]


def parameter_form(shape: tuple[int, ...], operand: Operand, layout: Layout) -> MatrixForm | None:
    """Return the form that a use gives to the parameter, or None where an axis would serve twice.

    Every axis of the operand's ``view`` covers some of the parameter's axes, or a part of one: that
    part is the operand's ``out``, ``in`` or ``batch``. What a view picks a single index of (one expert
    of a stack) is ``batch``.
    """
    if layout == whole(shape) and operand.view == shape:
        return MatrixForm(shape, shape, operand.out, operand.inp, operand.batch)
    cut = _cut(shape, operand, layout)
    if cut is None:
        return None
    view: list[int] = []
    roles: list[str] = []
    for index, n in enumerate(shape):
        parts = _parts(n, [p for p in cut if p.axis == index])
        if parts is None:
            return None
        view.extend(size for size, _ in parts)
        roles.extend(role for _, role in parts)
    roles = _completed(roles)
    axes = {r: tuple(a for a, role in enumerate(roles) if role == r) for r in ("out", "inp", "batch")}
    return MatrixForm(shape, tuple(view), axes["out"], axes["inp"], axes["batch"])


def _completed(roles: list[str]) -> list[str]:
    """Give out and in an axis each: one of size 1 first, else one of which a single index is read."""
    given = list(roles)
    for missing in ("out", "inp"):
        if missing not in given:
            spare = next((kind for kind in ("any", "unread") if kind in given), None)
            if spare is not None:
                given[given.index(spare)] = missing
    return [{"any": "inp", "unread": "batch"}.get(role, role) for role in given]


def _cut(shape: tuple[int, ...], operand: Operand, layout: Layout) -> list[Piece] | None:
    viewed = layout.reshaped(operand.view)
    if viewed is None:
        return None
    found: list[Piece] = []
    for index, axis in enumerate(viewed.axes):
        role = "out" if index in operand.out else "inp" if index in operand.inp else "batch"
        parts = pieces(shape, axis, role)
        if parts is None:
            return None
        found.extend(parts)
    begin = starts(shape, layout.offset)
    for place, n in enumerate(shape):  # a view may not run on from one row into the next
        if begin[place] + sum((p.n - 1) * p.step for p in found if p.axis == place) >= n:
            return None
    return found


def _parts(n: int, found: list[Piece]) -> list[tuple[int, str]] | None:
    """Split an axis of size n where its role changes; (size, role), outermost first."""
    if n == 1:
        return [(1, "any")]
    if not found:
        return [(n, "unread")]
    ordered = sorted(found, key=lambda p: -p.step)
    if any(a.step % (b.n * b.step) for a, b in pairwise(ordered)):
        return None
    if len({p.role for p in ordered}) == 1:
        return [(n, ordered[0].role)]
    sizes: list[tuple[int, str]] = []
    outer = n
    for piece in ordered:
        if outer % piece.step:
            return None
        sizes.append((outer // piece.step, piece.role))
        outer = piece.step
    if outer > 1:
        sizes.append((outer, "unread"))
    merged: list[tuple[int, str]] = []
    for size, role in sizes:
        if merged and merged[-1][1] == role:
            merged[-1] = (merged[-1][0] * size, role)
        else:
            merged.append((size, role))
    return merged


def rows_read(form: MatrixForm, layout: Layout) -> Rows | None:
    """Return the output rows of the form that a view reads; None: all of them, or it cannot be told."""
    if layout.offset == 0 and sorted(layout.axes) == sorted(whole(form.shape).axes):
        return None  # as it is, or transposed: nothing need be counted
    axes = _view_axes(form)
    found = pieces_of(form.shape, layout)
    if axes is None or found is None:
        return None
    steps = {axis: math.prod(form.view[a] for a in form.out[i + 1 :]) for i, axis in enumerate(form.out)}
    begin = starts(form.shape, layout.offset)
    rows: Indices = np.zeros(1, dtype=np.int64)
    for index, inside in enumerate(axes):
        if not any(axis in steps for axis in inside):
            continue
        read = _indices(begin[index], [p for p in found if p.axis == index])
        if read.max(initial=0) >= form.shape[index]:
            return None
        part, inner = np.zeros_like(read), 1
        for axis in reversed(inside):
            if axis in steps:
                part += read // inner % form.view[axis] * steps[axis]
            inner *= form.view[axis]
        rows = np.unique(np.add.outer(rows, np.unique(part)))
    return None if len(rows) >= form.out_features else as_ranges(rows)


def pieces_of(shape: Sequence[int], layout: Layout) -> list[Piece] | None:
    """Return the parts of the parameter's axes that a view reads."""
    found: list[Piece] = []
    for axis in layout.axes:
        parts = pieces(shape, axis, "")
        if parts is None:
            return None
        found.extend(parts)
    return found


def _view_axes(form: MatrixForm) -> list[list[int]] | None:
    """Return, for each of the parameter's axes, the axes of the form's view inside it."""
    found: list[list[int]] = []
    axis = 0
    for n in form.shape:
        inside: list[int] = []
        size = 1
        while axis < len(form.view) and (size < n or (form.view[axis] == 1 and not inside)):
            size *= form.view[axis]
            inside.append(axis)
            axis += 1
        if size != n:
            return None
        found.append(inside)
    return found if axis == len(form.view) else None


def _indices(begin: int, found: list[Piece]) -> Indices:
    read: Indices = np.array([begin], dtype=np.int64)
    for piece in found:
        read = np.add.outer(read, np.arange(piece.n, dtype=np.int64) * piece.step).ravel()
    return np.unique(read)


def as_ranges(rows: Indices) -> Rows:
    """Return sorted row numbers as half-open ranges."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return tuple((int(part[0]), int(part[-1]) + 1) for part in np.split(rows, breaks) if len(part))
