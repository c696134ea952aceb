"""Control operators: ``torch.cond`` and ``while_loop``, which call functions that they are given.

Eagerly one of the branches of ``torch.cond`` runs, and the body of a loop as often as it turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._ops import HigherOrderOperator

_CONTROL = frozenset({"cond", "while_loop"})
"""Those that return what their bodies return: others copy it, map it over a batch or differentiate it."""


def is_control(func: Any) -> bool:
    """Say whether a call is a control operator's, whose bodies run as plain code."""
    return isinstance(func, HigherOrderOperator) and func.__name__ in _CONTROL


def with_bodies(args: tuple[Any, ...], wrap: Callable[[Callable[..., Any]], Any]) -> tuple[Any, ...]:
    """Return the arguments with every body wrapped."""
    return tuple(wrap(value) if callable(value) else value for value in args)
