"""Layouts: which elements of a parameter a view of it reads, axis by axis.

An axis of a view is a product of *factors* ``(n, s)``: n steps of s elements, outer factor first, in
the row-major numbering of the parameter's own shape. Element ``(i1, .., ik)`` of the view is element
``offset + sum of i_f * s_f`` of the parameter. Views that share memory follow from their recorded
sizes and strides alone, whatever operation made them; a copy (a cast, ``contiguous``, a ``reshape``
that copies) keeps its elements in row-major order and starts a new memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Factor = tuple[int, int]
Axis = tuple[Factor, ...]


@dataclass(frozen=True)
class Block:
    """A run of memory: n places ``memory`` apart, which are ``step`` apart in the parameter."""

    n: int
    memory: int
    step: int


@dataclass(frozen=True)
class Memory:
    """What lies where: the blocks of one allocation, and where the first element lies."""

    blocks: tuple[Block, ...]
    offset: int
    first: int
    """The parameter's element that lies at ``offset``."""

    def view(self, size: Sequence[int], stride: Sequence[int], offset: int) -> Layout | None:
        """Return the layout of a strided view of this memory, or None where it is not a product."""
        reached = self._locate(offset - self.offset)
        if reached is None:
            return None
        first = self.first + sum(index * block.step for block, index in reached.items())
        axes: list[Axis] = []
        for n, s in zip(size, stride, strict=True):
            axis = self._axis(n, s, reached)
            if axis is None:
                return None
            axes.append(axis)
        # A view that runs over the end of a block goes on somewhere else in the parameter.
        within = all(index < block.n for block, index in reached.items())
        return Layout(tuple(axes), first) if within else None

    def _locate(self, place: int) -> dict[Block, int] | None:
        """Return the index in every block of a place in memory."""
        found: dict[Block, int] = {}
        for block in sorted(self.blocks, key=lambda b: -b.memory):
            found[block], place = divmod(place, block.memory)
        return found if place == 0 else None

    def _axis(self, n: int, stride: int, reached: dict[Block, int]) -> Axis | None:
        """Return an axis as factors, and move every block's index to the last one that it reads."""
        factors: list[Factor] = []
        while n > 1:
            if stride == 0:
                return ((n, 0), *factors)
            block = next((b for b in self.blocks if b.memory <= stride < b.memory * b.n), None)
            if block is None or stride % block.memory:
                return None
            step = stride // block.memory
            taken = steps_within(block.n, step, n)
            if taken is None:
                return None
            reached[block] += (taken - 1) * step
            factors.insert(0, (taken, step * block.step))
            n, stride = n // taken, block.memory * block.n
        return tuple(factors)


@dataclass(frozen=True)
class Layout:
    """The elements of a parameter that a view reads: one product of factors per axis."""

    axes: tuple[Axis, ...]
    offset: int

    def reshaped(self, size: Sequence[int]) -> Layout | None:
        """Return the layout with its elements, in row-major order, under another shape."""
        factors = [f for axis in self.axes for f in axis]
        axes: list[Axis] = []
        for n in reversed(size):
            axis = _take(factors, n)
            if axis is None:
                return None
            axes.insert(0, axis)
        return None if factors else Layout(tuple(axes), self.offset)

    def memory(self, stride: Sequence[int], offset: int) -> Memory:
        """Return the memory of a copy that has this layout."""
        blocks: list[Block] = []
        for axis, place in zip(self.axes, stride, strict=True):
            inner = place
            for n, step in reversed(axis):
                blocks.append(Block(n, inner, step))
                inner *= n
        return Memory(tuple(blocks), offset, self.offset)


def _take(factors: list[Factor], wanted: int) -> Axis | None:
    """Take an axis of the wanted size off the inner end of a list of factors."""
    axis: list[Factor] = []
    while wanted > 1:
        if not factors:
            return None
        n, step = factors.pop()
        if wanted % n == 0:
            axis.insert(0, (n, step))
            wanted //= n
        elif n % wanted == 0:
            axis.insert(0, (wanted, step))
            factors.append((n // wanted, step * wanted))
            wanted = 1
        else:
            return None
    return tuple(axis)


def whole(shape: Sequence[int]) -> Layout:
    """Return the layout of a parameter itself."""
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return Layout(tuple(((n, s),) if n > 1 else () for n, s in zip(shape, steps, strict=True)), 0)


@dataclass(frozen=True)
class Piece:
    """The part of a factor that lies in one of the parameter's axes: n steps of ``step`` indices."""

    axis: int
    n: int
    step: int
    role: str


def pieces(shape: Sequence[int], axis: Axis, role: str) -> list[Piece] | None:
    """Cut a view's axis at the parameter's axes; None where it does not fall on their bounds."""
    found: list[Piece] = []
    waiting = [factor for factor in axis if factor[1] != 0]  # an expanded axis reads the same again
    while waiting:
        n, step = waiting.pop()
        if n == 1:
            continue
        place = _axis_of(shape, step)
        if place is None:
            return None
        index, unit = place
        stride = step // unit
        taken = steps_within(shape[index], stride, n)
        if taken is None:
            return None
        found.append(Piece(index, taken, stride, role))
        waiting.append((n // taken, unit * shape[index]))
    return found


def steps_within(length: int, stride: int, n: int) -> int | None:
    """Return how many of n steps stay within a length; None where the last is not on its bound."""
    if (n - 1) * stride < length:
        return n
    inside = length // stride
    return inside if length % stride == 0 and n % inside == 0 else None


def _axis_of(shape: Sequence[int], step: int) -> tuple[int, int] | None:
    """Return the parameter's axis that a step walks along, with that axis's own step."""
    unit = 1
    for index in reversed(range(len(shape))):
        if unit <= step < unit * shape[index]:
            return (index, unit) if step % unit == 0 else None
        unit *= shape[index]
    return None


def starts(shape: Sequence[int], offset: int) -> tuple[int, ...]:
    """Return the index along each axis of a parameter's element."""
    found: list[int] = []
    for n in reversed(shape):
        offset, index = divmod(offset, n) if n else (0, 0)
        found.insert(0, index)
    return tuple(found)
