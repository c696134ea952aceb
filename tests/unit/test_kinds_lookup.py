"""Embeddings, bags of embeddings and bilinear forms, injected against folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.kinds import BY_NAME
from lora_fx.passes.fold import folded
from tests.by_hand import adapt, branched, check, distance, owned_forms, randomise, run

IDS = torch.tensor([[1, 4, 4, 2], [0, 3, 4, 1], [2, 2, 0, 6]])
OFFSETS = torch.tensor([0, 3, 3, 8])


class Bag(nn.Module):
    """A bag with every kind of further input."""

    def __init__(self, **how: object) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(7, 5, **how), nn.Linear(5, 3)

    def forward(
        self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        return self.out(torch.tanh(self.bag(ids, offsets, per_sample_weights)))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 4, -1])
def test_bags(mode: str, padding_idx: int | None) -> None:
    model = Bag(mode=mode, padding_idx=padding_idx).double()
    adapt(model)
    assert branched(model) == {"bag.weight", "out.weight"}
    check(model, IDS)
    check(model, IDS.flatten(), OFFSETS)


def test_bags_with_weights_and_last_offset() -> None:
    model = Bag(mode="sum", include_last_offset=True).double()
    adapt(model)
    weights = torch.randn(12, dtype=torch.float64)
    offsets = torch.tensor([0, 3, 3, 12])
    check(model, IDS.flatten(), offsets, weights)


@pytest.mark.parametrize("kind", ["embedding", "embedding_bag"])
def test_gradients_by_frequency(kind: str) -> None:
    layer = {"embedding": nn.Embedding, "embedding_bag": nn.EmbeddingBag}[kind](7, 5, scale_grad_by_freq=True)
    model = nn.Sequential(layer, nn.Tanh()).double()
    adapt(model)
    check(model, IDS)


@pytest.mark.parametrize("padding_idx", [4, -3])
def test_the_padding_of_an_embedding_gets_no_gradient(padding_idx: int) -> None:
    model = nn.Sequential(nn.Embedding(7, 5, padding_idx=padding_idx), nn.Tanh()).double()
    adapt(model)
    check(model, IDS)
    only_padding = torch.full((2, 3), 4)
    model(only_padding).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in gradients)


def test_sparse_embeddings_train_dense_adapters() -> None:
    model = Bag(mode="sum", sparse=True)
    adapt(model)
    model(IDS).sum().backward()
    assert all(not p.grad.is_sparse for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_embeddings_are_verified(layer: type[nn.Module]) -> None:
    model = nn.Sequential(layer(7, 5, sparse=True), nn.Tanh()).double()
    adapt(model)
    check(model, IDS)


class Table(nn.Module):
    """Looks a sparse table up by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(nn.functional.embedding(ids, self.table.weight, sparse=True))


@pytest.mark.parametrize("how", [{"compute": "weight"}, {"dora": True}, {"init": "pissa"}])
@pytest.mark.parametrize("make", [Table, lambda: nn.Sequential(nn.Embedding(7, 5, sparse=True), nn.Tanh())])
def test_sparse_embeddings_in_the_weight_form(make: Callable[[], nn.Module], how: dict[str, Any]) -> None:
    model = make().double()
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2, **{"compute": "weight", **how})), IDS)
    assert {d.form for d in lora_fx.audit(model).rows} == {"weight"}
    randomise(model)
    check(model, IDS)
    model(IDS).sum().backward()
    gradients = [p.grad for p in lora_fx.parameters(model)]
    assert all(g is not None and not g.is_sparse and g.any() for g in gradients)


def test_a_sparse_bag_in_the_weight_form() -> None:
    model = Bag(mode="sum", sparse=True).double()
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2, compute="weight")), IDS)
    randomise(model)
    check(model, IDS)


@pytest.mark.parametrize("layer", [nn.Embedding(7, 5, max_norm=1.0), nn.EmbeddingBag(7, 5, max_norm=1.0)])
def test_max_norm_is_unfit(layer: nn.Module) -> None:
    kind = BY_NAME[owned_forms(layer)["weight"][0]]
    assert kind.unfit(layer) == "max_norm rewrites the weight in the forward"


