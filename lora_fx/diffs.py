"""How two plans differ, and whether a plan fits the sites of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.text import Text

from lora_fx.collapsed import exact_groups
from lora_fx.errors import PlanError
from lora_fx.fitted import FittedTable
from lora_fx.sites import Site
from lora_fx.tables import as_text, name_numbers, name_pattern, ranks_text, rows_text, shape_text

if TYPE_CHECKING:
    from lora_fx.plans import Decision, Extra, Plan

_SHOWN = 8
_BESIDE_DECISIONS: Mapping[str, str] = {
    "reason": "rule", "rank": "", "rows": "all", "form": "", "scale": "1",
    "dropout": "0", "dora": "False", "init": "kaiming", "compute": "auto",
}  # fmt: skip
"""What is said beside a decision, with what is usual and need not be shown."""


@dataclass(frozen=True)
class Change:
    """One fact about one weight (or about the plan: ``name`` "") that two plans say differently."""

    name: str
    what: str
    before: str
    after: str


@dataclass(frozen=True)
class PlanDiff:
    """Where two plans differ; false where they do not."""

    changes: tuple[Change, ...]

    def __bool__(self) -> bool:
        """Say whether there is a difference."""
        return bool(self.changes)

    def __rich__(self) -> FittedTable | Text:
        """Render as a table, layers that differ alike in one line."""
        if not self.changes:
            return Text("no difference")
        table = FittedTable(("weight", "n", "what", "before", "after"))
        groups: dict[tuple[str, ...], list[str]] = {}
        for change in _shown(self.changes):
            key = (name_pattern([change.name], wild=True), change.what, change.before, change.after)
            groups.setdefault(key, []).append(change.name)
        for (_, what, before, after), gathered in groups.items():
            for names in exact_groups(gathered, lambda name: (name_numbers(name),)):
                table.add_row(name_pattern(names) or "(the plan)", str(len(names)), what, before, after)
        return table

    def __str__(self) -> str:
        """Return the table as text."""
        return as_text(self.__rich__())


def _shown(changes: Sequence[Change]) -> list[Change]:
    """Leave to a decision what follows from it: a weight adapted by one plan alone has a rank there alone."""
    decided = {change.name for change in changes if change.what == "decision"}
    sides: dict[str, tuple[list[str], list[str]]] = {}
    for change in changes:
        if change.name in decided and change.what in _BESIDE_DECISIONS:
            for texts, value in zip(
                sides.setdefault(change.name, ([], [])), (change.before, change.after), strict=True
            ):
                texts.extend(
                    [f"{change.what} {value}"] if value and value != _BESIDE_DECISIONS[change.what] else []
                )

    def told(change: Change) -> Change:
        if change.what != "decision" or change.name not in sides:
            return change
        before, after = sides[change.name]
        return replace(
            change, before=", ".join([change.before, *before]), after=", ".join([change.after, *after])
        )

    return [told(c) for c in changes if c.name not in decided or c.what not in _BESIDE_DECISIONS]


def diff_plans(before: Plan, after: Plan) -> PlanDiff:
    """Compare what two plans do; the wording of rules, details and notes does not count."""
    changes: list[Change] = []
    whole = {"model": before.model, "norm_stats": before.norm_stats}
    for what, value in whole.items():
        changes += _changed("", what, value, str(getattr(after, what)))
    for decision in before.decisions:
        if decision.name not in after:
            changes.append(Change(decision.name, "weight", decision.action, "not there"))
            continue
        left, right = _facts(decision), _facts(after[decision.name])
        for what in left | right:
            changes += _changed(decision.name, what, left.get(what, ""), right.get(what, ""))
    changes += [
        Change(d.name, "weight", "not there", d.action)
        for d in after.decisions
        if not any(name in before for name in (d.name, *d.site.names))
    ]
    old, new = _extras(before.extras), _extras(after.extras)
    for name in old | new:
        changes += _changed(name, "parameter", old.get(name, "frozen"), new.get(name, "frozen"))
    moving = dict.fromkeys(before.buffers, "moves"), dict.fromkeys(after.buffers, "moves")
    for name in moving[0] | moving[1]:
        changes += _changed(name, "buffer", *(side.get(name, "left alone") for side in moving))
    return PlanDiff(tuple(changes))


def _changed(name: str, what: str, before: str, after: str) -> list[Change]:
    return [] if before == after else [Change(name, what, before, after)]


def _extras(extras: Sequence[Extra]) -> dict[str, str]:
    return {extra.name: f"trained, {shape_text(extra.shape)}" for extra in extras}


def _facts(decision: Decision) -> dict[str, str]:
    """Return what a decision does, in words."""
    site = decision.site
    facts = {
        "shape": shape_text(site.shape),
        "kind": site.kind,
        "decision": decision.action,
        "reason": decision.reason.value,
    }
    if decision.action != "adapt":
        return facts
    return facts | {
        "rank": ranks_text(decision),
        "rows": rows_text(decision.rows),
        "form": decision.form or "",
        "scale": f"{decision.scale:g}",
        "dropout": f"{decision.dropout:g}",
        "dora": str(decision.dora),
        "init": decision.init,
        "compute": decision.compute,
    }


def refuse_misfit(
    plan: Plan,
    sites: Sequence[Site],
    parameters: Mapping[str, tuple[tuple[int, ...], str]],
    buffers: Collection[str] = (),
    *,
    traced: bool = True,
) -> None:
    """Check that a plan can be carried out on a model with these sites, parameters and buffers.

    Every weight that the plan adapts or trains must be there with the same shape, matrix form and
    ties; weights that it leaves alone may be missing or new, and dtypes may differ. Sites that no
    recorded run was made for (``traced`` false) do not tell the matrix form: the plan's is taken.

    Raises:
        PlanError: naming every weight that differs, and how.
    """
    found = {name: site for site in sites for name in (site.name, *site.names)}
    problems: list[str] = []
    for decision in (*plan.adapted, *plan.trained):
        site = found.get(decision.name)
        if site is None:
            there = " (it is a parameter, but no weight)" if decision.name in parameters else ""
            problems.append(f"{decision.name} is not there{there}")
        else:
            problems += _differences(decision, site, traced=traced)
    for extra in plan.extras:
        shape = parameters[extra.name][0] if extra.name in parameters else None
        if shape != extra.shape:
            now = "is not there" if shape is None else f"has the shape {shape_text(shape)}"
            problems.append(f"{extra.name} ({shape_text(extra.shape)} in the plan) {now}")
    problems += [f"buffer {name} is not there" for name in plan.buffers if name not in buffers]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise PlanError(
            f"the plan for {plan.model or 'a model'}",
            expected="a model with the weights that the plan adapts or trains",
            got="; ".join(problems[:_SHOWN]) + more,
            advice="Make a plan for this model from the policy, or load the model the plan was made for.",
        )


def _differences(decision: Decision, site: Site, *, traced: bool) -> list[str]:
    planned = decision.site
    problems: list[str] = []
    if planned.shape != site.shape:
        problems.append(
            f"{planned.name} is {shape_text(site.shape)}, {shape_text(planned.shape)} in the plan"
        )
    elif traced and decision.action == "adapt" and planned.form != site.form:
        problems.append(f"{planned.name} is read as another matrix ({site.kind}, {planned.kind} in the plan)")
    ties, planned_ties = {site.name, *site.names}, {planned.name, *planned.names}
    if ties != planned_ties:
        problems.append(
            f"{planned.name} is tied to {_listed(ties - {planned.name})}, in the plan to "
            f"{_listed(planned_ties - {planned.name})}"
        )
    if site.unfit is not None and decision.action == "adapt":
        problems.append(f"{planned.name} cannot be adapted: {site.unfit}")
    return problems


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
