"""Tables that stay readable: in columns where they fit, else one paragraph for each row."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_INDENT = "    "
_NUMBERS = frozenset({"n", "trained", "|dW|/|W|"})
_LABELLED = frozenset({"rank", "trained", "form", "|dW|/|W|", "before", "after"})
_WRAPPED = frozenset({"why", "before", "after"})
_NARROWEST = 24
"""What a wrapped column needs, so that it does not run down the page word by word."""


@dataclass
class FittedTable:
    """Rows of text under columns, of which the first is a name that is never broken inside a word.

    Where the console is too narrow for the columns, every row is its name on a line of its own and
    the other cells, wrapped, beneath it.
    """

    columns: Sequence[str]
    rows: list[tuple[Sequence[str], str]] = field(default_factory=list[tuple[Sequence[str], str]])

    def add_row(self, *cells: str, style: str = "") -> None:
        """Append a row."""
        self.rows.append((cells, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render in columns where the narrowest form of them fits, else as paragraphs."""
        del console
        if self._narrowest() <= options.max_width:
            yield self._table()
            return
        for cells, style in self.rows:
            yield Text("\n".join(_broken_at_dots(cells[0], options.max_width)), style=style)
            yield Text("\n".join(self._paragraph(cells, options.max_width)), style=style)

    def _narrowest(self) -> int:
        """Return the width that the columns need with one space between them."""
        needed = (
            min(self._longest(name), _NARROWEST) if name in _WRAPPED else self._longest(name)
            for name in self.columns
        )
        return sum(needed) + len(self.columns) - 1

    def _longest(self, name: str) -> int:
        place = self.columns.index(name)
        lines = (line for cells, _ in self.rows for line in cells[place].splitlines())
        return max(len(name), *map(len, lines), 0)

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
        for name in self.columns:
            wrapped = name in _WRAPPED
            table.add_column(
                name,
                justify="right" if name in _NUMBERS else "left",
                no_wrap=not wrapped,
                min_width=min(self._longest(name), _NARROWEST) if wrapped else self._longest(name),
                overflow="fold",
            )
        for cells, style in self.rows:
            table.add_row(*map(Text, cells), style=style)
        return table

    def _paragraph(self, cells: Sequence[str], width: int) -> list[str]:
        said = [
            f"{name} {cell}" if name in _LABELLED else cell
            for name, cell in zip(self.columns[1:], cells[1:], strict=True)
            if cell and name != "n"  # the name's braces count already
        ]
        return textwrap.wrap(
            "  ".join(" ".join(text.split()) for text in said),
            max(width, len(_INDENT) + 1),
            initial_indent=_INDENT,
            subsequent_indent=_INDENT,
            break_on_hyphens=False,
        )


def _broken_at_dots(name: str, width: int) -> list[str]:
    """Return a qualified name in lines of at most ``width``, broken after dots."""
    lines = [""]
    for part in [piece + "." for piece in name.split(".")]:
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append(_INDENT)
        lines[-1] += part
    lines[-1] = lines[-1].removesuffix(".")
    return lines
