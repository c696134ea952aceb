"""Branch form: rewrite a stock module's own forward so that it computes the low-rank branch.

The forward is traced with torch.fx, every call that a kind knows and whose weight is adapted is
replaced by its adapted form reading ``W0`` raw, and the generated code becomes the forward of the
module's dynamic subclass. Only stock forwards are rewritten: fx bakes the flags, random numbers and
context managers of arbitrary ones without a word.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lora_fx.kinds import BY_OP, KINDS, Kind
from lora_fx.kinds.base import Branch, Call
from lora_fx.kinds.names import canonical_op
from lora_fx.matrix import MatrixForm

W0_SUFFIX = "__W0"
LORA_SUFFIX = "__lora"
TRANSPOSED_SUFFIX = "__lora_t"

_serial = itertools.count()


@dataclass(frozen=True)
class Branched:
    """How a weight is adapted, as far as a branch must know: its form, and whether by rows."""

    form: MatrixForm
    rows: bool = False


class _StockTracer(fx.Tracer):
    """Traces one module's own forward; whatever it calls is a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Never look inside a child."""
        del m, module_qualified_name
        return True


def stock_home(cls: type[nn.Module]) -> tuple[type[nn.Module], Kind] | None:
    """Return the stock class whose very forward this class runs, with its kind, if there is one.

    The methods that the forward calls must be the stock class's too: a subclass of ``nn.Conv2d`` with a
    ``_conv_forward`` of its own has a forward of its own.
    """
    return next(((home, k) for k in KINDS for home in k.homes if _runs(cls, home)), None)


def _runs(cls: type[nn.Module], home: type[nn.Module]) -> bool:
    if cls.forward is not home.forward:
        return False
    called, known = list(home.forward.__code__.co_names), set[str]()
    while called:
        name = called.pop()
        method = inspect.getattr_static(home, name, None)
        if name in known or not isinstance(method, types.FunctionType):
            continue
        known.add(name)
        if inspect.getattr_static(cls, name) is not method:
            return False
        called += method.__code__.co_names
    return True


def trace_stock(module: nn.Module, cls: type[nn.Module]) -> fx.Graph:
    """Trace ``cls.forward`` on the module, whatever the module's class is now.

    Optional arguments that the kind wants at their defaults (``Kind.defaults``) are left out.
    """
    tracer = _StockTracer()
    held = module.__class__
    module.__class__ = cls
    try:
        return tracer.trace(module, dict(left_out(cls).values()))
    finally:
        module.__class__ = held


def left_out(cls: type[nn.Module]) -> dict[int, tuple[str, Any]]:
    """Return the arguments of a stock forward that its rewritten form leaves out, by place."""
    found = stock_home(cls)
    names = frozenset[str]() if found is None else found[1].defaults
    places = enumerate(inspect.signature(cls.forward).parameters.values())
    return {i: (p.name, p.default) for i, p in places if p.name in names}


def rewrite(graph: fx.Graph, weights: Mapping[str, Branched]) -> frozenset[str]:
    """Replace, in place, the calls that multiply with these weights; return the weights rewritten.

    ``weights`` maps attribute paths, as ``get_attr`` targets have them, to the forms that they are
    adapted in. A weight with a use that no kind has a branch for keeps reading the property there.
    """
    done: set[str] = set()
    for node in list(graph.nodes):
        branch = branch_for(node)
        read = None if branch is None else _weight_of(node)
        if branch is None or read is None or read.target not in weights:
            continue
        suffix = _parts_suffix(node, weights[str(read.target)])
        if suffix is None:
            continue
        _replace(graph, node, read, branch, suffix)
        done.add(str(read.target))
        if not read.users:
            graph.erase_node(read)
    return frozenset(done)


def branch_for(node: fx.Node) -> Branch | None:
    """Return the adapted form of a call, if its kind has one."""
    if node.op not in {"call_function", "call_method"}:
        return None
    op = canonical_op(node.target)
    kind = BY_OP.get(op)
    return None if kind is None else kind.branches.get(op)


def _weight_of(node: fx.Node) -> fx.Node | None:
    """Return the read that stands, itself and once, in the weight's place of a call."""
    op = canonical_op(node.target)
    position = BY_OP[op].branch_weight.get(op, 1)
    weight = node.args[position] if len(node.args) > position else node.kwargs.get("weight")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return weight if node.all_input_nodes.count(weight) == 1 else None


def _parts_suffix(node: fx.Node, adapted: Branched) -> str | None:
    """Say which parts the branch wants: as they are, transposed, or (None) in no form that there is."""
    op = canonical_op(node.target)
    call = Call(op, node.args, node.kwargs)
    wanted = BY_OP[op].branch_form(call, adapted.form.shape)
    if adapted.form.reads_as(wanted):
        return LORA_SUFFIX
    return TRANSPOSED_SUFFIX if adapted.form.reads_as(wanted.transposed) and not adapted.rows else None


def _replace(graph: fx.Graph, node: fx.Node, read: fx.Node, branch: Branch, suffix: str) -> None:
    with graph.inserting_before(node):
        # The property is not an attribute that fx can check: create the node without its warning.
        base = graph.create_node("get_attr", f"{read.target}{W0_SUFFIX}")
        parts = graph.create_node("get_attr", f"{read.target}{suffix}")
        args = tuple(base if a is read else a for a in node.args)
        kwargs = {k: base if v is read else v for k, v in node.kwargs.items()}
        new = graph.call_function(branch, args, {**kwargs, "lora": parts})
        new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def compile_forward(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """Turn a rewritten graph into a function ``forward(self, ...)``; its source stays printable."""
    code = graph.python_code("self")
    filename = f"<lora_fx {name} {next(_serial)}>"
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)  # noqa: S102 - fx's own generated code
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    forward: Callable[..., Any] = namespace["forward"]
    forward.__lora_fx_source__ = code.src  # type: ignore[attr-defined]
    return forward
