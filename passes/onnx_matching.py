"""The exporter's rewriter, asked at each node for the rules that can start there alone.

onnxscript tries every rule at every node, and a rule of several outputs (two slices of one value that make
a split) with all nodes of the graph each time: quadratic, and nine tenths of the optimiser's time on an
unrolled recurrence of 10,000 nodes. Each of these trials begins with the node itself; where that does not
fit, none does. So it is asked first, and its operator before all else: what is found is the same.

This reaches into onnxscript (seen with 0.7.2); with one that is built otherwise, importing this module is an
ImportError, and graphs are optimised as slowly as it does.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import onnx_ir as ir
from onnxscript import rewriter
from onnxscript.rewriter import MatchResult
from onnxscript.rewriter._matcher import SimplePatternMatcher

if not {"_init_match", "_match_node"} <= vars(SimplePatternMatcher).keys() or not hasattr(
    rewriter, "_DEFAULT_REWRITE_RULES"
):
    raise ImportError("onnxscript's matcher has other parts")

_ELSEWHERE = MatchResult().fail("the node is of another operator")


@contextmanager
def first_node_first() -> Generator[None]:
    """Have the exporter's rules look at the node that they are tried on before they look any further."""
    rules = cast("Any", rewriter)._DEFAULT_REWRITE_RULES
    plain = [rule for rule in rules if type(rule._matcher) is SimplePatternMatcher]
    before = [rule._matcher for rule in plain]
    try:
        for rule in plain:
            rule._matcher = _FirstNodeFirst(rule._matcher.pattern)
        yield
    finally:
        for rule, matcher in zip(plain, before, strict=True):
            rule._matcher = matcher


class _FirstNodeFirst(SimplePatternMatcher):
    """A matcher that gives up on a node of another operator, and on partners of one that does not fit."""

    def __init__(self, pattern: Any) -> None:
        super().__init__(pattern)
        self._first = pattern.output_nodes[0]
        identifier = self._first.op_identifier()
        self._operator = None if identifier is None else identifier[1]

    def match(
        self, model: ir.Model, graph_or_function: ir.Graph | ir.Function, node: ir.Node, **options: Any
    ) -> Any:
        """Match the pattern with the node as its first output, and any others as the rest."""
        if self._operator is not None and node.op_type != self._operator:
            return _ELSEWHERE
        if not self.pattern.has_single_output_node:
            given = graph_or_function
            self._graph = given if isinstance(given, ir.Graph) else given.graph
            self._init_match(options.get("verbose", 0))
            if not self._match_node(self._first, node):
                return self._match
        return super().match(model, graph_or_function, node, **options)
