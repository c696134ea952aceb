"""Nodes of one graph, made as ``fx.Graph.create_node`` makes them, without what it does anew for each."""

from __future__ import annotations

from typing import Any

from torch import fx


class Nodes:
    """Makes the nodes of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._names: dict[Any, str] = {}

    def call(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Return a new node at the end of the graph, for a call of a function or method."""
        name = self._names.get(target)
        if name is None:
            name = self._names[target] = self._graph._target_to_str(target)  # pyright: ignore[reportPrivateUsage]
        # create_node looks through arguments for symbolic numbers, which takes longer than all the rest.
        node = self._graph.create_node(kind, target, name=name)
        node._update_args_kwargs(args, kwargs)
        return node

    def attribute(self, name: str) -> fx.Node:
        """Return a new node for a parameter, a buffer or another tensor that the model holds."""
        spelt = name.replace(".", "_")
        ready = spelt.islower() and spelt.isidentifier()  # else create_node knows what to do
        return self._graph.create_node("get_attr", name, name=spelt if ready else None)
