"""Roles by dataflow: one golden test per layout of attention and feed-forward weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_fx.passes.match import match
from lora_fx.passes.roles import assign_roles
from lora_fx.passes.trace import trace
from lora_fx.sites import Site

D, HEADS = 16, 4
X = torch.randn(2, 6, D)


def roles_of(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> dict[str, dict[str, Any]]:
    return {name: dict(site.roles) for name, site in sites_of(model, *inputs, **kwargs).items()}


def sites_of(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> dict[str, Site]:
    traced = trace(model, (inputs, kwargs))
    return {site.name: site for site in assign_roles(traced, match(traced))}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention spelled out, on (batch, heads, length, dim)."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v


class Fused(nn.Module):
    """A fused projection; ``split`` says how q, k and v lie in it, ``groups`` how many key heads."""

    def __init__(self, split: str, *, sdpa: bool = True, key_heads: int = HEADS) -> None:
        super().__init__()
        self.split, self.sdpa, self.key_heads = split, sdpa, key_heads
        self.dim = D // HEADS
        self.stem = nn.Linear(D, D)
        self.qkv = nn.Linear(D, D + 2 * key_heads * self.dim)
        self.out = nn.Linear(D, D)
        self.classify = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, _ = x.shape
        y = self.qkv(x)
        if self.split == "blocks":
            y = y.view(b, n, HEADS + 2 * self.key_heads, self.dim).transpose(1, 2)
            q, k, v = y.split([HEADS, self.key_heads, self.key_heads], 1)
        elif self.split == "per head":
            q, k, v = y.view(b, n, HEADS, 3, self.dim).permute(3, 0, 2, 1, 4).unbind(0)
        elif self.split == "within head":
            q, k, v = y.view(b, n, HEADS, 3 * self.dim).transpose(1, 2).chunk(3, -1)
        else:
            raise ValueError(self.split)
        k, v = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (k, v))
        z = F.scaled_dot_product_attention(q, k, v) if self.sdpa else attend(q, k, v)
        x = x + self.out(z.transpose(1, 2).reshape(b, n, D))
        return self.classify(x.mean(1))


@pytest.mark.parametrize("sdpa", [True, False])
def test_blocks_of_a_fused_weight(sdpa: bool) -> None:
    roles = roles_of(Fused("blocks", sdpa=sdpa), X)
    assert roles["qkv.weight"] == {"q": ((0, 16),), "k": ((16, 32),), "v": ((32, 48),)}
    assert roles["out.weight"] == {"o": None}
    assert roles["stem.weight"] == {"stem": None}
    assert roles["classify.weight"] == {"head": None}


@pytest.mark.parametrize("sdpa", [True, False])
def test_few_key_heads_after_the_query_heads(sdpa: bool) -> None:
    roles = roles_of(Fused("blocks", sdpa=sdpa, key_heads=1), X)
    assert roles["qkv.weight"] == {"q": ((0, 16),), "k": ((16, 20),), "v": ((20, 24),)}


@pytest.mark.parametrize("split", ["per head", "within head"])
@pytest.mark.parametrize("sdpa", [True, False])
def test_q_k_v_interleaved_per_head(split: str, sdpa: bool) -> None:
    roles = roles_of(Fused(split, sdpa=sdpa), X)
    starts = range(0, 3 * D, 12)
    assert roles["qkv.weight"] == {
        role: tuple((start + at, start + at + 4) for start in starts)
        for role, at in (("q", 0), ("k", 4), ("v", 8))
    }


class Block(nn.Module):
    """A residual feed-forward block; ``form`` says how its activation is gated."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.norm = nn.LayerNorm(D)
        wide = 24
        self.first = nn.Linear(D, wide if form in {"plain", "gated"} else 2 * wide)
        if form == "gated":
            self.second = nn.Linear(D, wide)
        self.last = nn.Linear(wide, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = self.first(h)
        if self.form == "plain":
            y = 0.5 * y * (1.0 + torch.tanh(0.8 * (y + 0.04 * y**3)))
        elif self.form == "gated":
            y = F.silu(y) * self.second(h)
        elif self.form == "fused":
            gate, up = y.chunk(2, -1)
            y = up * F.silu(gate)
        elif self.form == "interleaved":
            y = F.gelu(y[..., 1::2]) * y[..., 0::2]
        elif self.form == "glu":
            y = F.glu(y)
        return x + self.last(y)


EVEN = tuple((i, i + 1) for i in range(0, 48, 2))
ODD = tuple((i + 1, i + 2) for i in range(0, 48, 2))


@pytest.mark.parametrize(
    ("form", "first"),
    [
        ("plain", {"up": None}),
        ("gated", {"gate": None}),
        ("fused", {"up": ((24, 48),), "gate": ((0, 24),)}),
        ("interleaved", {"up": EVEN, "gate": ODD}),
        ("glu", {"up": ((0, 24),), "gate": ((24, 48),)}),
    ],
)
def test_feed_forward_blocks(form: str, first: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(D, D), Block(form), Block(form), nn.Linear(D, 3))
    sites = sites_of(model, X)
    for index in (1, 2):
        assert dict(sites[f"{index}.first.weight"].roles) == first
        assert dict(sites[f"{index}.last.weight"].roles) == {"down": None}
        assert sites[f"{index}.last.weight"].block == (index - 1, 2)
        if form == "gated":
            assert dict(sites[f"{index}.second.weight"].roles) == {"up": None}
    assert [sites[n].depth for n in ("0.weight", "3.weight")] == [0.0, 1.0]


def test_a_plain_network_has_ends_only() -> None:
    model = nn.Sequential(
        nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(-1)
    )
    assert roles_of(model, X) == {"0.weight": {"stem": None}, "2.weight": {}, "4.weight": {"head": None}}


def test_of_a_whole_attention_at_the_end_only_what_makes_the_output_is_a_head() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.attention = nn.Linear(16, 16), nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return attended

    found = roles_of(Last(), torch.randn(2, 5, 16))
    assert found["attention.in_proj_weight"] == {"q": ((0, 16),), "k": ((16, 32),), "v": ((32, 48),)}
    assert found["attention.out_proj.weight"] == {"o": None, "head": None}
