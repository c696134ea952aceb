"""Roles that a plan says and a run of another model does not: the plan's rows are what is adapted."""

from __future__ import annotations

from collections.abc import Mapping

from lora_fx.plans import Plan
from lora_fx.sites import Site
from lora_fx.tables import roles_text

_SHOWN = 3


def other_roles(plan: Plan, here: Mapping[str, Site], model: str) -> str | None:
    """Say which adapted weights play other roles in this model's run than in the plan's, or None.

    A weight that one of the two runs did not use, or that no run was recorded for, tells nothing.
    """
    told = [
        f"{planned.name} is {_said(planned)} in the plan, {_said(found)} here"
        for planned in (decision.site for decision in plan.adapted)
        if planned.uses and (found := here[planned.name]).uses and dict(planned.roles) != dict(found.roles)
    ]
    if not told:
        return None
    more = f"; and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    shown = "; ".join(told[:_SHOWN])
    return (
        f"the plan's rows are adapted, but this run of {model} gives other roles to them: {shown}{more}; "
        "where the roles decide, make the plan on this model"
    )


def _said(site: Site) -> str:
    return roles_text(site.roles) or "without a role"
