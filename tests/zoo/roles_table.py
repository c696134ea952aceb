"""Write tests/zoo/ROLES.md: roles found against the truth written by hand, architecture by architecture.

Run it from the repository's root: ``python -m tests.zoo.roles_table``. Mistakes are listed, not dropped.
"""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import nn

from lora_fx.matrix import Rows
from lora_fx.passes.match import match
from lora_fx.passes.roles import assign_roles
from lora_fx.passes.trace import trace
from lora_fx.sites import Site
from tests.zoo.perturbation import perturb
from tests.zoo.roles_truth import Truth

TABLES = {
    "Language: encoders": "roles_truth_language",
    "Language: decoders": "roles_truth_decoders",
    "Vision, speech and several at once (transformers)": "roles_truth_mixed",
    "Vision: transformers (timm)": "roles_truth_timm",
    "Vision: convolutional and hybrid (timm)": "roles_truth_convolutional",
}
REMARKS = {"cross": "cross-attention", "position": "carries positions"}
PATH = Path(__file__).parent / "ROLES.md"


@dataclass(frozen=True)
class Result:
    """What was found for one architecture, and what of it is wrong."""

    name: str
    model: str
    source: str
    sites: int
    named: int
    fused: str
    attentions: int
    perturbations: int
    mistakes: tuple[str, ...]
    failures: tuple[str, ...]


def all_truths() -> Iterator[tuple[str, Truth]]:
    """Yield every architecture with its table's title."""
    for title, module in TABLES.items():
        for truth in importlib.import_module(f"tests.zoo.{module}").TRUTHS:
            yield title, truth


def examine(truth: Truth) -> Result:
    """Build one architecture, find its roles, compare them with the truth and perturb them."""
    model, inputs = truth.build()
    with torch.no_grad():
        traced = trace(model, inputs)
        sites = assign_roles(traced, match(traced))
        perturbed = perturb(traced, sites)
    mistakes = [*_mistakes(truth, sites), *(f"no weight is called {p}" for p in truth.unused(sites))]
    return Result(
        truth.name,
        type(model).__name__,
        _source(model),
        len(sites),
        sum(bool(site.roles) for site in sites),
        _fused(sites),
        perturbed.attentions,
        perturbed.perturbations,
        tuple(mistakes),
        perturbed.failures,
    )


def _mistakes(truth: Truth, sites: Iterable[Site]) -> Iterator[str]:
    for site in sites:
        found, wanted = dict(site.roles), truth.roles(site)
        if found != wanted:
            yield f"{site.name}: {_said(found)}, not {_said(wanted)}"
        for kind, start in REMARKS.items():
            said = any(note.startswith(start) for note in site.notes)
            if said != truth.remarked(kind, site):
                yield f"{site.name}: {'' if said else 'not '}remarked as {kind}"


def _said(roles: dict[str, Rows | None]) -> str:
    return " ".join(f"{role}{_rows(rows)}" for role, rows in roles.items()) or "nothing"


def _rows(rows: Rows | None) -> str:
    if rows is None:
        return ""
    shown = [f"{start}:{stop}" for start, stop in rows[:2]] + ["..."] * (len(rows) > 2)
    return f"[{','.join(shown)}]"


def _source(model: nn.Module) -> str:
    return type(model).__module__.replace(".", "/") + ".py"


def _fused(sites: Iterable[Site]) -> str:
    """Show one weight of each kind of layout that has rows."""
    shown: dict[tuple[str, ...], str] = {}
    for site in sites:
        if any(rows is not None for rows in site.roles.values()):
            shown.setdefault(tuple(site.roles), _said(dict(site.roles)))
    return "; ".join(shown.values())


JUDGEMENTS = """
What a weight does is not always what its source calls it, nor always one thing. The truth takes these
views, each of which could be taken otherwise:

- DaViT's attention between channels weighs what its source calls q with the softmax of its kᵀv: by
  function k asks, v is asked, and q is the value.
- A gated unit's `gate` is what goes through the activation (ModernBERT calls that the input).
- BoTNet and HaloNet have no output projection: the 1 x 1 convolution behind the attention is it.
- Talking heads' weights mix heads and have a remark, no role; so do depthwise convolutions on q, k or v,
  whose role goes to the weight behind them.
- Latent attention's first, low-rank weights have a role only where they feed an operand themselves.
- The first decoder layer of Conditional DETR has zeros for content: there what is made of the learned
  queries makes q and k, and is no mere position.
- Attention without a softmax of products (linear, additive, sampled, outlooking) has no q, k or v.
- A convolution block is a feed-forward block where its first and last weights are 1 x 1, what lies
  between is depthwise, and its result is added to what it reads: an inverted residual that widens is none.
- A weight that reads the inputs themselves is a stem, unless it is part of an attention or a block.
"""


def lines(results: list[tuple[str, Result]]) -> Iterator[str]:
    """Yield the page."""
    total = {
        name: sum(getattr(r, name) for _, r in results) for name in ("sites", "attentions", "perturbations")
    }
    right = sum(not r.mistakes for _, r in results)
    sound = sum(not r.failures for _, r in results)
    text = f"""
        {len(results)} architectures, {total["sites"]} weights.
        Right in every weight's roles, rows and remarks: {right}.
        A check that needs no truth perturbs the rows named q, k and v, one by one and together, around
        every attention ({total["attentions"]} attentions, {total["perturbations"]} perturbations);
        each changed its own operand and no other in {sound} architectures.
        Written by `python -m tests.zoo.roles_table`; the truth is in `tests/zoo/roles_truth_*.py`,
        read from the sources named here.
    """
    yield "# Roles found, against the truth written by hand"
    yield ""
    yield from textwrap.wrap(" ".join(text.split()), 105)
    yield ""
    yield "## Mistakes"
    yield ""
    wrong = [f"- {r.name}: {text}" for _, r in results for text in (*r.mistakes, *r.failures)]
    yield from wrong or ["None."]
    yield ""
    yield "## Judgements"
    yield JUDGEMENTS.rstrip()
    for title in TABLES:
        yield from _table(title, [r for t, r in results if t == title])


def _table(title: str, results: list[Result]) -> Iterator[str]:
    yield ""
    yield f"## {title}"
    yield ""
    heads = ("architecture", "source", "weights", "named", "rows", "attentions", "truth", "perturbed")
    yield f"| {' | '.join(heads)} |"
    yield "|---|---|---:|---:|---|---:|---|---|"
    for r in results:
        truth = "right" if not r.mistakes else f"{len(r.mistakes)} wrong"
        moved = f"{r.perturbations}, right" if not r.failures else f"{len(r.failures)} wrong"
        cells = (r.name, f"`{r.source}`", r.sites, r.named, r.fused, r.attentions, truth, moved)
        yield "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> int:
    """Write the page; 1 where something is wrong."""
    results = [(title, examine(truth)) for title, truth in track(list(all_truths()), "Roles")]
    PATH.write_text("\n".join(lines(results)) + "\n")
    return int(any(r.mistakes or r.failures for _, r in results))


if __name__ == "__main__":
    from tests import conftest  # noqa: F401 - what has to be done before torchvision is imported

    sys.exit(main())
