"""Budgets: how much may be trained, and how ranks are scaled until they fit."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_fx.errors import PolicyError

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
}


@dataclass(frozen=True)
class Budget:
    """A limit on what is trained: a number of parameters, a share of the model's, or bytes on disk."""

    kind: Literal["parameters", "share", "bytes"]
    amount: float

    def limit(self, base_parameters: int) -> int:
        """Return the limit in parameters or bytes; a share is of the base model's parameters."""
        return math.floor(self.amount * base_parameters) if self.kind == "share" else math.floor(self.amount)

    @property
    def unit(self) -> str:
        """What is counted."""
        return "bytes" if self.kind == "bytes" else "parameters"


def parse_budget(value: object) -> Budget:
    """Read a policy's ``budget``.

    A whole number of at least 1 counts trainable parameters, a float in (0, 1) is a share of the
    base model's parameters, and text such as ``"35MB"`` (B, kB, MB, GB, KiB, MiB, GiB) is the size
    of the adapter.

    Raises:
        PolicyError: the value is none of these.
    """
    if isinstance(value, bool):
        raise _bad(value)
    if isinstance(value, int) and value >= 1:
        return Budget("parameters", value)
    if isinstance(value, float) and 0.0 < value < 1.0:
        return Budget("share", value)
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b\s*", value.lower())
        if found is not None and float(found[1]) > 0:
            return Budget("bytes", float(found[1]) * _UNITS[found[2] or ""])
    raise _bad(value)


def _bad(value: object) -> PolicyError:
    return PolicyError(
        "Policy(budget=...)",
        expected="a number of parameters (int >= 1), a share (float between 0 and 1) or a size (35MB)",
        got=repr(value),
        advice='Write for example budget=1_000_000, budget=0.01 or budget="35MB".',
    )


@dataclass(frozen=True)
class Fit:
    """Ranks that fit a budget (0: none left), and how they came about."""

    ranks: tuple[int, ...]
    factor: float
    floored: int
    spent: int


def fit_ranks(wanted: Sequence[int], costs: Sequence[int], available: int) -> Fit:
    """Scale ranks by one common factor until ``sum(rank * cost)`` is at most ``available``.

    Every rank becomes ``max(1, floor(factor * wanted))``; where that 1 is more than the factor
    gives, the factor for the others is lowered to pay for it. What flooring left over is handed out
    one rank at a time, in order, to whoever is below what was wanted and whose next rank fits. Where
    not even rank 1 fits everywhere, rank 1 is given in order as long as it fits, and the others get
    0. Ranks never exceed what was wanted.
    """
    total = sum(r * c for r, c in zip(wanted, costs, strict=True))
    if total <= available:
        return Fit(tuple(wanted), 1.0, total, total)
    if sum(costs) > available:
        return _ones(costs, available)
    at_one: set[int] = set()
    while True:
        paid = sum(costs[i] for i in at_one)
        scaled = sum(wanted[i] * costs[i] for i in range(len(wanted)) if i not in at_one)
        factor = (available - paid) / scaled if scaled else 0.0
        below = {i for i, r in enumerate(wanted) if i not in at_one and factor * r < 1.0}
        if not below:
            break
        at_one |= below
    ranks = [1 if i in at_one else math.floor(factor * r) for i, r in enumerate(wanted)]
    floored = sum(r * c for r, c in zip(ranks, costs, strict=True))
    spent = _hand_out(ranks, wanted, costs, available, floored)
    return Fit(tuple(ranks), factor, floored, spent)


def _hand_out(
    ranks: list[int], wanted: Sequence[int], costs: Sequence[int], available: int, spent: int
) -> int:
    """Raise ranks by one, in order and round after round, while the next one fits."""
    raised = True
    while raised:
        raised = False
        for i, cost in enumerate(costs):
            if ranks[i] < wanted[i] and spent + cost <= available:
                ranks[i] += 1
                spent += cost
                raised = True
    return spent


def _ones(costs: Sequence[int], available: int) -> Fit:
    ranks: list[int] = []
    spent = 0
    for cost in costs:
        fits = spent + cost <= available
        ranks.append(int(fits))
        spent += cost if fits else 0
    return Fit(tuple(ranks), 0.0, spent, spent)
