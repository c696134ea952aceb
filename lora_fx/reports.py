"""The report of verify: every comparison that was made, and what could not be."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from lora_fx.errors import VerifyError


@dataclass(frozen=True)
class Comparison:
    """One comparison of the injected model with the same model with its weights replaced.

    ``case`` says on what (``eval, example inputs``), ``what`` is ``outputs`` or a weight's name (then
    its adapter's gradient was compared); ``difference`` is |injected - reference| / |reference| by
    norm, and ``tolerance`` the largest allowed. ``doubtful`` is a gradient so small beside the largest one
    that float32 shows nothing of it: it was compared beside that one, and float64 was asked.
    """

    case: str
    what: str
    difference: float
    tolerance: float
    doubtful: bool = False

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance (NaN is not)."""
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Report:
    """All comparisons of one verification; ``notes`` say what could not be compared, and why."""

    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether something was compared and all of it agreed."""
        return bool(self.comparisons) and all(c.ok for c in self.comparisons)

    @property
    def failures(self) -> tuple[Comparison, ...]:
        """The comparisons that disagree, the largest excess first."""
        bad = [c for c in self.comparisons if not c.ok]
        return tuple(sorted(bad, key=lambda c: -c.difference / c.tolerance))

    @property
    def worst(self) -> Comparison | None:
        """The comparison nearest to (or furthest past) its tolerance."""
        return max(self.comparisons, key=lambda c: c.difference / c.tolerance, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "ok": self.ok,
            "comparisons": [{**asdict(c), "ok": c.ok} for c in self.comparisons],
            "notes": list(self.notes),
        }

    def raise_for_failure(self) -> Report:
        """Return itself where everything agreed.

        Raises:
            VerifyError: a comparison disagreed, or nothing could be compared.
        """
        if self.ok:
            return self
        if not self.comparisons:
            raise VerifyError(
                "verify",
                expected="at least one comparison",
                got="; ".join(self.notes) or "none",
                advice="Pass example inputs that the model runs on.",
            )
        first = self.failures[0]
        told = "".join(f" ({note})" for note in self.notes if note.startswith(first.case))
        fail = f"{len(self.failures)} of {len(self.comparisons)} comparisons fail"
        raise VerifyError(
            f"{first.what} ({first.case})",
            expected=f"a relative difference of at most {first.tolerance:g}",
            got=f"{first.difference:.3g}; {fail}{told}",
            advice="The weight is used in a way that the adapter does not follow: Skip it, and report it.",
        )

    def __str__(self) -> str:
        """Say in a few lines what held."""
        head = f"verify: {'holds' if self.ok else 'FAILS'}, {len(self.comparisons)} comparisons"
        worst = self.worst
        tail = ""
        if worst is not None:
            allowed = f"{worst.difference:.1e} of {worst.tolerance:g} allowed"
            tail = f", worst {allowed} ({worst.what}, {worst.case})"
        lines = [f"  {c.what} ({c.case}): {c.difference:.2e} > {c.tolerance:g}" for c in self.failures[:10]]
        return "\n".join([head + tail, *lines, *(f"  note: {n}" for n in self.notes)])

    def __repr__(self) -> str:
        """Show the report in JSON's terms, shortened."""
        return f"Report(ok={self.ok}, comparisons={len(self.comparisons)}, notes={json.dumps(self.notes)})"
