"""Warnings that point at the line of the user's that called lora_fx."""

from __future__ import annotations

import inspect
import warnings

_PACKAGE = __name__.partition(".")[0]


def warn_user(note: str) -> None:
    """Give a UserWarning, placed where lora_fx was called from, however deep inside it arises."""
    level, outermost, frame = 1, 1, inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
            outermost = level
        level, frame = level + 1, frame.f_back
    warnings.warn(note, UserWarning, stacklevel=outermost + 1)
