"""The sites of a trace as a graph: who feeds whom, who reads the same, how deep each stands."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from lora_fx.passes.dataflow import site_graph
from lora_fx.policy import Policy, Rule, Skip

D = 8


class Layer(nn.Module):
    """An attention and a feed-forward block, both residual."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """Four layers between an embedding and a head; one weight is in the model and not in the run."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, D)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head, self.spare = nn.Linear(D, 3), nn.Linear(D, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.arange(6).view(2, 3)


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph[str]:
    traced = lora_fx.trace(Model(), IDS)
    sites = [decision.site for decision in lora_fx.plan(traced, Policy(Skip())).decisions]
    return site_graph(traced, sites)


def test_edges_are_dataflow_without_a_third_between(graph: nx.DiGraph[str]) -> None:
    assert isinstance(graph, nx.DiGraph)
    assert nx.is_directed_acyclic_graph(graph)
    first, second = ("layers.0.{}.weight".format, "layers.1.{}.weight".format)
    assert set(graph.predecessors(first("o"))) == {first("q"), first("k"), first("v")}
    assert set(graph.successors(first("up"))) == {first("down")}
    # The stream that the next layer reads is the sum of everything before it.
    assert set(graph.predecessors(second("q"))) == {"embedding.weight", first("o"), first("down")}
    assert list(graph.successors("head.weight")) == []
    assert nx.has_path(graph, "embedding.weight", "head.weight")
    assert list(nx.isolates(graph)) == ["spare.weight"]


def test_nodes_hold_the_facts_of_their_sites_and_their_siblings(graph: nx.DiGraph[str]) -> None:
    q = graph.nodes["layers.2.q.weight"]
    assert (q["kind"], q["shape"], q["roles"], q["block"]) == ("linear", (D, D), {"q": None}, (2, 4))
    assert q["siblings"] == ("layers.2.k.weight", "layers.2.v.weight")
    assert graph.nodes["layers.2.o.weight"]["siblings"] == ()
    assert graph.nodes["spare.weight"]["depth"] is None


def test_depth_grows_along_every_edge_from_0_to_1(graph: nx.DiGraph[str]) -> None:
    depth = nx.get_node_attributes(graph, "depth")
    assert all(depth[above] < depth[below] for above, below in graph.edges)
    assert (depth["embedding.weight"], depth["head.weight"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("depth", "layers"), [((0.5, 1.0), {2, 3}), (-1, {3}), (-3, {1, 2, 3}), (2, {0, 1}), ((0.0, 0.2), {0})]
)
def test_rules_choose_by_depth(depth: tuple[float, float] | int, layers: set[int]) -> None:
    made = lora_fx.plan(Model(), Policy(Rule(role="qv", depth=depth, rank=2)), IDS)
    assert {int(d.name.split(".")[1]) for d in made.adapted} == layers
    assert len(made.adapted) == 2 * len(layers)


def test_a_weight_used_twice_stands_where_it_is_used_first() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body = nn.Embedding(9, D), nn.Linear(D, D)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.body(self.embedding(ids))), self.embedding.weight)

    traced = lora_fx.trace(Tied(), IDS)
    found = site_graph(traced, [d.site for d in lora_fx.plan(traced, Policy(Skip())).decisions])
    assert sorted(found.edges) == [
        ("body.weight", "embedding.weight"),
        ("embedding.weight", "body.weight"),
    ]
    assert found.nodes["embedding.weight"]["depth"] == 0.0
