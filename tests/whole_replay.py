"""Run a recorded graph again from its inputs and weights: the graph must say all that the model did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from lora_fx.passes.examples import named_inputs, tensors_in
from lora_fx.passes.trace import Trace


def replayed(trace: Trace) -> Any:
    """Return what the recorded graph computes: the output node's value."""
    values = node_values(trace)
    output = next(node for node in reversed(trace.graph.nodes) if node.op == "output")
    return map_arg(output.args[0], values.__getitem__)


def node_values(
    trace: Trace, instead: Callable[[fx.Node, Exception], Any] | None = None
) -> dict[fx.Node, Any]:
    """Return what every node of the recorded graph computes; ``instead`` answers for a call that fails."""
    inputs = dict(named_inputs(trace.model, trace.args, trace.kwargs))
    weights = {
        **dict(trace.model.named_parameters(remove_duplicate=False)),
        **dict(trace.model.named_buffers(remove_duplicate=False)),
    }
    values: dict[fx.Node, Any] = {}
    given = iter(inputs.values())
    with torch.no_grad():
        for node in trace.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given).clone()
            elif node.op == "get_attr":
                values[node] = weights[node.target] if node.target in weights else node.meta["value"]
            elif node.op != "output":
                try:
                    values[node] = call(node, values)
                except Exception as error:
                    if instead is None:
                        raise
                    values[node] = instead(node, error)
    return values


def call(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Return what one call computes from its arguments' values, writing into clones."""
    written = {n: values[n].clone() for n in node.meta.get("writes", ())}
    args = map_arg(node.args, lambda n: written.get(n, values[n]))
    kwargs = map_arg(node.kwargs, lambda n: written.get(n, values[n]))
    target = getattr(args[0], node.target) if node.op == "call_method" else node.target
    result = target(*(args[1:] if node.op == "call_method" else args), **kwargs)
    return next(iter(written.values())) if result is None else result


def assert_replays(trace: Trace) -> None:
    """Assert that the graph computes, to the bit, what the model returns."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it multiplies in another order
    with torch.no_grad():
        wanted = [t for _, t in tensors_in(trace.model(*trace.args, **trace.kwargs))]
    torch.backends.mha.set_fastpath_enabled(fast)
    found = [t for t in pytree.tree_leaves(replayed(trace)) if isinstance(t, Tensor)]
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert torch.equal(one, other), f"off by {(one - other).abs().max()}"
