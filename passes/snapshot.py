"""Take down what a run may change beside buffers and random state: plain attributes and hooks."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def attributes_kept(model: nn.Module) -> Generator[None]:
    """Inside, the model may be run; afterwards every module's attributes are the same objects again.

    Lists, dictionaries and sets held by a module (its own registries among them) get their entries
    back; other objects that a forward changes from within are not looked into.
    """
    held = [(module, dict(module.__dict__)) for module in model.modules()]
    contents = [
        (value, value.copy())
        for _, entries in held
        for value in entries.values()
        if _is_plain_container(value)
    ]
    try:
        yield
    finally:
        for module, entries in held:
            if not _same(module.__dict__, entries):
                module.__dict__.clear()
                module.__dict__.update(entries)
        for value, entries in contents:
            _refill(value, entries)


def _is_plain_container(value: Any) -> bool:
    return isinstance(value, (list, dict, set)) and hasattr(value, "copy")


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[key] is before[key] for key in before)


def _refill(value: Any, entries: Any) -> None:
    if not value and not entries:
        return  # as most of a module's registers are
    if isinstance(value, list):
        if len(value) != len(entries) or any(a is not b for a, b in zip(value, entries, strict=True)):
            value[:] = entries
    elif isinstance(value, dict):
        if list(value) != list(entries) or not _same(value, entries):
            value.clear()
            value.update(entries)
    elif value != entries:
        value.clear()
        value.update(entries)
