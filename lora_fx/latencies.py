"""Latency: the record of a paired comparison of two ONNX files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lora_fx.tables import as_text

Verdict = Literal["equal", "different", "not resolved"]

EQUAL = (0.98, 1.02)
"""The ratios that count as equal."""

RESOLUTION = 0.02
"""The largest half-width of the A/A control's interval with which "equal" may be said."""


@dataclass(frozen=True)
class Ratio:
    """A median ratio of paired times and its 95% confidence interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    @property
    def outside(self) -> bool:
        """Whether the interval lies wholly outside what counts as equal."""
        return self.low > EQUAL[1] or self.high < EQUAL[0]

    def __str__(self) -> str:
        """Return ``value [low-high]``."""
        return f"{self.value:.4f} [{self.low:.4f}-{self.high:.4f}]"


@dataclass(frozen=True)
class Latency:
    """Time of a folded file over time of its base, with the control that says what can be seen.

    ``ratio`` is folded / base; ``control`` is base / base, from two sessions of the base measured in
    the same rounds. Times are medians in seconds of ``clock``. ``difference`` is the first place where the
    graphs differ, "" where they hold the same nodes and only numbers differ.
    """

    base: str
    folded: str
    ratio: Ratio
    control: Ratio
    base_seconds: float
    folded_seconds: float
    rounds: int
    provider: str
    threads: int
    batch: str = ""
    clock: str = "wall clock"
    difference: str = ""

    @property
    def verdict(self) -> Verdict:
        """Return "equal" only where the interval lies within 0.98-1.02 and the control resolves 0.02.

        "different" where the interval lies wholly outside 0.98-1.02; "not resolved" in every other
        case, also where the control sees a difference although there is none.
        """
        if self.control.outside:
            return "not resolved"
        if EQUAL[0] <= self.ratio.low and self.ratio.high <= EQUAL[1]:
            return "equal" if self.control.half_width <= RESOLUTION else "not resolved"
        return "different" if self.ratio.outside else "not resolved"

    def to_json(self) -> str:
        """Return the record and its verdict as JSON text."""
        data: dict[str, Any] = {**vars(self), "ratio": vars(self.ratio), "control": vars(self.control)}
        return json.dumps({"verdict": self.verdict, **data}, indent=1)

    def table(self) -> Table:
        """Return the comparison as a rich table."""
        table = Table(title=f"Latency of {self.folded} against {self.base}: {self.verdict}")
        for column in ("", "median ms", "ratio [95%]"):
            table.add_column(column)
        table.add_row("base", f"{self.base_seconds * 1e3:.3f}", "")
        table.add_row("folded", f"{self.folded_seconds * 1e3:.3f}", str(self.ratio))
        table.add_row("base again (control)", "", str(self.control))
        threads = f"{self.threads} thread" + ("s" if self.threads != 1 else "")
        graphs = f"the graphs differ at {self.difference}" if self.difference else "the graphs are the same"
        measured = f"{self.rounds} rounds, {self.provider}, {threads}, {self.clock}; {self.batch}"
        table.caption = Text(f"{measured}; {graphs}")
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Print as a table where rich prints."""
        yield self.table()

    def __str__(self) -> str:
        """Return the table as plain text."""
        return as_text(self.table())
