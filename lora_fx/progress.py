"""A bar that shows how many bytes are done, where one is wanted."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn


@contextmanager
def bytes_bar(total: int, *, shown: bool) -> Generator[Callable[[int], None] | None]:
    """Give what is to be told of every part that is done, or None."""
    if not shown:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("folding", total=total)
        yield lambda count: bar.advance(task, count)
