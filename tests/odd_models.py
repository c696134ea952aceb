"""Small models that use weights in odd ways: each is a factory and its example inputs."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Functional(nn.Module):
    """A parent multiplies with its child's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.linear(x, self.proj.weight, self.proj.bias)) + self.proj(x))


class Tied(nn.Module):
    """An embedding and a head share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(13, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(ids))))


class TwoNames(nn.Module):
    """One module is registered under two names and called in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = self.first
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.first(x)) + self.second(x)
        return self.last(x)


class Bare(nn.Module):
    """Bare parameters in matmuls, on either side, transposed and sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.right = nn.Parameter(torch.randn(6, 5))
        self.left = nn.Parameter(torch.randn(4, 5))
        self.wide = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.right
        x = torch.matmul(self.left, x.transpose(-1, -2)).transpose(-1, -2)
        return F.linear(x, self.wide[:4]) * torch.sigmoid(F.linear(x, self.wide[4:]))


class Convs(nn.Module):
    """Convolutions of many kinds, with batch normalisation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect", dilation=2)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="circular")
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.relu(self.grouped(self.norm(self.same(x)))))
        return self.head(x.mean(dim=(2, 3)))


class Fused(nn.Module):
    """Attention with one fused weight for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class MultiHead(nn.Module):
    """torch's own multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.attention(x, x, x, need_weights=False)[0])


class Joined(nn.Module):
    """Bare parameters are put together before they are multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.bottom = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(2, 5))
        self.left, self.right = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, torch.cat([self.top, self.bottom])))
        return F.linear(x, torch.cat([self.left, self.right], dim=1))


class Remembering(nn.Module):
    """Keeps what it computed from a weight at the first run, and counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)
        self.memory: dict[str, Tensor] = {}
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if "scale" not in self.memory:
            self.memory["scale"] = self.first.weight.detach().norm()
        return self.second(torch.tanh(self.first(x)) * self.memory["scale"])


class Force(nn.Module):
    """Returns a gradient that it takes itself, as force fields do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            energy = self.second(torch.tanh(self.first(x))).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]


def hooked() -> nn.Module:
    """A model whose instance has a forward of its own, as accelerate's hooks make it."""
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    layer = model[0]
    layer._old_forward = layer.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._old_forward(*args, **kwargs) * 1.0

    layer.forward = types.MethodType(forward, layer)
    return model


def _vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _ids(*shape: int, top: int) -> Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(3))


ODD_MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "functional": (Functional, lambda: _vectors(3, 6)),
    "tied": (Tied, lambda: _ids(2, 5, top=13)),
    "two names": (TwoNames, lambda: _vectors(3, 5)),
    "bare": (Bare, lambda: _vectors(2, 3, 6)),
    "convs": (Convs, lambda: _vectors(2, 3, 9, 9)),
    "fused": (Fused, lambda: _vectors(2, 5, 16)),
    "multi-head": (MultiHead, lambda: _vectors(2, 5, 8)),
    "joined": (Joined, lambda: _vectors(3, 5)),
    "hooked": (hooked, lambda: _vectors(3, 5)),
}
