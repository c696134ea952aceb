"""Which output rows of which weights feed a value: gradients pushed back to the nearest site calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.kinds.base import rows_index, shape_of
from lora_fx.matrix import MatrixForm, Rows, row_count
from lora_fx.passes.flow import Flow, Link, sources_above
from lora_fx.passes.op_groups import KEEPS_CHANNELS
from lora_fx.passes.replay import Replay, Segment, passes_all, segment_between, structure
from lora_fx.sites import Site

DRAWS = (20_231_101, 20_240_229)
"""Two seeds: channels must agree over both."""

Mask = Tensor
"""A boolean per output row of a site's matrix form."""


@dataclass(frozen=True, eq=False)
class Feed:
    """The rows of one site that feed a value through one call; ``stable`` if both draws agree."""

    link: Link
    call: fx.Node
    rows: Mask
    stable: bool

    @property
    def site(self) -> Site:
        """The site that feeds."""
        return self.link.site


@dataclass
class Feeding:
    """Answers which rows feed a value; remembers the answer for calls of the same structure."""

    flow: Flow
    _known: dict[Any, tuple[tuple[Mask, bool], ...]] = field(default_factory=dict[Any, Any])

    def rows(
        self,
        target: fx.Node,
        calls: Iterable[fx.Node],
        *,
        cut: Iterable[fx.Node] = (),
        part: tuple[int, int, int] | None = None,
    ) -> tuple[Feed, ...]:
        """Return the rows of each site of ``calls`` that reach ``target`` without passing another of them.

        ``cut`` are nodes through which nothing is followed: their values are drawn. ``part`` is the
        part of the target that counts, as (dimension, start, stop); None is all of it.
        """
        taps = [_tap(call, link) for call in calls for link in self.flow.links[call]]
        if not taps:
            return ()
        severed = {**self.flow.veins, **{tap.call: (tap.weight,) for tap in taps if tap.weight is not None}}
        leaves = [tap.leaf for tap in taps]
        segment = segment_between(target, leaves, self.flow.order, cut=cut, severed=severed)
        reached = passes_all(segment, KEEPS_CHANNELS) if part is None else None
        if reached is not None and all(tap.weight is None for tap in taps):
            known = tuple((tap.whole(tap.leaf in reached), True) for tap in taps)
        else:
            known = self._recalled(segment, taps, part)
        return tuple(
            Feed(tap.link, tap.call, mask, stable)
            for tap, (mask, stable) in zip(taps, known, strict=True)
            if bool(mask.any())
        )

    def _recalled(
        self, segment: Segment, taps: Sequence[_Tap], part: tuple[int, int, int] | None
    ) -> tuple[tuple[Mask, bool], ...]:
        key = (structure(segment), tuple(tap.layout for tap in taps), part)
        if key not in self._known:
            self._known[key] = _measure(segment, taps, part)
        return self._known[key]


@dataclass(frozen=True)
class _Tap:
    """Where a gradient is read for one use of a weight: at the call's result, or at the weight itself."""

    link: Link
    call: fx.Node
    leaf: fx.Node
    weight: fx.Node | None

    @property
    def layout(self) -> Any:
        """What of the use decides how a gradient is read as rows."""
        channel = None if self.weight is not None or self.link.operand is None else self.link.operand.channel
        return (self.link.site.form, self.link.use.rows, channel)

    def hit(self, gradient: Tensor) -> Mask:
        """Return the rows of the site's form at which a gradient is not zero."""
        form = self.link.site.form
        if self.weight is not None or self.link.operand is None:
            matrix = form.matrix(gradient.abs())
            return (matrix != 0).any(-1).reshape(-1, form.out_features).any(0)
        return self._placed((gradient.movedim(self.link.operand.channel, 0).flatten(1) != 0).any(1))

    def whole(self, reached: bool) -> Mask:
        """Return all rows that the call reads, or none."""
        form, rows = self.link.site.form, self.link.use.rows
        return self._placed(torch.full((row_count(rows, form),), reached))

    def _placed(self, channels: Tensor) -> Mask:
        rows = self.link.use.rows
        if rows is None:
            return channels
        mask = torch.zeros(self.link.site.form.out_features, dtype=torch.bool)
        mask[rows_index(rows, mask.device)] = channels
        return mask


def _tap(call: fx.Node, link: Link) -> _Tap:
    """Read at the result where its channels are the rows one by one: then no weight need be drawn."""
    operand, form, shape = link.operand, link.site.form, shape_of(call)
    if operand is None:
        return _Tap(link, call, call, None)
    straight = operand.weight.op != "get_attr" or operand.form == form
    place = operand.channel if -len(shape) <= operand.channel < len(shape) else None
    if (
        straight
        and len(operand.out) == 1
        and place is not None
        and shape[place] == row_count(link.use.rows, form)
    ):
        return _Tap(link, call, call, None)
    names = {link.site.name, *link.site.names}
    reads = [
        node
        for node in sources_above(operand.weight)
        if str(node.meta.get("parameter", node.target)) in names
    ]
    return _Tap(link, call, reads[0], operand.weight)


def _measure(
    segment: Segment, taps: Sequence[_Tap], part: tuple[int, int, int] | None
) -> tuple[tuple[Mask, bool], ...]:
    draws: list[list[Mask]] = []
    for seed in DRAWS:
        found = Replay(segment, seed).gradients(part)
        gradients = dict(zip(segment.leaves, found, strict=True))
        draws.append([tap.hit(gradients[tap.leaf]) for tap in taps])
    first, second = draws
    return tuple((a | b, bool(torch.equal(a, b))) for a, b in zip(first, second, strict=True))


def mask_of(rows: Rows | None, form: MatrixForm) -> Mask:
    """Return rows of a form as a mask; None is all of them."""
    mask = torch.zeros(form.out_features, dtype=torch.bool)
    for start, stop in ((0, form.out_features),) if rows is None else rows:
        mask[start:stop] = True
    return mask


def rows_of(mask: Mask) -> Rows | None:
    """Return a mask as half-open ranges; None where it names all rows."""
    if bool(mask.all()):
        return None
    edges = torch.diff(torch.nn.functional.pad(mask.to(torch.int8), (1, 1))).nonzero().flatten().tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))
