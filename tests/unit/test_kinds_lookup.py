"""Embeddings, bags of embeddings and bilinear forms, injected against folded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.kinds import BY_NAME
from lora_fx.passes.fold import folded
from tests.by_hand import adapt, branched, check, distance, owned_forms, run

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
