"""Adapted modules that were put out of the model after inject, and their adapters with them."""

from __future__ import annotations

from torch import nn

from lora_fx.notices import warn_user
from lora_fx.passes.insert import Owner, owners
from lora_fx.passes.runtime import binding
from lora_fx.passes.switch import require


def replaced(model: nn.Module, adapter: str | None = None) -> str | None:
    """Say which weights of the adapter's plan no module of the model adapts any more; None: none is lost.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
    """
    record, name = require(model, adapter)
    plan, held = record.plans[name], owners(model)
    lost = [
        d.name
        for d in (*plan.adapted, *plan.trained)
        if not any(_adapts(owner, name) for owner in held.get(d.name, ()))
    ]
    if not lost:
        return None
    listed = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
    return (
        f"adapter {name!r} is gone from {listed}: the module there was put in place after inject. Put the "
        "adapted module back, or call lora_fx.unload and inject again"
    )


def warn_replaced(model: nn.Module, adapter: str | None = None) -> None:
    """Warn of adapters that went with their modules: what is left is folded without them."""
    note = replaced(model, adapter)
    if note is not None:
        warn_user(f"{note}.")


def _adapts(owner: Owner, adapter: str) -> bool:
    held = binding(owner.module)
    return held is not None and adapter in held.sites.get(owner.attribute, {})
