"""Number the repeated blocks of a model, along its dataflow.

A block is a child of a list-like container (``ModuleList``, ``Sequential``, ``ModuleDict``) that holds
several sites and stands in a row with others: what one makes feeds the next. Experts, or heads side by
side, are no blocks. Of nested rows the outermost is taken in which blocks resemble each other in their
weights' shapes: a stage whose width differs from the next one's is none, the layers inside it are. Rows
of equal length that take turns (an attention's, then a feed-forward's) make blocks together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx, nn

from lora_fx.passes.flow import Flow
from lora_fx.sites import Site

_ROWS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class _Unit:
    """One candidate for a block: its path, class, sites, and the place of its first call."""

    path: str
    cls: type[nn.Module]
    sites: tuple[Site, ...]
    first: int

    def resembles(self, other: _Unit) -> bool:
        """Whether most weights of the smaller have their like, of the same shape, in the other."""
        mine, theirs = self._weights(), other._weights()
        return 2 * len(mine & theirs) > min(len(mine), len(theirs))

    def _weights(self) -> set[tuple[str, tuple[int, ...]]]:
        return {(site.name.removeprefix(self.path), site.shape) for site in self.sites}


_Row = tuple[_Unit, ...]


def blocks_of(model: nn.Module, flow: Flow, sites: Sequence[Site]) -> dict[str, tuple[int, int]]:
    """Return (index, total) of the block that each site lies in, by the site's name."""
    rows = [row for row in _rows(model, flow, sites) if _in_series(flow, row)]
    chosen = _merged(_chosen(rows))
    ordered = sorted(chosen, key=lambda block: min(unit.first for unit in block))
    numbers = {unit.path: index for index, block in enumerate(ordered) for unit in block}
    found: dict[str, tuple[int, int]] = {}
    for unit in (unit for block in ordered for unit in block):
        found.update((site.name, (numbers[unit.path], len(ordered))) for site in unit.sites)
    return found


def _rows(model: nn.Module, flow: Flow, sites: Sequence[Site]) -> list[_Row]:
    below: dict[str, list[Site]] = {}
    for site in sites:
        if site.uses or site.twin is not None:
            parts = site.module.split(".")
            for end in range(1, len(parts) + 1):
                below.setdefault(".".join(parts[:end]), []).append(site)
    rows: list[_Row] = []
    for path, container in model.named_modules():
        if not isinstance(container, _ROWS):
            continue
        row: list[_Unit] = []
        for name, child in container.named_children():
            inner = f"{path}.{name}" if path else name
            held = tuple(below.get(inner, ()))
            if len(held) > 1:
                before = row[-1].first if row else 0
                ran = [flow.order[call] for call in _calls(flow, held)]
                row.append(_Unit(inner, type(child), held, min(ran, default=before)))
        if row:
            rows.append(tuple(row))
    return rows


def _calls(flow: Flow, sites: Iterable[Site]) -> list[fx.Node]:
    return [call for site in sites for call in flow.calls_by_site.get(site.name, ())]


def _in_series(flow: Flow, row: _Row) -> bool:
    """Whether each block that ran is fed by the one before it; a row of one stands for others elsewhere."""
    ran = [calls for unit in row if (calls := _calls(flow, unit.sites))]
    for before, after in itertools.pairwise(ran):
        made = 0
        for call in before:
            made |= flow.bit[call]
        if not any(flow.reach[call] & made for call in after):
            return False
    return bool(ran)


def _chosen(rows: list[_Row]) -> list[_Row]:
    """Return the rows of blocks, outermost first, without those inside another's blocks."""
    alike = {a.cls for row in rows for a, b in itertools.combinations(row, 2) if a.resembles(b)}
    # A bare container of layers is a stage, unless there is nothing else.
    alike = {cls for cls in alike if cls not in _ROWS} or alike
    if not alike:
        # Every block differs from the next in shape: then the innermost row counts.
        outer = {unit.cls for row in rows for unit in row if _holds_another(unit, rows)}
        alike = {unit.cls for row in rows for unit in row} - outer
    found: list[_Row] = []
    for row in sorted(rows, key=lambda row: row[0].path.count(".")):
        inside = any(row[0].path.startswith(unit.path + ".") for other in found for unit in other)
        if not inside and any(unit.cls in alike for unit in row):
            found.append(tuple(unit for unit in row if unit.cls in alike or unit.cls not in _ROWS))
    return found


def _holds_another(unit: _Unit, rows: list[_Row]) -> bool:
    return any(other.path.startswith(unit.path + ".") for row in rows for other in row)


def _merged(rows: list[_Row]) -> list[_Row]:
    """Return the blocks: one unit each, or one of each of several rows that take turns."""
    groups: dict[tuple[str, int], list[_Row]] = {}
    for row in rows:
        parent = row[0].path.rpartition(".")[0].rpartition(".")[0]
        groups.setdefault((parent, len(row)), []).append(row)
    blocks: list[_Row] = []
    for together in groups.values():
        turns = [tuple(sorted(turn, key=lambda unit: unit.first)) for turn in zip(*together, strict=True)]
        places = [unit.first for turn in turns for unit in turn]
        if len(together) > 1 and len(turns) > 1 and places == sorted(places):
            blocks.extend(turns)
        else:
            blocks.extend((unit,) for row in together for unit in row)
    return blocks
