"""Branch form: rewrite a stock module's own forward so that it computes the low-rank branch.

The forward is traced with torch.fx, every call that a kind knows and whose weight is adapted is
replaced by its adapted form reading ``W0`` raw, and the generated code becomes the forward of the
module's dynamic subclass. Only stock forwards are rewritten: fx bakes the flags, random numbers and
context managers of arbitrary ones without a word.
"""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lora_fx.kinds import BY_OP
from lora_fx.kinds.base import Branch
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


def trace_stock(module: nn.Module, cls: type[nn.Module]) -> fx.Graph:
    """Trace ``cls.forward`` on the module, whatever the module's class is now."""
    tracer = _StockTracer()
    held = module.__class__
    module.__class__ = cls
    try:
        return tracer.trace(module)
    finally:
        module.__class__ = held


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
    wanted = BY_OP[op].branch_form(op, adapted.form.shape)
    if adapted.form == wanted:
        return LORA_SUFFIX
    return TRANSPOSED_SUFFIX if adapted.form == wanted.transposed and not adapted.rows else None


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
