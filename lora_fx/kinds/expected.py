"""What a plan says beforehand: how a use will be computed at the sizes of the recorded run, and why.

The words are ``added`` (thin products beside the base's), ``stacked`` (the same, several terms sharing one
product with all their A), ``merged`` (W' = W + s B A formed, and not kept), ``kept`` (W' by autograd's own
nodes) and ``weight`` (the use reads W'). They hold for training in plain eager mode outside autocast:
compilers and function transforms see thin products, and in eval mode there is no dropout.
"""

from __future__ import annotations

from typing import NamedTuple

HALVES = frozenset({"float16", "bfloat16"})


class Work(NamedTuple):
    """What a use asks of its branch, beside its sizes.

    ``ranks`` are those of the terms that are added: one for each part, or two where a frozen start is
    taken off. ``rows`` says that a part has rows of its own.
    """

    ranks: tuple[int, ...]
    dtype: str
    rows: bool = False
    dropout: bool = False

    @property
    def half(self) -> bool:
        """Whether the base is in half precision, in which W' would round the adapter away."""
        return self.dtype in HALVES

    @property
    def products(self) -> str:
        """The thin products in words."""
        return "thin products in float32" if self.half else "thin products"

    @property
    def obstacle(self) -> str | None:
        """Why no W' is formed whatever the sizes, or None."""
        if len(self.ranks) > 1:
            return f"{len(self.ranks)} terms"
        if self.rows:
            return "rows of its own"
        if self.dropout:
            return "dropout masks the branch's input alone"
        return f"W' in {self.dtype} would round the adapter away" if self.half else None


class Expected(NamedTuple):
    """How a use will be computed, in a word, and why, in words and numbers."""

    how: str
    why: str


def added(work: Work, why: str) -> Expected:
    """Return that thin products are added, and why."""
    return Expected("added", f"{work.products}: {why}")
