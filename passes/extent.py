"""How much an adapter changes each weight."""

from __future__ import annotations

from torch import nn

from lora_fx.passes.changes import changes


def deltas(model: nn.Module, adapter: str | None = None) -> dict[str, float]:
    """Return ``|W - W0| / |W0|`` (Frobenius norms) of every weight that an adapter changes."""
    found: dict[str, float] = {}
    for change in changes(model, adapter).values():
        size = float(change.before.double().norm())
        moved = float((change.after.double() - change.before.double()).norm())
        found.update(dict.fromkeys(change.names, moved / size if size else moved))
    return found
