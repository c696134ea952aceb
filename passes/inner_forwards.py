"""Forwards that a function put over a module's own keeps: ``old = m.forward; m.forward = lambda x: old(x)``.

A bound method of the class that the module had then calls what that class compiled for it. When the
module gets another class, the cells of such functions are pointed at that class's forward.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

_DEPTH = 4
"""Functions over functions, of which one keeps the module's own forward."""


def cells_of(module: nn.Module, function: Any) -> Iterator[types.CellType]:
    """Yield the cells, of functions among the module's own attributes, that hold this forward bound to it."""
    for value in list(module.__dict__.values()):
        yield from _inside(value, module, function, _DEPTH)


def point(module: nn.Module, cells: Iterable[types.CellType]) -> None:
    """Let the cells hold the forward that the module's class has now."""
    for cell in cells:
        cell.cell_contents = types.MethodType(type(module).forward, module)


def _inside(value: Any, module: nn.Module, function: Any, depth: int) -> Iterator[types.CellType]:
    if isinstance(value, types.MethodType):
        value = value.__func__
    if isinstance(value, functools.partial):
        yield from _inside(value.func, module, function, depth)
        return
    if not isinstance(value, types.FunctionType) or depth == 0:
        return
    for cell in value.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # an empty cell: its variable is not assigned yet
            continue
        if isinstance(held, types.MethodType) and held.__self__ is module and held.__func__ is function:
            yield cell
        else:
            yield from _inside(held, module, function, depth - 1)
