"""The first place where two ONNX graphs differ in structure, by walking both at once.

From the outputs inwards, each pair of values must be made alike: by nodes that say the same, at the
same position, and always by the *same* partner (a bijection), so that an edge moved between two
look-alikes is found too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from lora_fx.passes.onnx_canonical import all_initializers, all_nodes
from lora_fx.passes.onnx_content import (
    Dims,
    initializer_text,
    node_label,
    node_parts,
    opsets_text,
    subgraphs,
    value_text,
)


@dataclass(frozen=True)
class Difference:
    """One structural difference: where, what the base has there, and what the other has."""

    place: str
    base: str
    other: str

    def __str__(self) -> str:
        """Return it as one sentence."""
        return f"{self.place}: the base has {self.base}, this file has {self.other}"


@dataclass(frozen=True)
class Comparison:
    """The first difference, if there is one, and which initializer plays which one's part.

    Names may be made up anew in each export, so values are compared along ``pairs`` and not by name.
    """

    difference: Difference | None
    pairs: tuple[tuple[ir.Value, ir.Value], ...] = ()


def compare(base: ir.Model, other: ir.Model, *, sharing: bool = True) -> Comparison:
    """Compare the structure of two models; ``sharing`` as in ``canonical``."""
    if base.ir_version != other.ir_version:
        return Comparison(Difference("the IR version", str(base.ir_version), str(other.ir_version)))
    opsets = opsets_text(base.opset_imports), opsets_text(other.opset_imports)
    if opsets[0] != opsets[1]:
        return Comparison(Difference("the opset imports", *opsets))
    if sorted(base.functions) != sorted(other.functions):
        return Comparison(
            Difference("the functions", str(sorted(base.functions)), str(sorted(other.functions)))
        )
    walk = _Walk(named=True, sharing=sharing)
    difference = walk.graphs(base.graph, other.graph)
    for identifier in sorted(base.functions):
        if difference is None:
            difference = _function_difference(
                base.functions[identifier], other.functions[identifier], sharing=sharing
            )
    pairs = [(b, o) for b, o in walk.values.items() if b.is_initializer() and o.is_initializer()]
    return Comparison(difference, (*pairs, *walk.unused))


def _function_difference(base: ir.Function, other: ir.Function, *, sharing: bool) -> Difference | None:
    place = f"function {base.name!r}"
    opsets = opsets_text(base.opset_imports), opsets_text(other.opset_imports)
    if opsets[0] != opsets[1]:
        return Difference(f"the opset imports of {place}", *opsets)
    if sorted(base.attributes) != sorted(other.attributes):
        return Difference(
            f"the attributes of {place}", str(sorted(base.attributes)), str(sorted(other.attributes))
        )
    return _Walk(named=False, sharing=sharing).graphs(base, other)


@dataclass
class _Walk:
    """Pairs of nodes, initializers and graph inputs that were found to be each other's partner."""

    named: bool
    sharing: bool
    base_dims: Dims = field(default_factory=Dims)
    other_dims: Dims = field(default_factory=Dims)
    nodes: dict[ir.Node, ir.Node] = field(default_factory=dict[ir.Node, ir.Node])
    reverse: dict[ir.Node, ir.Node] = field(default_factory=dict[ir.Node, ir.Node])
    values: dict[ir.Value, ir.Value] = field(default_factory=dict[ir.Value, ir.Value])
    values_back: dict[ir.Value, ir.Value] = field(default_factory=dict[ir.Value, ir.Value])
    unused: list[tuple[ir.Value, ir.Value]] = field(default_factory=list[tuple[ir.Value, ir.Value]])
    stack: list[tuple[str, ir.Value | None, ir.Value | None]] = field(
        default_factory=list[tuple[str, "ir.Value | None", "ir.Value | None"]]
    )

    def graphs(self, base: ir.Graph | ir.Function, other: ir.Graph | ir.Function) -> Difference | None:
        """Compare interfaces, then walk inwards from the outputs, then look for what was not reached."""
        difference = self.interface("input", base, other) or self.interface("output", base, other)
        if difference is not None:
            return difference
        pairs = list(zip(base.outputs, other.outputs, strict=True))
        self.stack = [(f"graph output {b.name!r}", b, o) for b, o in reversed(pairs)]
        while self.stack:
            difference = self.value(*self.stack.pop())
            if difference is not None:
                return difference
        return self.left_over(base, other)

    def interface(
        self, what: str, base: ir.Graph | ir.Function, other: ir.Graph | ir.Function
    ) -> Difference | None:
        """Compare the graph's inputs or outputs: number, names, types, defaults."""
        ours, theirs = (base.inputs, other.inputs) if what == "input" else (base.outputs, other.outputs)
        if len(ours) != len(theirs):
            return Difference(
                f"the graph's {what}s", str([v.name for v in ours]), str([v.name for v in theirs])
            )
        for position, (b, o) in enumerate(zip(ours, theirs, strict=True)):
            place = f"graph {what} {position}"
            if self.named and b.name != o.name:
                return Difference(place, f"the name {b.name!r}", f"the name {o.name!r}")
            texts = value_text(b, self.base_dims), value_text(o, self.other_dims)
            if texts[0] != texts[1]:
                return Difference(f"{place} ({o.name!r})", *texts)
            if what == "input":
                self.values[b], self.values_back[o] = o, b
                if b.is_initializer() != o.is_initializer():
                    return Difference(
                        f"{place} ({o.name!r})",
                        "a default" if b.is_initializer() else "no default",
                        "a default" if o.is_initializer() else "no default",
                    )
        return None

    def value(self, place: str, base: ir.Value | None, other: ir.Value | None) -> Difference | None:
        """Compare what makes two values."""
        if base is None or other is None:
            return None if base is other else Difference(place, _made_by(base), _made_by(other))
        makers = base.producer(), other.producer()
        if makers[0] is not None and makers[1] is not None:
            if base.index() != other.index():
                return Difference(place, _made_by(base), _made_by(other))
            return self.pair_nodes(place, makers[0], makers[1])
        if makers[0] is not None or makers[1] is not None:
            return Difference(place, _made_by(base), _made_by(other))
        if not self.sharing and base.is_initializer() and other.is_initializer():
            return self.pair_initializers(place, base, other)
        partner, partner_back = self.values.get(base), self.values_back.get(other)
        if partner is not None or partner_back is not None:
            same = partner is other and partner_back is base
            return None if same else Difference(place, _made_by(base), _made_by(other))
        return self.pair_initializers(place, base, other)

    def pair_initializers(self, place: str, base: ir.Value, other: ir.Value) -> Difference | None:
        """Make two initializers partners, if they say the same."""
        texts = [
            initializer_text(value) if value.is_initializer() else _made_by(value) for value in (base, other)
        ]
        if texts[0] != texts[1]:
            return Difference(f"initializer {other.name!r}, {place}", texts[0], texts[1])
        self.values[base], self.values_back[other] = other, base
        return None

    def pair_nodes(self, place: str, base: ir.Node, other: ir.Node) -> Difference | None:
        """Make two nodes partners, if they say the same, and go on with their operands."""
        if base in self.nodes or other in self.reverse:
            same = self.nodes.get(base) is other and self.reverse.get(other) is base
            return None if same else Difference(place, node_label(base), node_label(other))
        parts = node_parts(base, self.base_dims), node_parts(other, self.other_dims)
        if parts[0] != parts[1]:
            return _node_difference(place, base, other, parts)
        self.nodes[base], self.reverse[other] = other, base
        label = node_label(other)
        operands = [
            (f"input {i} of {label}", b, o)
            for i, (b, o) in enumerate(zip(base.inputs, other.inputs, strict=True))
        ]
        for (attribute, ours), (_, theirs) in zip(subgraphs(base), subgraphs(other), strict=True):
            for b, o in zip(ours.inputs, theirs.inputs, strict=True):
                self.values[b], self.values_back[o] = o, b
            operands += [
                (f"output {i} of {attribute} in {label}", b, o)
                for i, (b, o) in enumerate(zip(ours.outputs, theirs.outputs, strict=True))
            ]
        self.stack.extend(reversed(operands))
        return None

    def left_over(self, base: ir.Graph | ir.Function, other: ir.Graph | ir.Function) -> Difference | None:
        """Compare the nodes and initializers that reach no output: as many, saying the same."""
        ours = [node for node in all_nodes(base) if node not in self.nodes]
        theirs = [node for node in all_nodes(other) if node not in self.reverse]
        if len(ours) != len(theirs):
            labels = [[node_label(node) for node in nodes] for nodes in (ours, theirs)]
            place = (theirs or ours)[0]
            return Difference(f"{node_label(place)}, which reaches no output", str(labels[0]), str(labels[1]))
        # Two files of one exporter keep the order of nodes, and a dead node has no other place.
        for b, o in zip(ours, theirs, strict=True):
            difference = None if b in self.nodes else self.pair_nodes("a node that reaches no output", b, o)
            while difference is None and self.stack:
                difference = self.value(*self.stack.pop())
            if difference is not None:
                return difference
        return self.unread(base, other)

    def unread(self, base: ir.Graph | ir.Function, other: ir.Graph | ir.Function) -> Difference | None:
        """Compare the initializers that nothing reads, by name within what they say."""
        ours, theirs = (
            sorted(
                (initializer_text(value), value.name or "", value)
                for value in all_initializers(graph)
                if value not in met
            )
            for graph, met in ((base, self.values), (other, self.values_back))
        )
        if [text for text, *_ in ours] != [text for text, *_ in theirs]:
            names = [str([name for _, name, _ in side]) for side in (ours, theirs)]
            return Difference("the initializers that nothing reads", *names)
        self.unused = [(b, o) for (_, _, b), (_, _, o) in zip(ours, theirs, strict=True)]
        return None


def _node_difference(
    place: str, base: ir.Node, other: ir.Node, parts: tuple[dict[str, str], dict[str, str]]
) -> Difference:
    if parts[0]["operator"] != parts[1]["operator"]:
        return Difference(
            f"{node_label(other)}, {place}",
            f"{parts[0]['operator']} ({node_label(base)})",
            f"{parts[1]['operator']}",
        )
    name = next(n for n in (*parts[0], *parts[1]) if parts[0].get(n) != parts[1].get(n))
    return Difference(
        f"{name} of {node_label(other)}", parts[0].get(name, "nothing"), parts[1].get(name, "nothing")
    )


def _made_by(value: ir.Value | None) -> str:
    if value is None:
        return "nothing"
    producer = value.producer()
    if producer is not None:
        return f"output {value.index()} of {node_label(producer)}"
    if value.is_initializer():
        return f"the initializer {value.name!r}"
    return f"the input {value.name!r}" if value.is_graph_input() else f"the undefined value {value.name!r}"
