"""The exporter's rewriter under ``first_node_first``: the same graph, in steps that grow with it."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnxscript import rewriter
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter._matcher import SimplePatternMatcher
from torch import Tensor, nn

from lora_fx.passes import onnx_matching
from lora_fx.passes.onnx_matching import first_node_first
from lora_fx.passes.onnx_program import Program
from lora_fx.passes.onnx_quiet import quiet

X = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))


class Unrolled(nn.Module):
    """A recurrence over time, which the exporter unrolls: a slice and a few operators for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(8, 8)
        self.gate = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        made: list[Tensor] = []
        for time in range(x.shape[1]):
            state = torch.tanh(self.step(state) + x[:, time : time + 1].squeeze(1))
            made.append(state * self.gate(state).sigmoid())
        return torch.stack(made, 1)


def unrolled(length: int) -> ir.Model:
    with quiet():
        program: Any = torch.onnx.export(
            Unrolled().eval(), (X[:, :length],), dynamo=True, optimize=False, verbose=False
        )
    return program.model


def halves() -> ir.Model:
    """Return a graph in which the slices of ``x`` are found to be its halves.

    Those of ``y`` come in an order in which onnxscript does not see it, those of ``z`` are none.
    """
    return ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["": 20]>
        g (float[4, 8] x, float[4, 8] y) => (float[4, 4] a, float[4, 4] b, float[4, 4] c) <
          int64[1] zero = {0}, int64[1] three = {3}, int64[1] four = {4}, int64[1] seven = {7},
          int64[1] eight = {8}, int64[1] last = {-1}> {
          x1 = Slice (x, four, eight, last)
          y0 = Slice (y, zero, four, last)
          y1 = Slice (y, four, eight, last)
          x0 = Slice (x, zero, four, last)
          z = Add (x, y)
          z0 = Slice (z, zero, four, last)
          z1 = Slice (z, three, seven, last)
          a = Add (x0, y1)
          b = Mul (x1, y0)
          c = Sub (z0, z1)
        }"""
    )


@pytest.fixture
def combinations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the combinations of nodes that patterns of several outputs are tried on."""
    counted = [0]
    tried = SimplePatternMatcher._multi_match

    def multi_match(self: SimplePatternMatcher, *args: Any, **options: Any) -> Any:
        counted[0] += 1
        return tried(self, *args, **options)

    monkeypatch.setattr(SimplePatternMatcher, "_multi_match", multi_match)
    return counted


def text(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def test_no_combination_is_tried_for_a_node_that_does_not_fit(combinations: list[int]) -> None:
    raw = unrolled(12)
    slices = sum(node.op_type == "Slice" for node in raw.graph)
    assert slices >= 12
    Program(raw).optimised()
    assert combinations[0] == 0
    optimize_ir(raw)
    assert combinations[0] > slices**2, "onnxscript no longer tries all pairs: first_node_first is not needed"


@pytest.mark.parametrize("make", [halves, partial(unrolled, 6)], ids=["halves", "unrolled"])
def test_the_graph_is_the_one_that_the_optimiser_makes(make: Any) -> None:
    ours = make()
    theirs = ours.clone()
    with first_node_first():
        optimize_ir(ours)
    optimize_ir(theirs)
    assert text(ours) == text(theirs)


def test_halves_of_one_value_are_still_found(combinations: list[int]) -> None:
    model = halves()
    with first_node_first():
        optimize_ir(model)
    assert [node.op_type for node in model.graph].count("Split") == 1
    assert combinations[0] > 0


def test_the_exporters_own_matchers_come_back_whatever_happens() -> None:
    before = [rule._matcher for rule in rewriter._DEFAULT_REWRITE_RULES]

    def fail() -> None:
        assert all(rule._matcher not in before for rule in rewriter._DEFAULT_REWRITE_RULES)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), first_node_first():
        fail()
    assert [rule._matcher for rule in rewriter._DEFAULT_REWRITE_RULES] == before


def test_another_onnxscript_optimises_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this module reaches into is onnxscript's own affair: without it graphs are the same."""
    raw = unrolled(6)
    wanted = Program(raw).optimised()
    monkeypatch.setitem(sys.modules, "lora_fx.passes.onnx_matching", None)
    assert text(Program(raw).optimised()) == text(wanted)


def test_a_matcher_of_other_parts_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(SimplePatternMatcher, "_init_match")
    with pytest.raises(ImportError, match="other parts"):
        importlib.reload(onnx_matching)
