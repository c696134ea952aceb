"""How much an adapter changes each weight."""

from __future__ import annotations

from torch import nn

from lora_fx.passes.changes import changes
from lora_fx.passes.sharded import whole


def deltas(model: nn.Module, adapter: str | None = None) -> dict[str, float]:
    """Return ``|W - W0| / |W0|`` (Frobenius norms) of every weight that an adapter changes."""
    found: dict[str, float] = {}
    for change in changes(model, adapter).values():
        before, after = whole(change.before).double(), whole(change.after).double()
        size, moved = float(before.norm()), float((after - before).norm())
        found.update(dict.fromkeys(change.names, moved / size if size else moved))
    return found
