"""What the roles ask of one model of the zoo: that every attention stands perturbation.

What may have been overlooked is looked for without the role pass's own idea of an attention: every
softmax of the recorded run that no attention was found around, and every module whose class is called
an attention but of whose weights none is a query, a key, a value or an output. Besides, the operands of
attentions that no weight of that role makes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import fx, nn

from lora_fx.passes.attention import Attention, find_attentions
from lora_fx.passes.attention_operands import Orientation, behind_depthwise
from lora_fx.passes.flow import Flow, Link
from lora_fx.passes.match import match
from lora_fx.passes.op_groups import SOFTMAX
from lora_fx.passes.roles import assign_roles
from lora_fx.passes.softmax import softmax_of
from lora_fx.passes.trace import Trace, trace
from lora_fx.sites import NO_EFFECT, Site
from tests.zoo.catalogue import Built, build
from tests.zoo.measure import Row, Subject
from tests.zoo.perturbation import perturb

CALLED_ATTENTION = re.compile(r"atten|attn|mhsa|mhca", re.IGNORECASE)
INNER = frozenset({"q", "k", "v", "o"})


def measure_roles(name: str, *, tell: Callable[[Row], None] = lambda row: None) -> Row:
    """Return one row: what was found, what perturbation says of it, and what was left unnamed."""
    row: Row = {"name": name, "seconds": {}, "failed": {}, "roles": {}}
    subject = Subject(row, tell)
    built: Built | None = subject.stage("build", lambda: build(name))
    if built is None:
        return row
    model, inputs = built
    row["class"] = type(model).__name__
    with torch.no_grad():
        traced: Trace | None = subject.stage("trace", lambda: trace(model, inputs))
        if traced is None:
            return row
        sites: tuple[Site, ...] | None = subject.stage("roles", lambda: assign_roles(traced, match(traced)))
        if sites is None:
            return row
        subject.stage("perturb", lambda: _perturb(traced, sites, row))
        subject.stage("overlooked", lambda: _overlooked(model, traced, sites, row))
    return row


def _perturb(traced: Trace, sites: tuple[Site, ...], row: Row) -> None:
    found = perturb(traced, sites)
    roles = Counter(role for site in sites for role in site.roles)
    row["roles"].update(
        attentions=found.attentions,
        perturbations=found.perturbations,
        failures=list(found.failures),
        sites=len(sites),
        named=sum(bool(site.roles) for site in sites),
        found=dict(roles),
        unstable=[s.name for s in sites if any("rows differ" in note for note in s.notes)],
    )
    assert not found.failures, f"{len(found.failures)} perturbations: {found.failures[0]}"


def _overlooked(model: nn.Module, traced: Trace, sites: Sequence[Site], row: Row) -> None:
    flow = Flow(traced.graph, sites)
    attentions = find_attentions(flow)
    flow.follow_veins({node: through for attention in attentions for node, through in attention.veins})
    known = {attention.node for attention in attentions}
    lone = [n for n in traced.graph.nodes if n not in known and n not in flow.links and _is_softmax(n, flow)]
    row["roles"]["softmaxes"] = dict(Counter(_home(n) for n in lone))
    row["roles"]["bare"] = dict(Counter(_bare(flow, attentions)))
    row["roles"]["beside"] = dict(Counter(_beside(flow, attentions)))
    classes, unreached = Counter[str](), Counter[str]()
    for kind, inside in _bare_modules(model, sites):
        reached = sorted({re.sub(r"\d+", "*", name) for name, site in inside.items() if _acts(site)})
        (classes if reached else unreached)[f"{kind}: {', '.join(reached)}" if reached else kind] += 1
    row["roles"].update(classes=dict(classes), unreached=dict(unreached))


def _acts(site: Site) -> bool:
    """Whether a weight was used, and changes an output."""
    return bool(site.uses) and not (site.unfit or "").startswith(NO_EFFECT)


def _is_softmax(node: fx.Node, flow: Flow) -> bool:
    return node.meta.get("op") in SOFTMAX or softmax_of(node, flow) is not None


def _bare(flow: Flow, attentions: Sequence[Attention]) -> Iterator[str]:
    """Yield the operands of attentions that no weight of that role makes."""
    for attention, role, makers in _operands(flow, attentions):
        if not any(role in link.site.roles for link in makers):
            yield f"{role} in {_home(attention.node)}"


def _beside(flow: Flow, attentions: Sequence[Attention]) -> Iterator[str]:
    """Yield the weights that an operand is made of besides those of its role, and that have no remark."""
    for _, role, makers in _operands(flow, attentions):
        if any(role in link.site.roles for link in makers):
            for site in (link.site for link in makers):
                if not site.roles and not site.notes:
                    yield f"{role}: {re.sub(r'[0-9]+', '*', site.name)}"


def _operands(flow: Flow, attentions: Sequence[Attention]) -> Iterator[tuple[Attention, str, list[Link]]]:
    orientation = Orientation(flow)
    for attention in attentions:
        for role, nodes in orientation.operands(attention).named():
            makers = [behind_depthwise(flow, m) or m for node in nodes for m in flow.makers(node)]
            yield attention, role, [link for maker in makers for link in flow.links[maker]]


def _home(node: fx.Node) -> str:
    """Say where a call was made, numbers left out, so that blocks are counted together."""
    return re.sub(r"\d+", "*", str(node.meta.get("module", "")))


def _bare_modules(model: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[str, dict[str, Site]]]:
    """Yield the modules called attentions of whose weights none has such a role: class, weights inside."""
    last = "\0"
    for path, module in model.named_modules():
        kind = type(module).__name__
        if not path or path.startswith(f"{last}.") or not CALLED_ATTENTION.search(kind):
            continue
        names = {name[len(path) + 1 :]: s for s in sites for name in s.names if name.startswith(f"{path}.")}
        if names and not any(site.roles.keys() & INNER for site in names.values()):
            last = path
            yield kind, names
