"""One row of the table: everything that is measured of one setup, and what the measures say of it."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.benchmarks.arms import NAMES, Arm, Setup, arms
from tests.benchmarks.measure import Times, flops, operations, peak_bytes, saved_bytes, take_turns
from tests.benchmarks.models import CASES

OPERATIONS_LIMIT = 0.55
"""Of the operations that peft adds."""
FLOPS_LIMIT = 1.1
"""Of the six products of a branch, which is what peft adds: h = x A^T, h B^T, g B, (g B) A, dA, dB."""
SAVED_WITH_DROPOUT = 1.15


def star() -> tuple[Setup, ...]:
    """Every model at r=16, all layers, float32; and from there one step in every direction."""
    base = [Setup(case) for case in CASES.values()]
    ranks = [Setup(case, rank=rank) for case in CASES.values() for rank in (4, 64)]
    values = [Setup(case, layers="qv") for case in CASES.values() if case.qv]
    others = [
        *(
            Setup(CASES[n], precision="bfloat16")
            for n in ("BERT-base-like", "Llama-like", "ViT-S", "ConvNeXt-T")
        ),
        *(
            Setup(CASES[n], precision="autocast")
            for n in ("BERT-base-like", "GPT-2-like", "ViT-S", "ConvNeXt-T")
        ),
        *(Setup(CASES[n], dropout=0.1) for n in ("BERT-base-like", "GPT-2-like", "Llama-like", "ViT-S")),
        *(Setup(CASES[n], compiled=True) for n in ("BERT-base-like", "ViT-S")),
    ]
    return (*base, *ranks, *values, *others)


@dataclass(frozen=True)
class Row:
    """What was measured of one setup, by arm where it is a mapping; bytes, operations and FLOPs per step."""

    setup: Setup
    times: Times
    injection: Mapping[str, float]
    operations: Mapping[str, int] = field(default_factory=dict[str, int])
    flops: Mapping[str, int] = field(default_factory=dict[str, int])
    saved: Mapping[str, int] = field(default_factory=dict[str, int])
    peak: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def milliseconds(self) -> float:
        """The floor's median."""
        return 1e3 * statistics.median(self.times.seconds["floor"])

    def added(self, what: Mapping[str, int], name: str) -> int:
        return what[name] - what["floor"]

    def share(self, what: Mapping[str, int]) -> float:
        """What lora_fx adds to the floor, over what peft adds."""
        return self.added(what, "lora_fx") / self.added(what, "peft")

    def over(self, what: Mapping[str, int], name: str) -> float:
        return what[name] / what["floor"]

    @property
    def judged(self) -> bool:
        """Whether the measures of counts and memory are about this row: all layers, r=16."""
        return self.setup.rank == 16 and self.setup.layers == "all" and not self.setup.compiled

    @property
    def base(self) -> bool:
        """Whether the measure of time is about this row: as ``judged``, in float32 and without dropout."""
        return self.judged and self.setup.precision == "float32" and not self.setup.dropout

    @property
    def blur(self) -> float:
        """How far the floor is from itself: no smaller difference of two arms is seen."""
        control = self.times.control()
        return max(abs(control.low - 1), abs(control.high - 1))

    @property
    def saved_limit(self) -> float:
        """Of the floor's saved activations."""
        dropped = max(self.setup.case.saved_limit, SAVED_WITH_DROPOUT)
        return dropped if self.setup.dropout else self.setup.case.saved_limit

    def slower_than_peft(self) -> bool:
        """Whether a step is reliably longer than peft's: the interval and the control both say so."""
        return self.times.over_peft().low > 1 + self.blur

    @property
    def quotient(self) -> str:
        """lora_fx's overhead over peft's, where peft's is large enough to divide by."""
        resolved = self.times.over_floor("peft").low - 1 > self.blur
        return str(self.times.quotient()) if resolved else "peft's is not resolved"

    def verdict(self) -> str:
        """Whether the overhead is at most ``time_limit`` of peft's: met, missed or not resolved."""
        limit = self.setup.case.time_limit
        if self.times.quotient().value <= limit:
            return "met"
        excess = self.times.excess(limit)
        return "missed" if excess.low > 0 and excess.value > self.blur else "not resolved"


def measure(setup: Setup, seconds: float, names: tuple[str, ...] = NAMES) -> Row:
    """Build the setup's arms and measure all that there is to measure."""
    built = arms(setup, names)
    take_turns(built, seconds)
    row = Row(
        setup,
        Times({arm.name: arm.seconds for arm in built}),
        {arm.name: arm.injection for arm in built},
        # A compiled step has no operations of aten to count, and its backward saves as it pleases.
        {} if setup.compiled else {arm.name: operations(arm) for arm in built},
        {} if setup.compiled else {arm.name: flops(arm) for arm in built},
        {} if setup.compiled else {arm.name: saved_bytes(arm) for arm in built},
        {arm.name: peak_bytes(arm) for arm in built},
    )
    _forget(built)
    return row


def _forget(built: list[Arm]) -> None:
    built.clear()
    gc.collect()


def summary(row: Row) -> str:
    """One row in a few lines, for the terminal."""
    times = row.times
    lines = [
        f"{row.setup.name}: {row.milliseconds:.1f} ms, {times.rounds} rounds, control {times.control()}",
        "  time over the floor: "
        + ", ".join(f"{n} {times.over_floor(n)}" for n in times.seconds if not n.startswith("floor")),
        f"  overhead over peft's {row.quotient}: {row.verdict()}; step over peft's {times.over_peft()}",
    ]
    if row.operations:
        lines.append(
            f"  of what peft adds: {row.share(row.operations):.2f} ops, {row.share(row.flops):.2f} FLOPs; "
            f"saved {row.over(row.saved, 'lora_fx'):.2f} (peft {row.over(row.saved, 'peft'):.2f}); "
            f"peak {row.over(row.peak, 'lora_fx'):.2f} (peft {row.over(row.peak, 'peft'):.2f})"
        )
    return "\n".join(lines)
