"""How much a recording does: counted in calls and walks, never in seconds."""

from __future__ import annotations

import operator
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from lora_fx.passes.nodes import Nodes
from lora_fx.passes.trace import trace


def stack(layers: int) -> nn.Sequential:
    return nn.Sequential(*[module for _ in range(layers) for module in (nn.Linear(4, 4), nn.ReLU())])


def test_the_modules_are_walked_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, walk, walks = stack(3), nn.Module.named_modules, 0

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal walks
        walks += self is model
        return walk(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    trace(model, torch.randn(2, 4))
    assert walks == 3  # for modules, for parameters, for buffers


def python_calls(model: nn.Module, x: Tensor) -> int:
    """Return how many Python functions one recording calls."""
    count = 0

    def count_call(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        del frame, argument
        count += event == "call"

    trace(model, x)  # what is imported or remembered at the first time
    sys.setprofile(count_call)
    try:
        trace(model, x)
    finally:
        sys.setprofile(None)
    return count


def test_calls_for_each_layer() -> None:
    """A linear layer and its activation: two calls, two weights, two modules; 664 functions once."""
    x = torch.randn(2, 4)
    assert (python_calls(stack(30), x) - python_calls(stack(10), x)) / 20 < 300


CALLS: tuple[tuple[str, Any], ...] = (
    ("call_function", torch.nn.functional.linear),
    ("call_function", torch.nn.functional.linear),
    ("call_function", operator.getitem),
    ("call_function", getattr),  # a builtin's name is taken
    ("call_function", torch.ops.aten.add.Tensor),
    ("call_method", "add_"),
    ("call_method", "add"),
    ("call_method", "__matmul__"),
)
ATTRIBUTES = ("weight", "0.weight", "layer.2", "layer_2", "a.B.weightNorm", "x-y.weight", "class", "linear")


def test_nodes_are_those_that_fx_makes() -> None:
    ours, theirs = fx.Graph(), fx.Graph()
    nodes = Nodes(ours)
    for name in ATTRIBUTES:
        assert nodes.attribute(name).name == theirs.create_node("get_attr", name).name
    for kind, target in CALLS:
        made = nodes.call(kind, target, (first(ours), [first(ours), 1]), {"other": first(ours)})
        expected = theirs.create_node(
            kind, target, (first(theirs), [first(theirs), 1]), {"other": first(theirs)}
        )
        assert made.name == expected.name
        assert made.format_node() == expected.format_node()
        assert [type(a) for a in made.args] == [type(a) for a in expected.args]
        assert made in first(ours).users
    ours.lint()


def first(graph: fx.Graph) -> fx.Node:
    return next(iter(graph.nodes))
