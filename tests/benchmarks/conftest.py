"""What the benchmarks found is written down when they end, in artifacts/bench: a table and a plot."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from tests.benchmarks.table import Findings, write

OUT = Path("artifacts/bench")


@pytest.fixture(scope="session")
def findings() -> Generator[Findings]:
    """Rows and figures of this run; written when it ends, whatever failed."""
    found = Findings()
    yield found
    write(found, OUT)
