"""The table that `make bench` ends with, and the plot beside it."""

from __future__ import annotations

import datetime as dt
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from lora_fx.files import atomic_write
from tests.benchmarks.plot import overheads
from tests.benchmarks.rows import Row


@dataclass(frozen=True)
class Figure:
    """One measured number beside what it may be at most (or, with ``least``, at least), if that is set."""

    what: str
    value: float
    limit: float | None = None
    unit: str = ""
    least: bool = False

    @property
    def met(self) -> bool:
        if self.limit is None:
            return True
        return self.value >= self.limit if self.least else self.value <= self.limit

    @property
    def measured(self) -> str:
        return f"{self.value:.3g}{self.unit}"

    @property
    def wanted(self) -> str:
        bound = "at least" if self.least else "at most"
        return "" if self.limit is None else f"{bound} {self.limit:g}{self.unit}"

    def __str__(self) -> str:
        return f"{self.what}: {self.measured}, wanted: {self.wanted or 'to be told'}"


@dataclass
class Findings:
    """What a run of the benchmarks found."""

    rows: list[Row] = field(default_factory=list[Row])
    figures: list[Figure] = field(default_factory=list[Figure])

    def check(self, figure: Figure) -> None:
        """Note a figure, and fail where it is not what it should be."""
        self.figures.append(figure)
        print(f"\n{figure}")
        assert figure.met, str(figure)


def machine() -> str:
    """The class of machine: its processor, threads and what runs on it; no names of machines or people."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    device = f"{models[0]}, {len(models)} cores" if models else platform.machine()
    if torch.cuda.is_available():
        device += f", {torch.cuda.get_device_name()}"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "peft", "transformers", "timm"))
    return f"{device}; {torch.get_num_threads()} thread; Python {platform.python_version()}, {libraries}"


_INTRO = """\
# Training steps, beside peft and the frozen floor

Measured {date} on {machine}.

The floor is the frozen model's forward and the gradient of its input. All arms run interleaved in one
process, in a new order every round; times are CPU time, medians over the rounds with 95% bootstrap
intervals. The control is the floor over a second copy of the floor: a difference smaller than its distance
from 1 is not resolved. Batch normalisation is frozen in every arm. Models have their real width and a few
layers ([models.py](models.py)). `make bench` measures again, and writes this to `artifacts/bench`.

![Overheads](overhead.svg)
"""

_NOTES = """
* *peft*, *lora_fx*, *full* (fine-tuning): time over the floor's. *of peft's*: lora_fx's overhead (that less
  1) over peft's in the same rounds, with the verdict on its limit (0.5 on BERT, ViT-S, ConvNeXt-T and the
  dispatch-bound BERT-12; 0.7 elsewhere): *missed* where it is resolved that it lies above. *step of peft's*:
  a whole step over peft's.
* *ops*: aten operations added to the floor's step, over those that peft adds. *FLOPs*: the same of FLOPs,
  products added in place counted too (torch's own counter leaves them out); peft computes six thin products
  at each weight, so 1.00 is all six, of which four make h and the gradients and two add to y and dx.
* *saved*: what the forward keeps for the backward, over the floor's. *peak*: the most bytes that a step
  holds at once, over the floor's.
"""


def markdown(found: Findings) -> str:
    """Return the whole page."""
    parts = [_INTRO.format(date=f"{dt.datetime.now(dt.UTC):%Y-%m-%d}", machine=machine())]
    if found.rows:
        parts += [_times(found.rows), _NOTES, "## Operations, FLOPs, memory\n", _counts(found.rows)]
    if found.figures:
        parts += ["\n## Injection, roles, folding\n", _figures(found.figures)]
    return "\n".join(parts)


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rows = [head, tuple("---" for _ in head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def _times(rows: list[Row]) -> str:
    head = (
        "",
        "floor, ms",
        "rounds",
        "control",
        "peft",
        "lora_fx",
        "full",
        "of peft's",
        "",
        "step of peft's",
    )
    lines: list[tuple[str, ...]] = []
    for row in rows:
        times = row.times
        ratios = (str(times.over_floor(n)) if n in times.seconds else "" for n in ("peft", "lora_fx", "full"))
        limited = row.verdict() if row.base else ""
        lines.append(
            (
                row.setup.name,
                f"{row.milliseconds:.1f}",
                str(times.rounds),
                str(times.control()),
                *ratios,
                row.quotient,
                limited,
                str(times.over_peft()) + (" **slower**" if row.slower_than_peft() else ""),
            )
        )
    return _table(head, lines)


def _counts(rows: list[Row]) -> str:
    head = (
        "",
        "ops: floor",
        "peft",
        "lora_fx",
        "ops",
        "FLOPs",
        "saved: floor, MB",
        "peft",
        "lora_fx",
        "full",
    )
    head = (*head, "peak: floor, MB", "peft", "lora_fx", "full", "injection, s: peft", "lora_fx")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        cells = [row.setup.name]
        if row.operations:
            cells += [str(row.operations["floor"])]
            cells += [f"+{row.added(row.operations, n)}" for n in ("peft", "lora_fx")]
            cells += [f"{row.share(row.operations):.2f}", f"{row.share(row.flops):.2f}"]
        else:
            cells += [""] * 5
        for what in (row.saved, row.peak):
            if not what:
                cells += [""] * 4
                continue
            cells += [f"{what['floor'] / 2**20:.1f}"]
            cells += [f"{row.over(what, n):.2f}" if n in what else "" for n in ("peft", "lora_fx", "full")]
        cells += [f"{row.injection[n]:.3f}" for n in ("peft", "lora_fx")]
        lines.append(tuple(cells))
    return _table(head, lines)


def _figures(figures: list[Figure]) -> str:
    lines = [(f.what, f.measured, f.wanted, ("met" if f.met else "missed") * bool(f.wanted)) for f in figures]
    return _table(("", "measured", "wanted", ""), lines)


def write(found: Findings, out: Path) -> None:
    """Write the table and the plot of a run."""
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "RESULTS.md", markdown(found))
    if found.rows:
        atomic_write(out / "overhead.svg", overheads(found.rows))
