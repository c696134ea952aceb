"""What a progress bar is told: first the whole, then every step."""

from __future__ import annotations

from typing import Any

import pytest

from lora_fx import progress


def told_progress(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """Return a list that every bar's total, as ``(total, 0)``, and steps, as ``(0, step)``, are added to."""
    told: list[tuple[float, int]] = []

    class Bar(progress.Progress):
        def add_task(self, description: str, **options: Any) -> Any:
            told.append((options["total"], 0))
            return super().add_task(description, **options)

        def advance(self, task_id: Any, advance: float = 1) -> None:
            told.append((0, int(advance)))
            super().advance(task_id, advance)

    monkeypatch.setattr(progress, "Progress", Bar)
    return told
