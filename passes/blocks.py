"""Number the repeated blocks of a model, along its dataflow.

A block is a child of a list-like container (``ModuleList``, ``Sequential``, ``ModuleDict``) that holds
several sites and stands in a row with others of its class: what one makes feeds the next. Experts, or
heads side by side, are no blocks. Of nested rows the outermost is taken in which blocks are repeated
with the same shapes: a stage whose width differs from the next one's is none, the layers inside it are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from lora_fx.passes.flow import Flow
from lora_fx.sites import Site

_ROWS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class _Unit:
    """One candidate for a block."""

    path: str
    container: str
    cls: type[nn.Module]
    sites: tuple[Site, ...]

    def resembles(self, other: _Unit) -> bool:
        """Whether most weights of the smaller have their like, of the same shape, in the other."""
        mine, theirs = self._weights(), other._weights()
        return 2 * len(mine & theirs) > min(len(mine), len(theirs))

    def _weights(self) -> set[tuple[str, tuple[int, ...]]]:
        return {(site.name.removeprefix(self.path), site.shape) for site in self.sites}


def blocks_of(model: nn.Module, flow: Flow, sites: Sequence[Site]) -> dict[str, tuple[int, int]]:
    """Return (index, total) of the block that each site lies in, by the site's name."""
    rows = [row for row in _rows(model, sites) if _in_series(flow, row)]
    repeated = {row[0].cls for row in rows if any(a.resembles(b) for a, b in itertools.combinations(row, 2))}
    if not repeated:
        # Every block differs from the next in shape: then the innermost row counts.
        repeated = {unit.cls for row in rows for unit in row if not _holds_another(unit, rows)}
    found: dict[str, _Unit] = {}
    for unit in sorted((u for row in rows for u in row if u.cls in repeated), key=lambda u: len(u.path)):
        for site in unit.sites:
            found.setdefault(site.name, unit)
    return _numbered(flow, found, sites)


def _rows(model: nn.Module, sites: Sequence[Site]) -> list[list[_Unit]]:
    below: dict[str, list[Site]] = {}
    for site in sites:
        if not site.uses and site.twin is None:
            continue
        parts = site.module.split(".")
        for end in range(1, len(parts) + 1):
            below.setdefault(".".join(parts[:end]), []).append(site)
    rows: dict[tuple[str, type[nn.Module]], list[_Unit]] = {}
    for path, container in model.named_modules():
        if not isinstance(container, _ROWS):
            continue
        for name, child in container.named_children():
            inner = f"{path}.{name}" if path else name
            held = below.get(inner, [])
            if len(held) > 1:
                unit = _Unit(inner, path, type(child), tuple(held))
                rows.setdefault((path, type(child)), []).append(unit)
    return list(rows.values())


def _in_series(flow: Flow, row: list[_Unit]) -> bool:
    """Whether each block that ran is fed by the one before it; a row of one stands for others elsewhere."""
    ran = [calls for unit in row if (calls := _calls(flow, unit.sites))]
    for before, after in itertools.pairwise(ran):
        made = 0
        for call in before:
            made |= flow.bit[call]
        if not any(flow.reach[call] & made for call in after):
            return False
    return bool(ran)


def _calls(flow: Flow, sites: Iterable[Site]) -> list[fx.Node]:
    return [call for site in sites for call in flow.calls_by_site.get(site.name, ())]


def _holds_another(unit: _Unit, rows: list[list[_Unit]]) -> bool:
    return any(other.path.startswith(unit.path + ".") for row in rows for other in row)


def _numbered(flow: Flow, found: Mapping[str, _Unit], sites: Sequence[Site]) -> dict[str, tuple[int, int]]:
    """Number the blocks in the order in which they first run; those that did not run keep their place."""
    place = {site.name: index for index, site in enumerate(sites)}
    first: dict[str, tuple[float, int]] = {}
    for unit in found.values():
        ran = [flow.order[call] for call in _calls(flow, unit.sites)]
        first[unit.path] = (min(ran, default=float("inf")), min(place[site.name] for site in unit.sites))
    index = {path: i for i, path in enumerate(sorted(first, key=first.__getitem__))}
    return {name: (index[unit.path], len(index)) for name, unit in found.items()}
