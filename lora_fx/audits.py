"""Audits: what was adapted, why, in which form, and by how much."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lora_fx.matrix import Rows
from lora_fx.plans import Action, Decision, Extra, Form, Plan, numel
from lora_fx.rules import Compute
from lora_fx.tables import as_text, audit_table, ranks_text

if TYPE_CHECKING:
    from rich.console import Group

AUDIT_VERSION = 1


@dataclass(frozen=True)
class AuditRow:
    """One weight: what it is, what was decided and why, and how far it was moved.

    ``roles`` are the rows by role that the site plays, ``rows`` those that were adapted (None: all)
    and ``ranks`` the rank by role ("" for the whole weight). ``delta`` is ``|W - W0| / |W0|`` by
    norm, None where nothing was trained yet or nobody measured it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    action: Action
    reason: str
    detail: str = ""
    rule: str | None = None
    roles: Mapping[str, Rows | None] = field(default_factory=dict[str, "Rows | None"], hash=False)
    rows: Rows | None = None
    ranks: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)
    rank_text: str = ""
    form: Form | None = None
    form_reason: str = ""
    compute: Compute = "auto"
    expected: str = ""
    expected_reason: str = ""
    scale: float | None = None
    parameters: int = 0
    delta: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Totals:
    """An audit in numbers.

    ``branch_share`` is the share of the adapted weights that are computed as branches alone (0.0
    where nothing is adapted); ``share`` is of the base model's parameters (None: not known);
    ``extras`` counts the trained parameters that are no sites.
    """

    sites: int
    adapted: int
    trained: int
    skipped: int
    extras: int
    forms: Mapping[str, int] = field(hash=False)
    branch_share: float
    parameters: int
    base_parameters: int
    share: float | None
    adapter_bytes: int


@dataclass(frozen=True)
class Audit:
    """Every weight of a model with its decision, and the totals; ``source`` says what was read."""

    rows: tuple[AuditRow, ...]
    totals: Totals
    source: str = "plan"
    model: str = ""
    examples: str | None = None
    notes: tuple[str, ...] = ()

    def __rich__(self) -> Group:
        """Render as a table."""
        return audit_table(self)

    def __str__(self) -> str:
        """Return the table as text."""
        return as_text(audit_table(self))

    def to_json(self) -> str:
        """Return the audit as JSON text."""
        data: dict[str, Any] = {"audit_version": AUDIT_VERSION, **asdict(self)}
        for row in data["rows"]:
            del row["rank_text"]
        return json.dumps(data, indent=1)


def audit_plan(plan: Plan, deltas: Mapping[str, float] | None = None, source: str = "plan") -> Audit:
    """Audit a plan: one row per site, then one per other trained parameter.

    ``deltas`` maps the names of weights to ``|W - W0| / |W0|``, where that was measured.
    """
    known = deltas or {}
    rows = [_row(decision, known) for decision in plan.decisions]
    rows += [_extra_row(extra, known) for extra in plan.extras]
    return Audit(tuple(rows), _totals(plan), source, plan.model, plan.examples, plan.notes)


def _row(decision: Decision, deltas: Mapping[str, float]) -> AuditRow:
    site = decision.site
    adapted = decision.action == "adapt"
    measured = [deltas[name] for name in (site.name, *site.names) if name in deltas]
    return AuditRow(
        name=site.name,
        kind=site.kind,
        shape=site.shape,
        dtype=site.dtype,
        action=decision.action,
        reason=decision.reason.value,
        detail=decision.detail,
        rule=decision.rule,
        roles=dict(site.roles),
        rows=decision.rows,
        ranks={part.role or "": part.rank for part in decision.parts},
        rank_text=ranks_text(decision),
        form=decision.form,
        form_reason=decision.form_reason,
        compute=decision.compute,
        expected=decision.expected,
        expected_reason=decision.expected_reason,
        scale=decision.scale if adapted else None,
        parameters=0 if decision.action == "skip" else decision.parameters,
        delta=measured[0] if measured else None,
        notes=site.notes,
    )


def _extra_row(extra: Extra, deltas: Mapping[str, float]) -> AuditRow:
    return AuditRow(
        name=extra.name,
        kind="parameter",
        shape=extra.shape,
        dtype=extra.dtype,
        action="train",
        reason="rule",
        detail=extra.detail,
        form="full",
        parameters=numel(extra.shape),
        delta=deltas.get(extra.name),
    )


def _totals(plan: Plan) -> Totals:
    forms = Counter[str](d.form for d in plan.adapted if d.form is not None)
    adapted = len(plan.adapted)
    return Totals(
        sites=len(plan.decisions),
        adapted=adapted,
        trained=len(plan.trained),
        skipped=len(plan.decisions) - adapted - len(plan.trained),
        extras=len(plan.extras),
        forms=dict(forms),
        branch_share=forms["branch"] / adapted if adapted else 0.0,
        parameters=plan.parameters,
        base_parameters=plan.base_parameters,
        share=plan.parameters / plan.base_parameters if plan.base_parameters else None,
        adapter_bytes=plan.adapter_bytes,
    )
