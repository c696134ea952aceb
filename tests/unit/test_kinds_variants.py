"""Every variant of an adapter on every kind: bit-equal at the start, and injected == folded."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from lora_fx.kinds.base import LivePart, since_start
from lora_fx.kinds.effective import low_rank_delta
from lora_fx.kinds.linear import adapted_linear, composed_linear
from lora_fx.matrix import rows_form
from tests.by_hand import branched, check, distance, randomise, run

VARIANTS: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "orthogonal": {"init": "orthogonal"},
    "gaussian": {"init": "gaussian", "rslora": True, "alpha": 3},
    "dora": {"dora": True},
    "dora and pissa": {"dora": True, "init": "pissa"},
}


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
        self.mix = nn.Conv2d(6, 4, 3, groups=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.up(x)))


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.table = nn.EmbeddingBag(9, 6, mode="sum"), nn.Embedding(9, 6, padding_idx=0)
        self.pair = nn.Bilinear(6, 6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.pair(self.bag(ids), self.table(ids).mean(1)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(5, 6, proj_size=3), nn.GRU(3, 4, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])[0]


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.heads = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([F.linear(x, w) for w in self.experts])
        return torch.tanh(torch.bmm(torch.tanh(x.flatten(1, -2)), self.heads))


class Tying(nn.Module):
    """One kernel goes down in a convolution, and up in a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(5, 3, 3, bias=False)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.down(x)))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolutions": (Grouped, lambda: torch.randn(2, 4, 6, 6)),
    "bags": (Bags, lambda: torch.randint(0, 9, (3, 5))),
    "recurrent": (Recurrent, lambda: torch.randn(4, 2, 5)),
    "stacks": (Stacked, lambda: torch.randn(4, 2, 5)),
    "tied kernels": (Tying, lambda: torch.randn(2, 3, 7, 7)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
        lambda: torch.randn(2, 4, 8),
    ),
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("name", sorted(MODELS))
def test_variants(name: str, variant: str) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, x = make().double().eval(), inputs()
    x = x.double() if x.is_floating_point() else x
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():  # torch picks kernels by what requires a gradient
        base = run(model, x)
        lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2, **VARIANTS[variant])), x, seed=0)
        start = run(model, x)
    assert distance(start, base) < 1e-14 if "dora" in variant else torch.equal(start, base)
    randomise(model)
    assert distance(run(model, x), base) > 1e-3
    check(model, x)


def test_a_kernel_shared_by_a_convolution_and_a_transposed_one() -> None:
    model, x = Tying().double(), torch.randn(2, 3, 7, 7).double()
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=2)), x, seed=0)
    assert len(lora_fx.parameters(model)) == 2
    assert branched(model) == {"down.weight", "up.weight"}
    randomise(model)
    check(model, x)


@pytest.mark.parametrize("name", ["convolutions", "bags", "tied kernels"])
def test_dropout_on_branches(name: str) -> None:
    """In eval there is none; in training it changes the update alone, whose mean it keeps."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, x = make().double(), inputs()
    x = x.double() if x.is_floating_point() else x
    skip = [lora_fx.Skip(kind="embedding*")] if name == "bags" else []
    lora_fx.inject(model, lora_fx.Policy(*skip, lora_fx.Rule(rank=2, dropout=0.3)), x, seed=0)
    randomise(model, size=1e-3)
    model.eval()
    with lora_fx.folded(model):
        wanted = run(model, x)
    assert distance(run(model, x), wanted) < 1e-12
    with lora_fx.disable_adapter(model):
        base = run(model, x)
    model.train()
    with torch.no_grad():
        draws = torch.stack([model(x) for _ in range(400)])
    assert distance(draws[0], draws[1]) > 0
    assert float((draws.mean(0) - wanted).norm() / (wanted - base).norm()) < 0.2


@pytest.mark.parametrize("name", ["convolutions", "bags", "recurrent", "stacks", "tied kernels"])
def test_exported_graphs(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, x = make().double().eval(), inputs()
    x = x.double() if x.is_floating_point() else x
    base = run(model, x)
    graph = torch.export.export(model, (x,)).module()
    lora_fx.inject(graph, lora_fx.Policy(lora_fx.Rule(rank=2)), x, seed=0)
    assert distance(graph(x), base) < 1e-14
    randomise(graph)
    found = graph(x)
    assert distance(found, base) > 1e-3
    with lora_fx.folded(graph):
        assert distance(graph(x), found) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_start_adds_exactly_nothing_and_then_what_has_moved(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b, x = torch.randn(3, 5), torch.randn(7, 3), torch.randn(4, 5, dtype=dtype)
    weight = torch.randn(7, 5, dtype=dtype)
    at_start = since_start(LivePart(a, b, 0.5), (a.clone(), b.clone()))
    assert torch.equal(composed_linear(x, weight, None, at_start), F.linear(x, weight))
    assert torch.equal(adapted_linear(x, weight, lora=at_start), F.linear(x, weight))
    a0, b0 = torch.randn(3, 5), torch.randn(7, 3)
    form = rows_form((7, 5))
    delta = sum(low_rank_delta(form, part) for part in since_start(LivePart(a, b, 0.5), (a0, b0)))
    torch.testing.assert_close(delta, 0.5 * (b @ a - b0 @ a0))


STRIDED = {
    "every other row": lambda out, inp: torch.randn(2 * out, inp)[::2],
    "every other column": lambda out, inp: torch.randn(out, 2 * inp)[:, ::2],
    "padded rows": lambda out, inp: torch.randn(out, inp + 3)[:, :inp],
    "every other row, transposed": lambda out, inp: torch.randn(2 * inp, out)[::2].t(),
    "padded rows, transposed": lambda out, inp: torch.randn(inp, out + 3)[:, :out].t(),
}


@pytest.mark.parametrize("compute", ["auto", "weight", "branch"])
@pytest.mark.parametrize("name", sorted(STRIDED))
def test_a_weight_with_gaps_starts_at_the_bits_of_the_base(name: str, compute: Any) -> None:
    torch.manual_seed(0)
    apart = 0
    for out, inp, rows in itertools.product((1, 64), (16, 40), (1, 2, 7)):
        layer = nn.Linear(inp, out)
        layer.weight = nn.Parameter(STRIDED[name](out, inp))
        model, x = nn.Sequential(layer), torch.randn(rows, inp)
        wanted, stride = model(x).detach(), layer.weight.stride()
        apart += not torch.equal(F.linear(x, layer.weight.detach().contiguous(), layer.bias), wanted)
        lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=1, compute=compute)), x, seed=0)
        assert torch.equal(model(x), wanted)
        assert layer.weight.stride() == stride
        with lora_fx.folded(model):
            assert torch.equal(model(x), wanted)
        randomise(model)
        found = run(model, x)
        with lora_fx.folded(model):
            assert distance(found, run(model, x)) <= 1e-5
    assert apart or name == "every other row"  # elsewhere the strides do decide on bits