class Bilinear(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.pair = nn.Bilinear(4, 5, 3, bias=bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.pair(x, y))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_bilinear(bias: bool, shape: tuple[int, ...]) -> None:
    model = Bilinear(bias).double()
    adapt(model)
    assert branched(model) == {"pair.weight"}
    check(model, torch.randn(*shape, 4).double(), torch.randn(*shape, 5).double())


def test_dropout_acts_on_the_branch_alone() -> None:
    x, y = torch.randn(4, 4), torch.randn(4, 5)
    model = Bilinear(bias=True)
    base = model(x, y)
    adapt(model, dropout=0.5)
    assert distance(run(model.eval(), x, y), run(model, x, y)) == 0
    model.train()
    first, second = model(x, y), model(x, y)
    assert distance(first, second) > 1e-6
    assert distance(first, base) < 1


@pytest.mark.parametrize("kind", ["embedding", "embedding_bag"])
@pytest.mark.parametrize(
    ("table", "adapter", "limit"),
    [(torch.float64, torch.float32, 1e-12), (torch.float32, torch.bfloat16, 1e-6)],
)
def test_a_narrower_adapter_is_computed_as_exactly_as_its_table(
    kind: str, table: torch.dtype, adapter: torch.dtype, limit: float
) -> None:
    layer = {"embedding": nn.Embedding, "embedding_bag": nn.EmbeddingBag}[kind](7, 5)
    model = nn.Sequential(layer).to(table)
    adapt(model)
    for parameter in lora_fx.parameters(model):
        parameter.data = parameter.data.to(adapter)
    assert branched(model) == {"0.weight"}
    found = run(model, IDS)
    with folded(model):
        assert distance(found, run(model, IDS)) <= limit


def updates(model: nn.Module, *inputs: Tensor) -> Tensor:
    """Return what the adapter adds to the base's output."""
    with lora_fx.disable_adapter(model):
        base = model(*inputs)
    return model(*inputs) - base


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_dropout_of_an_embedding_drops_looked_up_ids(init: str) -> None:
    model = nn.Sequential(nn.Embedding(7, 5)).double()
    policy = lora_fx.Policy(lora_fx.Rule(dropout=0.25, rank=2, init=init))
    lora_fx.inject(model, policy, IDS)
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.copy_(torch.randn_like(parameter))
    ids = torch.arange(7).repeat(1000)
    whole = updates(model.eval(), ids)
    with folded(model):
        wanted = run(model, ids)
    assert distance(run(model, ids), wanted) <= 1e-12
    found = updates(model.train(), ids)
    scale = (found * whole).sum(-1) / whole.square().sum(-1)
    torch.testing.assert_close(found, whole * scale.unsqueeze(-1))
    kept = scale > 0.5
    torch.testing.assert_close(scale, kept.double() / 0.75)
    # 7000 draws: four standard deviations of their mean are 0.021.
    assert abs(float(kept.double().mean()) - 0.75) < 0.021
    assert not torch.equal(kept[:7], kept[7:14]) or not torch.equal(kept[:7], kept[14:21])


@pytest.mark.parametrize(
    ("mode", "padding_idx", "weighted"),
    [("sum", None, False), ("sum", 4, True), ("mean", None, False), ("mean", 4, False)],
)
def test_dropout_of_a_bag_drops_ids_of_the_bag(mode: str, padding_idx: int | None, weighted: bool) -> None:
    model = nn.Sequential(Bag(mode=mode, padding_idx=padding_idx).double())
    bag = model[0].bag
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(kind="embedding_bag", dropout=0.5, rank=2)), IDS)
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.copy_(torch.randn_like(parameter))
    offsets = torch.tensor([0, 3, 3, 8])
    weights = torch.rand(12, dtype=torch.float64) + 0.5 if weighted else None
    with lora_fx.disable_adapter(model):
        base = bag(IDS.flatten(), offsets, weights)
    model.train()
    torch.manual_seed(3)
    found = bag(IDS.flatten(), offsets, weights) - base
    torch.manual_seed(3)
    mask = nn.functional.dropout(torch.ones(12, dtype=torch.float64), 0.5)
    assert 0 < int((mask == 0).sum()) < 12
    delta = bag.weight.detach() - dict(model.named_parameters())["0.bag.weight"]
    ids, ends, wanted = IDS.flatten(), [3, 3, 8, 12], torch.zeros(4, 5, dtype=torch.float64)
    for row, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        own = [i for i in range(start, stop) if ids[i] != padding_idx]
        for i in own:
            factor = mask[i] * (1 if weights is None else weights[i])
            wanted[row] += factor * delta[ids[i]] / (len(own) if mode == "mean" else 1)
    torch.testing.assert_close(found, wanted)
    lora_fx.verify(model, IDS).raise_for_failure()


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.EmbeddingBag(7, 5, mode="max"), "the maximum of a bag is not linear in W"),
        (nn.EmbeddingBag(7, 5, scale_grad_by_freq=True), "divided by how often an id occurs"),
        (nn.Embedding(7, 5, scale_grad_by_freq=True), "divided by how often an id occurs"),
    ],
)
def test_dropout_where_the_weight_itself_is_looked_up_is_refused(layer: nn.Module, why: str) -> None:
    model = nn.Sequential(layer)
    with pytest.raises(lora_fx.PolicyError, match=why):
        lora_fx.plan(model, lora_fx.Policy(lora_fx.Rule(dropout=0.1)), IDS)
    plan = lora_fx.plan(model, lora_fx.Policy(lora_fx.Rule()), IDS)
    assert plan["0.weight"].form == "weight"
    assert why in plan["0.weight"].form_reason
    lora_fx.inject(model, plan, IDS)
    check(model, IDS)
