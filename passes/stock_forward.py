"""Branch form: rewrite a stock module's own forward so that it computes the low-rank branch.

The forward is traced with torch.fx, every call that a kind knows and whose weight is adapted is
replaced by its adapted form reading ``W0`` raw, and the generated code becomes the forward of the
module's dynamic subclass. Only stock forwards are rewritten: fx bakes the flags, random numbers and
context managers of arbitrary ones without a word.
"""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from lora_fx.kinds import BY_OP
from lora_fx.kinds.base import Branch
from lora_fx.kinds.names import canonical_op

W0_SUFFIX = "__W0"
LORA_SUFFIX = "__lora"

_serial = itertools.count()


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


def rewrite(graph: fx.Graph, weights: Iterable[str]) -> frozenset[str]:
    """Replace, in place, the calls that multiply with these weights; return the weights rewritten.

    ``weights`` are attribute paths as ``get_attr`` targets have them. A weight with a use that no
    kind has a branch for keeps reading the property at that use.
    """
    wanted = set(weights)
    done: set[str] = set()
    for node in list(graph.nodes):
        branch = branch_for(node)
        if branch is None:
            continue
        read = next((a for a in node.all_input_nodes if a.op == "get_attr" and a.target in wanted), None)
        # The weight must be the operand itself and stand in one place.
        if read is None or not _is_weight(node, read):
            continue
        _replace(graph, node, read, branch)
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


def _is_weight(node: fx.Node, read: fx.Node) -> bool:
    kind = BY_OP[canonical_op(node.target)]
    position = kind.branch_weight.get(canonical_op(node.target), 1)
    weight = node.args[position] if len(node.args) > position else node.kwargs.get("weight")
    return weight is read and node.all_input_nodes.count(read) == 1


def _replace(graph: fx.Graph, node: fx.Node, read: fx.Node, branch: Branch) -> None:
    with graph.inserting_before(node):
        # The property is not an attribute that fx can check: create the node without its warning.
        base = graph.create_node("get_attr", f"{read.target}{W0_SUFFIX}")
        parts = graph.create_node("get_attr", f"{read.target}{LORA_SUFFIX}")
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
