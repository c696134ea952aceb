"""Match: find every site, the parameters of two or more dimensions and what multiplies with them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import fx, nn

from lora_fx.kinds.experts import GroupedKind
from lora_fx.matrix import MatrixForm, Rows, rows_form
from lora_fx.passes.forms import parameter_form, rows_read
from lora_fx.passes.homes import branch_of
from lora_fx.passes.reach import (
    JOINS,
    SHUFFLES,
    Found,
    Reach,
    active_nodes,
    learning_nodes,
    live_nodes,
    reach,
)
from lora_fx.passes.trace import Trace
from lora_fx.passes.tree import sites_from_modules
from lora_fx.passes.twins import Twins, class_names
from lora_fx.sites import Site, Use


@dataclass(frozen=True)
class _Run:
    """What one recorded run says: reads by parameter, dependence on inputs and on outputs."""

    reads: dict[str, fx.Node]
    active: frozenset[fx.Node]
    live: frozenset[fx.Node]
    learning: frozenset[fx.Node]
    order: dict[fx.Node, int]
    modules: dict[str, nn.Module]
    classes: dict[str, str]


def match(trace: Trace) -> tuple[Site, ...]:
    """Return a site for every parameter of two or more dimensions, in the order of the model.

    A parameter is a site of a kind if a view of it, or a weight computed from it, stands in the
    weight's place of a call that the kind knows. Others are sites too: one that the run did not reach
    takes kind and form from its structural twin, one that is only read elsewhere says by what.
    """
    graph = trace.graph
    run = _Run(
        reads={n.meta["parameter"]: n for n in graph.nodes if "parameter" in n.meta},
        active=active_nodes(graph),
        live=live_nodes(graph),
        learning=learning_nodes(graph),
        order={node: index for index, node in enumerate(graph.nodes)},
        modules=dict(trace.model.named_modules(remove_duplicate=False)),
        classes=class_names(trace.model),
    )
    plain = {site.name: site for site in sites_from_modules(trace.model)}
    used = {
        site.name: site
        for bare in plain.values()
        if bare.name in run.reads and (site := _reached(bare, run)) is not None
    }
    twins = Twins(trace.model, [site for site in used.values() if site.uses])
    return tuple(
        used.get(name) or _not_reached(site, twins)
        for name, site in plain.items()
        if name in used or name not in run.reads
    )


def _reached(bare: Site, run: _Run) -> Site | None:
    """Return the site of a parameter that the run read."""
    read = run.reads[bare.name]
    shape = tuple(read.meta["shape"])
    if len(shape) < 2:
        return None  # a lazy parameter that turned out to be a vector
    found = reach(read, run.active)
    uses = sorted(found.uses, key=lambda f: run.order[f.node])
    if not uses:
        return _only_read(replace(bare, shape=shape), found)
    live = [use for use in uses if use.node in run.live]
    form, notes = _form(shape, live or uses)
    first = next((u for u in live or uses if u.kind.name != "embedding"), uses[0])
    unfit = _unfit(bare, live or uses, run)
    if not live:
        unfit = "no-effect: its result reaches no output of the run"
    elif not any(use.node in run.learning for use in live):
        unfit = "no-effect: it reaches outputs only through indices, masks or detach, which pass no gradient"
    elif len(live) < len(uses):
        notes.append(f"{len(uses) - len(live)} of its {len(uses)} uses reach no output of the run")
    return replace(
        bare,
        kind=_kind(first, form),
        shape=shape,
        form=form,
        uses=tuple(_use(use, form, bare.names, run) for use in live or uses),
        roles=_operand_roles(form, live),
        unfit=unfit,
        notes=tuple(notes),
    )


def _kind(use: Found, form: MatrixForm) -> str:
    """Return the kind of a use; one of a few matrices of a stack is of experts, whatever multiplies."""
    read = None if use.layout is None else math.prod(n for axis in use.layout.axes for n, s in axis if s)
    one = form.out_features * form.in_features
    return (
        GroupedKind.name
        if form.batch and read is not None and read <= one < math.prod(form.shape)
        else use.kind.name
    )


def _form(shape: tuple[int, ...], uses: list[Found]) -> tuple[MatrixForm, list[str]]:
    """Return one form for all uses: the first one's, where the others are it or its transpose."""
    forms = [None if u.layout is None else parameter_form(shape, u.operand, u.layout) for u in uses]
    first = forms[0]
    if first is None or any(form is None for form in forms):
        bad = uses[next(i for i, form in enumerate(forms) if form is None)]
        how = "through a view that cuts across the axes"
        if bad.computed in JOINS:
            how = "joined with other tensors"
        elif bad.computed is not None and bad.computed not in SHUFFLES:
            how = f"computed by {bad.computed}"
        return rows_form(shape), [f"rows by axis 0: {bad.node.name} reads it {how}"]
    for use, form in zip(uses, forms, strict=True):
        if form is None or form == first:
            continue
        if (form.view, form.out, form.inp, form.batch) == (first.view, first.inp, first.out, first.batch):
            return first, [f"form of {uses[0].node.name}; {use.node.name} ({use.op}) uses its transpose"]
        return rows_form(shape), [
            f"rows by axis 0: {uses[0].node.name} and {use.node.name} use it differently"
        ]
    return first, []


def _use(found: Found, form: MatrixForm, names: tuple[str, ...], run: _Run) -> Use:
    home = str(found.node.meta.get("module", ""))
    branch, why = branch_of(found, run.modules.get(home), home, names)
    rows = None if found.layout is None else rows_read(form, found.layout)
    return Use(found.op, home, found.node.name, rows, branch, why)


def _operand_roles(form: MatrixForm, uses: list[Found]) -> dict[str, Rows | None]:
    """Return the roles that an operation itself gives to rows of a weight it reads whole."""
    roles: dict[str, Rows | None] = {}
    for use in uses:
        whole = use.direct and use.operand.form == form
        roles.update(use.operand.roles if whole else {})
    return roles


def _unfit(bare: Site, uses: list[Found], run: _Run) -> str | None:
    owner = run.modules.get(bare.module)
    said = (u.operand.unfit or (None if owner is None else u.kind.unfit(owner)) for u in uses)
    return bare.unfit or next((reason for reason in said if reason is not None), None)


def _only_read(bare: Site, found: Reach) -> Site:
    """Return the site of a parameter that is read but never multiplied as a weight."""
    reads = [f"{n.meta.get('op', n.op)} in {(n.meta.get('module') or '(root)')!r}" for n in found.reads]
    listed = ", ".join(list(dict.fromkeys(reads))[:3]) or "views alone"
    unfit = bare.unfit or f"read by {listed}; never multiplied as a weight"
    return replace(bare, kind="other", form=rows_form(bare.shape), uses=(), unfit=unfit)


def _not_reached(bare: Site, twins: Twins) -> Site:
    twin = next((t for name in bare.names if (t := twins.of(name, bare.shape)) is not None), None)
    if twin is None:
        return bare
    return replace(bare, kind=twin.kind, form=twin.form, twin=twin.name, unfit=bare.unfit or twin.unfit)
