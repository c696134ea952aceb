"""Which lines of a table may be drawn together: a pattern must name the weights that it counts, no others.

``{0,3}.e.{0-1}`` names four weights. Where layer 0 has the experts 0 and 1 and layer 3 the expert 0 alone,
three are meant, and they take two lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")
Numbers = tuple[str, ...]
"""The layer numbers in one name."""


def exact_groups(items: Sequence[_Item], numbers: Callable[[_Item], Sequence[Numbers]]) -> list[list[_Item]]:
    """Split items, whose names differ in numbers only, into groups that patterns name exactly.

    ``numbers`` gives those of the item's own name first, then those of every name that is said beside it.
    """
    return _split([(item, tuple(numbers(item))) for item in items])


def _split(rows: Sequence[tuple[_Item, tuple[Numbers, ...]]]) -> list[list[_Item]]:
    if all(map(_exact, zip(*(told for _, told in rows), strict=True))):
        return [[item for item, _ in rows]]
    own = [told[0] for _, told in rows]
    varying = [place for place, column in enumerate(zip(*own, strict=True)) if len(set(column)) > 1]
    for place in varying:
        blocks = _alike(rows, place)
        if len(blocks) > 1:
            return [group for block in blocks for group in _split(block)]
    if not varying:
        return [[item] for item, _ in rows]
    apart: dict[str, list[tuple[_Item, tuple[Numbers, ...]]]] = {}
    for row in rows:
        apart.setdefault(row[1][0][varying[0]], []).append(row)
    return [group for block in apart.values() for group in _split(block)]


def _alike(
    rows: Sequence[tuple[_Item, tuple[Numbers, ...]]], place: int
) -> list[list[tuple[_Item, tuple[Numbers, ...]]]]:
    """Gather the rows by what there is to each value at one place, but for the numbers that follow it."""
    follows = [
        [all(told[name][at] == told[0][place] for _, told in rows) for at in range(len(first))]
        for name, first in enumerate(rows[0][1])
    ]
    by_value: dict[str, list[tuple[_Item, tuple[Numbers, ...]]]] = {}
    for row in rows:
        by_value.setdefault(row[1][0][place], []).append(row)
    found: dict[object, list[tuple[_Item, tuple[Numbers, ...]]]] = {}
    for block in by_value.values():
        rest = frozenset(
            tuple(
                tuple(n for n, same in zip(name, following, strict=True) if not same)
                for name, following in zip(told, follows, strict=True)
            )
            for _, told in block
        )
        found.setdefault(rest, []).extend(block)
    return list(found.values())


def _exact(names: Sequence[Numbers]) -> bool:
    """Say whether the numbers of every place, combined, give these names and no others."""
    columns = zip(*names, strict=True)
    return math.prod(len(set(column)) for column in columns) == len(set(names))
