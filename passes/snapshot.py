"""Take down what a run may change beside parameters and random state: attributes, registers and hooks."""

from __future__ import annotations

import operator
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Generator[None]:
    """Inside, the modules may be run; afterwards every module's attributes are the same objects again.

    Lists, dictionaries and sets held by a module (its own registries among them) get their entries
    back; other objects that a forward changes from within are not looked into.
    """
    held = [(module, module.__dict__.copy()) for module in modules]
    containers = [v for _, entries in held for v in entries.values() if isinstance(v, (dict, list, set))]
    contents = [(value, value.copy()) for value in containers if value]
    empty = [value for value in containers if not value]  # as most of a module's registers are
    try:
        yield
    finally:
        for module, entries in held:
            if not _same(module.__dict__, entries):
                module.__dict__.clear()
                module.__dict__.update(entries)
        for value, content in contents:
            _refill(value, content)
        for value in empty:
            if value:
                value.clear()


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Say whether two dictionaries hold the same objects under the same keys, in the same order."""
    return list(now) == list(before) and all(map(operator.is_, now.values(), before.values()))


def _refill(value: Any, entries: Any) -> None:
    if isinstance(value, list):
        if len(value) != len(entries) or not all(map(operator.is_, value, entries)):
            value[:] = entries
    elif isinstance(value, dict):
        if not _same(value, entries):
            value.clear()
            value.update(entries)
    elif value != entries:
        value.clear()
        value.update(entries)
