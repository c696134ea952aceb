"""Adapted modules that were put out of the model after inject, and their adapters with them."""

from __future__ import annotations

from torch import nn

from lora_fx.notices import warn_user
from lora_fx.passes.insert import Owner, owners
from lora_fx.passes.registers import module_at
from lora_fx.passes.runtime import binding
from lora_fx.passes.switch import require
from lora_fx.plans import Plan


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
    one = next(iter(made_one(model, plan)), None)
    if one is not None:
        return (
            f"adapter {name!r} has one change left for both {one[0]} and {one[1]}: after inject one module "
            "was put in the other's place. Put each module back, or call lora_fx.unload and inject again"
        )
    if not lost:
        return None
    listed = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
    return (
        f"adapter {name!r} is gone from {listed}: the module there was put in place after inject. Put the "
        "adapted module back, or call lora_fx.unload and inject again"
    )


def made_one(model: nn.Module, plan: Plan) -> list[tuple[str, str]]:
    """Return the pairs of tensors that the plan changes apart and that one module holds now."""
    first: dict[tuple[int, str], str] = {}
    pairs: list[tuple[str, str]] = []
    for name in (
        *(d.name for d in (*plan.adapted, *plan.trained)),
        *(e.name for e in plan.extras),
        *plan.buffers,
    ):
        path, _, attribute = name.rpartition(".")
        try:
            module = module_at(model, path)
        except AttributeError:
            continue  # nothing is there any more
        known = first.setdefault((id(module), attribute), name)
        if known != name:
            pairs.append((known, name))
    return pairs


def warn_replaced(model: nn.Module, adapter: str | None = None) -> None:
    """Warn of adapters that went with their modules: what is left is folded without them."""
    note = replaced(model, adapter)
    if note is not None:
        warn_user(f"{note}.")


def _adapts(owner: Owner, adapter: str) -> bool:
    held = binding(owner.module)
    return held is not None and adapter in held.sites.get(owner.attribute, {})
