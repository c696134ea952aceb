"""The structural digest: blind to made-up names, and to nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_fx.passes.onnx_canonical import all_initializers, all_nodes, canonical
from lora_fx.passes.onnx_diff import compare
from lora_fx.passes.onnx_files import strip

TEXT = """
<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
main (float[B,4] x, int64[B] ids, bool c) => (float[B,4] y, float[B,4] z)
<float[4,4] w1 = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}, float[4,4] w2 = {2,0,0,0,0,2,0,0,0,0,2,0,0,0,0,2},
 float[4,4] table = {1,1,1,1,2,2,2,2,3,3,3,3,4,4,4,4}, int64[1] axes = {1}, float[4] unread = {1,2,3,4}>
{
    a = MatMul (x, w1)
    b = MatMul (x, w2)
    d = Sub (a, b)
    e = Gather <axis = 0> (table, ids)
    f = If (c) <
        then_branch = inner () => (float[B,4] t) { t = Add (d, e) },
        else_branch = other () => (float[B,4] s)
        <float[4] k = {1,2,3,4}> { r = Relu (d)  s = Mul (r, k) }
    >
    g = local.scaled <factor = 0.5> (f)
    m = ReduceMean <keepdims = 1> (g, axes)
    y = Add (g, m)
    dead = Exp (a)
    z = Identity (y)
}
<domain: "local", opset_import: ["" : 20]>
scaled <factor> (v) => (w) {
    q = Constant <value_float : float = @factor> ()
    u = Mul (v, q)
    w = Tanh (u)
}
"""


def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT))


def node(m: ir.Model, op: str, index: int = 0) -> ir.Node:
    return [n for n in all_nodes(m.graph) if n.op_type == op][index]


def agree(a: ir.Model, b: ir.Model) -> bool:
    """Whether two models agree, by the digest and by the walk, which must say the same."""
    same = canonical(a).digest == canonical(b).digest
    assert same == (compare(a, b).difference is None)
    return same


def test_equal_to_itself() -> None:
    assert agree(model(), model())


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
def test_names_and_order_do_not_count(seed: int) -> None:
    other = model()
    pick = random.Random(seed)
    for graph in (other.graph, *other.functions.values()):
        kept = {id(value) for value in (*graph.inputs, *graph.outputs)} if graph is other.graph else set()
        values = [value for n in all_nodes(graph) for value in n.outputs]
        for value in (*values, *all_initializers(graph)):
            if id(value) not in kept:
                value.name = f"v{pick.getrandbits(64)}"
        for n in all_nodes(graph):
            n.name = f"n{pick.getrandbits(64)}"
            n.metadata_props["note"] = str(pick.random())
            n.doc_string = "text"
    shuffle(other.graph, pick)
    assert agree(model(), other)
    strip(other)
    assert agree(model(), other)


def shuffle(graph: ir.Graph, pick: random.Random) -> None:
    """Put the nodes into another topological order."""
    waiting, done = list(graph), set[ir.Node]()
    order: list[ir.Node] = []
    while waiting:
        ready = [n for n in waiting if all(p in done or p not in waiting for p in needs(n))]
        chosen = pick.choice(ready)
        waiting.remove(chosen)
        done.add(chosen)
        order.append(chosen)
    graph.remove(list(graph))
    graph.extend(order)


def needs(n: ir.Node) -> set[ir.Node]:
    values = [*n.inputs]
    for attribute in n.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            values += [value for inner in all_nodes(attribute.value) for value in inner.inputs]
    return {value.producer() for value in values if value is not None and value.producer() is not None}


def test_values_of_float_initializers_do_not_count() -> None:
    other = model()
    other.graph.initializers["w1"].const_value = ir.tensor(
        [[9.0] * 4] * 4, dtype=ir.DataType.FLOAT, name="w1"
    )
    assert agree(model(), other)


def attribute(m: ir.Model) -> None:
    node(m, "Gather").attributes["axis"] = ir.AttrInt64("axis", 1)


def attribute_gone(m: ir.Model) -> None:
    del node(m, "ReduceMean").attributes["keepdims"]


def operator(m: ir.Model) -> None:
    node(m, "Identity").op_type = "Neg"


def domain(m: ir.Model) -> None:
    node(m, "MatMul").domain = "com.example"


def operands_swapped(m: ir.Model) -> None:
    # The two products look alike but for float values, so what else reads one of them tells them apart.
    sub = node(m, "Sub")
    a, b = sub.inputs
    sub.replace_input_with(0, b)
    sub.replace_input_with(1, a)


def edge(m: ir.Model) -> None:
    node(m, "Sub").replace_input_with(1, node(m, "MatMul").outputs[0])


def edge_inside(m: ir.Model) -> None:
    add = node(m, "Add")
    add.replace_input_with(0, node(m, "MatMul").outputs[0])


def dead_edge(m: ir.Model) -> None:
    node(m, "Exp").replace_input_with(0, node(m, "MatMul", 1).outputs[0])


def live_node(m: ir.Model) -> None:
    sub = node(m, "Sub")
    extra = ir.node("Identity", [sub.inputs[0]])
    m.graph.insert_before(sub, extra)
    sub.replace_input_with(0, extra.outputs[0])


def dead_node(m: ir.Model) -> None:
    m.graph.append(ir.node("Exp", [node(m, "Sub").outputs[0]]))


def output_renamed(m: ir.Model) -> None:
    m.graph.outputs[0].name = "yy"


def outputs_swapped(m: ir.Model) -> None:
    m.graph.outputs[0], m.graph.outputs[1] = m.graph.outputs[1], m.graph.outputs[0]


def input_renamed(m: ir.Model) -> None:
    m.graph.inputs[1].name = "idx"


def input_shape(m: ir.Model) -> None:
    m.graph.inputs[0].shape = ir.Shape([2, 4])


def input_dtype(m: ir.Model) -> None:
    m.graph.inputs[1].dtype = ir.DataType.INT32


def other_symbol(m: ir.Model) -> None:
    m.graph.inputs[1].shape = ir.Shape(["N"])


def opset(m: ir.Model) -> None:
    m.opset_imports[""] = 21


def another_domain(m: ir.Model) -> None:
    m.opset_imports["com.microsoft"] = 1


def ir_version(m: ir.Model) -> None:
    m.ir_version = 9


def integer_constant(m: ir.Model) -> None:
    m.graph.initializers["axes"].const_value = ir.tensor([0], name="axes")


def initializer_shape(m: ir.Model) -> None:
    m.graph.initializers["w1"].const_value = ir.tensor([[1.0] * 4], dtype=ir.DataType.FLOAT, name="w1")


def initializer_dtype(m: ir.Model) -> None:
    m.graph.initializers["w1"].const_value = ir.tensor([[1.0] * 4] * 4, dtype=ir.DataType.DOUBLE, name="w1")


def unread_initializer(m: ir.Model) -> None:
    del m.graph.initializers["unread"]


def initializer_in_subgraph(m: ir.Model) -> None:
    (inner,) = [v for v in all_initializers(m.graph) if v.name == "k"]
    inner.const_value = ir.tensor([1.0], dtype=ir.DataType.FLOAT, name="k")


def function_body(m: ir.Model) -> None:
    (function,) = m.functions.values()
    next(n for n in function if n.op_type == "Tanh").op_type = "Sigmoid"


def function_attribute(m: ir.Model) -> None:
    node(m, "scaled").attributes["factor"] = ir.AttrFloat32("factor", 0.25)


def weights_shared(m: ir.Model) -> None:
    second = node(m, "MatMul", 1)
    second.replace_input_with(1, m.graph.initializers["w1"])
    del m.graph.initializers["w2"]


@pytest.mark.parametrize(
    ("tamper", "place"),
    [
        (attribute, "attribute axis of node"),
        (attribute_gone, "attribute keepdims of node"),
        (operator, "Neg"),
        (domain, "MatMul"),
        (operands_swapped, "(Exp)"),
        (edge, "input 1 of node 'd' (Sub)"),
        (edge_inside, "(Add)"),
        (dead_edge, "(Exp)"),
        (live_node, "input 0 of node 'd' (Sub)"),
        (dead_node, "reaches no output"),
        (output_renamed, "graph output 0"),
        (outputs_swapped, "graph output 0"),
        (input_renamed, "graph input 1"),
        (input_shape, "graph input 0"),
        (input_dtype, "graph input 1"),
        (other_symbol, "graph input 1"),
        (opset, "opset imports"),
        (another_domain, "opset imports"),
        (ir_version, "IR version"),
        (integer_constant, "initializer 'axes'"),
        (initializer_shape, "initializer 'w1'"),
        (initializer_dtype, "initializer 'w1'"),
        (unread_initializer, "initializers that nothing reads"),
        (initializer_in_subgraph, "initializer 'k'"),
        (function_body, "Sigmoid"),
        (function_attribute, "attribute factor"),
        (weights_shared, "input 1 of node"),
    ],
)
def test_any_change_is_found_and_its_place_named(tamper: Callable[[ir.Model], None], place: str) -> None:
    other = model()
    tamper(other)
    assert not agree(model(), other)
    difference = compare(model(), other).difference
    assert difference is not None
    assert place in str(difference), difference


def test_sharing_of_equal_initializers_may_be_left_out() -> None:
    other = model()
    weights_shared(other)
    assert not agree(model(), other)
    assert canonical(model(), sharing=False).digest == canonical(other, sharing=False).digest
    assert compare(model(), other, sharing=False).difference is None
    attribute(other)
    assert canonical(model(), sharing=False).digest != canonical(other, sharing=False).digest
    assert compare(model(), other, sharing=False).difference is not None


def test_a_deep_chain_needs_no_recursion() -> None:
    def chain() -> ir.Model:
        x = ir.val("x", ir.DataType.FLOAT, [1])
        value, nodes = x, []
        for _ in range(5000):
            nodes.append(ir.node("Neg", [value]))
            value = nodes[-1].outputs[0]
        return ir.Model(ir.Graph([x], [value], nodes=nodes, opset_imports={"": 20}), ir_version=10)

    assert agree(chain(), chain())
