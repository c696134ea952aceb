"""Nodes of a graph, made without looking through their arguments for symbolic numbers, which none hold."""

from __future__ import annotations

from typing import Any

from torch import fx


class Nodes:
    """Makes the nodes of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._names: dict[Any, str] = {}

    def make(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Return a new node at the end of the graph, named as ``create_node`` names it."""
        name = self._names.get(target)
        if name is None:
            name = self._names[target] = self._graph._target_to_str(target)
        # create_node walks through the arguments that it is given, which takes longer than all the rest.
        node = self._graph.create_node(kind, target, name=name)
        node._update_args_kwargs(args, kwargs)
        return node
