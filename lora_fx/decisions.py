"""One site, its facts and the rules that claimed it -> one Decision."""

from __future__ import annotations

from collections.abc import Sequence

from lora_fx.claims import Claim
from lora_fx.errors import PolicyError
from lora_fx.matrix import row_count
from lora_fx.plans import Decision, Form, Part, Reason
from lora_fx.policy import Rule, Skip, Train
from lora_fx.rules import Compute
from lora_fx.sites import NO_EFFECT, OTHER, Site

_ADAPTABLE = frozenset({"float16", "bfloat16", "float32", "float64"})


def decide(site: Site, facts: Site, claims: tuple[Claim, ...], *, traced: bool) -> Decision:
    """Decide one site from the rules that claimed its rows."""
    twin = facts is not site
    origin = f"not reached by the run; decided as its twin {site.twin}" if twin else ""
    rule_text = "; ".join(dict.fromkeys(claim.rule.describe() for claim in claims)) or None
    wanted = [claim for claim in claims if not isinstance(claim.rule, Skip)]

    def skip(reason: Reason, detail: str) -> Decision:
        inherited = twin and reason in (Reason.SKIP_RULE, Reason.NO_RULE)
        return Decision(
            site, "skip", Reason.TWIN if inherited else reason, rule=rule_text, detail=_join(origin, detail)
        )

    if not wanted:
        return skip(Reason.SKIP_RULE, _skipped_rows(claims)) if claims else skip(Reason.NO_RULE, "")
    if site.dtype not in _ADAPTABLE:
        return skip(Reason.NOT_FLOAT, _dtype_obstacle(site.dtype))
    if isinstance(wanted[0].rule, Train) and site.shape:
        # A trained copy needs no multiplication: what cannot be adapted can still be trained.
        reason = Reason.TWIN if twin else Reason.RULE
        detail = _join(origin, _tied(site))
        return Decision(
            site, "train", reason, rule=rule_text, detail=detail, form="full", form_reason="a trained copy"
        )
    obstacle = _obstacle(site, facts, traced=traced)
    if obstacle is not None:
        return skip(*obstacle)
    return _adapt(site, facts, wanted, rule_text, origin)


def _dtype_obstacle(dtype: str) -> str:
    """Say why weights of a dtype get no adapter."""
    if dtype.startswith("complex"):
        return f"{dtype}: adapters and trained copies are real"
    if dtype.startswith("float"):
        return f"{dtype} would round every small delta away"
    return f"{dtype} cannot be trained"


def _obstacle(site: Site, facts: Site, *, traced: bool) -> tuple[Reason, str] | None:
    """Return why a site cannot be adapted, or None."""
    if site.unfit is not None and site.unfit.startswith(NO_EFFECT):
        return Reason.NO_EFFECT, site.unfit.removeprefix(NO_EFFECT).lstrip(": ")
    if site.unfit is not None:
        return Reason.UNFIT, site.unfit
    if traced and not facts.uses:
        return Reason.NOT_REACHED, "the run did not use it, and no used weight is its twin"
    if site.kind == OTHER and not facts.uses:
        return Reason.UNFIT, "what it does shows in a recorded run alone: pass example_inputs"
    return None


def _adapt(site: Site, facts: Site, claims: Sequence[Claim], rule_text: str | None, origin: str) -> Decision:
    rules = [claim.rule for claim in claims if isinstance(claim.rule, Rule)]
    _refuse_mixture(site, rules)
    rule = rules[0]
    details = [origin, _tied(site)]
    parts: list[Part] = []
    for claim, asked in zip(claims, rules, strict=True):
        part, note = _part(site, claim, asked)
        parts.append(part)
        details.append(note)
    form, form_reason = form_of(facts, compute=rule.compute, dora=rule.dora)
    return Decision(
        site,
        "adapt",
        Reason.TWIN if origin else Reason.RULE,
        rule=rule_text,
        detail=_join(*details),
        form=form,
        form_reason=form_reason,
        parts=tuple(parts),
        alpha=float(rule.rank if rule.alpha is None else rule.alpha),
        scale=rule.scale,
        dropout=rule.dropout,
        dora=rule.dora,
        init=rule.init,
        compute=rule.compute,
    )


def _part(site: Site, claim: Claim, rule: Rule) -> tuple[Part, str]:
    """Return one pair A, B, and in words whether its rank had to be capped."""
    rows, columns = row_count(claim.rows, site.form), site.form.in_features
    rank = min(rule.rank, rows, columns)
    part = Part(rank, claim.role, claim.rows)
    if rank == rule.rank:
        return part, ""
    where = f"{claim.role}: " if claim.role else ""
    most = f"the most that {rows} x {columns} can hold; scale {rule.scale:g} kept"
    return part, f"{where}rank {rule.rank} capped at {rank}, {most}"


def form_of(facts: Site, *, compute: Compute, dora: bool) -> tuple[Form, str]:
    """Return how the adapter is computed, and why: a branch where every use is proven to allow it."""
    form, why = _form_of_uses(facts, dora=dora)
    if compute != "weight":
        return form, why
    asked = "compute='weight' asks for it"
    idle = form == "weight" and (dora or facts.uses)
    return "weight", f"{asked}, and changes nothing: {why}" if idle else asked


def _form_of_uses(facts: Site, *, dora: bool) -> tuple[Form, str]:
    whys = dict.fromkeys(use.why for use in facts.uses if use.why)
    if dora:
        return "weight", "DoRA scales whole rows, and no branch for it exists"
    if not facts.uses:
        return "weight", "no recorded run shows how it is used"
    branches = [use.branch for use in facts.uses]
    if all(branches):
        return "branch", "; ".join(whys) or "every use can be computed as a branch"
    if not any(branches):
        return "weight", "; ".join(whys) or "no use can be computed as a branch"
    other = dict.fromkeys(use.why for use in facts.uses if not use.branch and use.why)
    return "mixed", f"{sum(branches)} of {len(branches)} uses as a branch; " + (
        "; ".join(other) or "the others cannot be"
    )


def _tied(site: Site) -> str:
    """Say that one parameter is several weights: a change to it is seen by all of them."""
    others = [name for name in site.names if name != site.name]
    return f"changes {', '.join(others)} too, which is the same parameter" if others else ""


def _skipped_rows(claims: Sequence[Claim]) -> str:
    roles = [claim.role for claim in claims if claim.role]
    return f"rows of {', '.join(roles)} skipped, no rule matches the others" if roles else ""


def _join(*texts: str) -> str:
    return "; ".join(text for text in texts if text)


def _refuse_mixture(site: Site, rules: Sequence[Rule]) -> None:
    """Refuse rules that meet in one fused weight and disagree on what it has only one of."""
    for other in rules[1:]:
        for option in ("scale", "dropout", "dora", "init", "compute"):
            ours, theirs = getattr(rules[0], option), getattr(other, option)
            if ours != theirs:
                raise PolicyError(
                    site.name,
                    expected=f"one {option} for the rules that share this fused weight",
                    got=f"{ours!r} from {rules[0].describe()} and {theirs!r} from {other.describe()}",
                    advice=f"Give both rules the same {option}; their ranks may differ.",
                )
