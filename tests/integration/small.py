"""A model and its data, small enough for two processes of a laptop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from lora_fx import Policy, Rule

WORDS = 20


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A branch of every kind of home: embedding, linear; with ``odd`` a weight that is read functionally."""

    def __init__(self, *, tied: bool = False, odd: bool = False, width: int = 16) -> None:
        super().__init__()
        self.odd = odd
        self.emb = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.mix = nn.Parameter(torch.randn(width, width) / 4)
        self.head = nn.Linear(width, WORDS, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        for block in self.blocks:
            h = block(h)
        return self.head(F.linear(h, self.mix) if self.odd else h)


def base(*, tied: bool = False, odd: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(tied=tied, odd=odd)


def rules(*, odd: bool = False, **options: Any) -> Policy:
    skipped = () if odd else (lora_fx.Skip(name="mix"),)
    return Policy(*skipped, Rule(rank=4, **options))


def adapted(*, tied: bool = False, odd: bool = False, **options: Any) -> Net:
    model = base(tied=tied, odd=odd)
    lora_fx.inject(model, rules(odd=odd, **options), batch(0), seed=1)
    return model


def batch(step: int, size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(WORDS, (size, 5), generator=generator)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), x.flatten())


def train(
    model: nn.Module,
    inner: nn.Module | None = None,
    steps: int = 3,
    first: int = 0,
    rank: int = 0,
    of: int = 1,
) -> None:
    """Train some steps on this process's share of every batch; ``inner`` is the injected module."""
    optimizer = torch.optim.AdamW(lora_fx.parameters(inner or model), lr=1e-2)
    for step in range(first, first + steps):
        loss(model, batch(step).chunk(of)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()


class Convs(nn.Module):
    """Convolutions between normalisations that keep statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))

    @classmethod
    def seeded(cls) -> Convs:
        torch.manual_seed(0)
        return cls()


def convs(policy: Policy) -> Convs:
    model = Convs.seeded()
    lora_fx.inject(model, policy, image(0), seed=1)
    return model


def image(step: int, size: int = 8) -> Tensor:
    return torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def with_values(model: nn.Module, seed: int = 5) -> nn.Module:
    """Give an injected model's adapters random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return model


def gap(model: nn.Module, reference: nn.Module) -> float:
    """Largest difference between two models' outputs, over the reference's size."""
    with torch.no_grad():
        wanted = reference(batch(9))
        return float((model(batch(9)) - wanted).norm() / wanted.norm())
