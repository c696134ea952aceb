"""Roles do not depend on how an attention is written, and what is none has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_fx.passes.match import match
from lora_fx.passes.roles import assign_roles
from lora_fx.passes.trace import trace
from lora_fx.sites import Site

D, HEADS, DIM, LENGTH = 16, 4, 4, 6
X = torch.randn(2, LENGTH, D)
Core = Callable[[Tensor, Tensor, Tensor], Tensor]
NAMED: dict[str, Any] = {
    "stem": {"stem": None},
    "q": {"q": None},
    "k": {"k": None},
    "v": {"v": None},
    "o": {"o": None},
    "head": {"head": None},
}
UNNAMED = {**NAMED, "q": {}, "k": {}, "v": {}, "o": {}}


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], HEADS, DIM).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], D)


class Separate(nn.Module):
    """One residual attention between a stem and a head; ``core`` is on (batch, heads, length, dim)."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core
        self.stem, self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(5))
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        z = self.core(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)))
        return self.head((x + self.o(merged(z))).mean(1))


def sites_of(model: nn.Module, *inputs: Tensor) -> dict[str, Site]:
    traced = trace(model, inputs)
    return {site.name.removesuffix(".weight"): site for site in assign_roles(traced, match(traced))}


def roles_of(model: nn.Module, *inputs: Tensor) -> dict[str, dict[str, Any]]:
    return {name: dict(site.roles) for name, site in sites_of(model, *inputs).items()}


# --- softmax, spelled out ---


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(DIM)


def largest_taken_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(scores(q, k) - scores(q, k).amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def normalised_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    e = torch.exp(t - t.max(-1, keepdim=True).values)
    return (e @ v) / e.sum(-1, keepdim=True)


def times_the_inverse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return (e * e.sum(-1, keepdim=True).reciprocal()) @ v


def one_over_the_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return (e @ v) * (1.0 / e.sum(-1, keepdim=True))


def with_epsilon(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return (e / (e.sum(-1, keepdim=True) + 1e-6)) @ v


def clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return (e / e.sum(-1, keepdim=True).clamp_min(1e-6)) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp_()
    e /= e.sum(-1, keepdim=True)
    return e @ v


def masked_by_a_factor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp() * torch.ones(LENGTH, LENGTH).tril()
    return (e / e.sum(-1, keepdim=True)) @ v


def one_more_in_the_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return (e / (1 + e.sum(-1, keepdim=True))) @ v


def of_a_logarithm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(scores(q, k), -1).exp() @ v


def less_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    return torch.exp(t - torch.logsumexp(t, -1, keepdim=True)) @ v


def block_by_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The running softmax of flash attention."""
    out, total, most = torch.zeros_like(q), torch.zeros(1), torch.full((1,), -1e9)
    for keys, values in zip(k.split(3, 2), v.split(3, 2), strict=True):
        t = scores(q, keys)
        higher = torch.maximum(most, t.amax(-1, keepdim=True))
        e, decay = torch.exp(t - higher), torch.exp(most - higher)
        total, out, most = total * decay + e.sum(-1, keepdim=True), out * decay + e @ values, higher
    return out / total


def cast_and_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    t = torch.where(seen, scores(q, k), torch.full((), -1e9))
    return F.dropout(F.softmax(t, -1, dtype=torch.float64).to(v.dtype), 0.5, training=True) @ v


def highest_scores_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = scores(q, k)
    best, where = t.topk(3, -1)
    return torch.full_like(t, -math.inf).scatter_(-1, where, best).softmax(-1) @ v


# --- products ---


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.transpose(-1, -2)).softmax(-2).transpose(-1, -2) @ v


def values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.transpose(-1, -2) @ scores(q, k).softmax(-1).transpose(-1, -2)).transpose(-1, -2)


def einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.einsum("bhjd,bhid->bhji", k, q).softmax(dim=2)
    return torch.einsum("bhjd,bhji->bhid", v, p)


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, LENGTH, DIM) for t in (q, k, v))
    bias = torch.zeros(1, LENGTH, LENGTH)
    p = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=0.5).softmax(-1)
    return torch.bmm(p, v).view(-1, HEADS, LENGTH, DIM)


def multiplied_and_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) / math.sqrt(DIM)
    return (t.softmax(-1).unsqueeze(-1) * v.unsqueeze(-3)).sum(dim=-2)


def summed_scores_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = (k.unsqueeze(-2).expand(2, HEADS, LENGTH, LENGTH, DIM) * q.unsqueeze(-3)).sum((-1,))
    return t.transpose(-1, -2).softmax(-1) @ v


def neighbours_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every position looks at itself and the two before it."""
    k, v = (F.pad(t, (0, 0, 2, 0)).unfold(2, 3, 1).mT for t in (k, v))
    p = (q.unsqueeze(3) * k).sum(-1).softmax(-1)
    return (p.unsqueeze(-1) * v).sum(3)


def head_by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [torch.mm(q[b, h], k[b, h].t()).softmax(1).mm(v[b, h]) for b in range(2) for h in range(HEADS)]
    return torch.stack(heads).view(2, HEADS, LENGTH, DIM)


def some_queries_at_a_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([scores(part, k).softmax(-1) @ v for part in q.split(2, 2)], 2)


def with_a_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = torch.cat([scores(q, k), torch.zeros(1).expand(2, HEADS, LENGTH, 1)], -1)
    return (t - t.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


def rotated_by_complex_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turn = torch.polar(torch.ones(LENGTH, 2), torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.1])))

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 2, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)

    return F.scaled_dot_product_attention(rotated(q), rotated(k), v)


def rotated_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cos, sin = (f(torch.arange(6.0))[:, None] for f in (torch.cos, torch.sin))
    for x in (q, k):
        a, b = x[..., :2] * cos - x[..., 2:] * sin, x[..., :2] * sin + x[..., 2:] * cos
        x[..., :2].copy_(a)
        x[..., 2:].copy_(b)
    return scores(q, k).softmax(-1) @ v


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v)  # type: ignore[no-any-return]


def inside_torchscript(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.jit.script(_scripted)(q, k, v)


def _scripted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(-1, -2)), dim=-1).matmul(v)


def by_a_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]  # type: ignore[no-any-return]


SPELLINGS: tuple[Core, ...] = (
    largest_taken_off, normalised_late, times_the_inverse, one_over_the_sum, with_epsilon, clamped, in_place,
    masked_by_a_factor, one_more_in_the_sum, of_a_logarithm, less_logsumexp, block_by_block,
    cast_and_dropped, highest_scores_alone, keys_first, values_first, einsums, baddbmm, multiplied_and_summed,
    summed_scores_alone, neighbours_alone, head_by_head,
    some_queries_at_a_time, with_a_sink, rotated_by_complex_numbers, rotated_in_place, flex,
    inside_torchscript, by_a_kernel,
)  # fmt: skip


@pytest.mark.parametrize("core", SPELLINGS)
def test_an_attention_however_it_is_written(core: Core) -> None:
    assert roles_of(Separate(core), X) == NAMED


def test_an_attention_of_tensors_made_in_inference_mode() -> None:
    with torch.inference_mode():
        assert roles_of(Separate(highest_scores_alone), X) == NAMED


def test_bounds_hide_nothing_of_what_they_bound() -> None:
    """Queries and keys clipped at calibrated values, narrower than what a replay draws."""

    def clipped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.clamp(-0.01, 0.01), torch.clamp(k, min=torch.tensor(-0.01), max=torch.tensor(0.01))
        q, k = (torch.cat([-x[..., 2:], x[..., :2]], -1) for x in (q, k))  # where rows are found by replaying
        return F.scaled_dot_product_attention(q, k, v)

    assert roles_of(Separate(clipped), X) == NAMED


# --- what is no attention ---


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT + 1e-6)


def random_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Performer: exponentials of products, one of them summed, none divided by its own sum."""
    features = torch.randn(DIM, 8)
    q, k = torch.exp(q @ features - q.square().sum(-1, keepdim=True) / 2), torch.exp(k @ features)
    return (q @ (k.mT @ v)) / (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)


def efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def rectified(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.relu(scores(q, k)) @ v / LENGTH


def unnormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).exp() @ v


def squashed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(scores(q, k)) @ v


def attention_free(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = k.exp()
    return torch.sigmoid(q) * (e * v).sum(2, keepdim=True) / e.sum(2, keepdim=True)


def pooled_by_a_gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No product of query and key: a softmax of what one value says of itself."""
    return v * ((q * k).sum(-1, keepdim=True).softmax(2) * v).sum(2, keepdim=True)


@pytest.mark.parametrize(
    "core",
    [
        pooled_by_a_gate,
        linear_attention,
        random_features,
        efficient_attention,
        rectified,
        unnormalised,
        squashed,
        attention_free,
    ],
)
def test_what_is_no_softmax_of_products_is_not_named(core: Core) -> None:
    assert roles_of(Separate(core), X) == UNNAMED


# --- fused weights: one golden test for each layout ---


class Fused(nn.Module):
    """One residual attention whose projections lie in one weight of ``width`` rows."""

    def __init__(self, width: int, core: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.core = core
        self.stem, self.qkv, self.o = nn.Linear(D, D), nn.Linear(D, width), nn.Linear(D, D)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.o(self.core(self.qkv(x)))).mean(1))


def keys_values_queries(y: Tensor) -> Tensor:
    k, v, q = (heads(part) for part in y.tensor_split(3, -1))
    return merged(F.scaled_dot_product_attention(query=q, key=k, value=v))


def by_channel(y: Tensor) -> Tensor:
    q, k, v = (heads(part) for part in y.view(2, LENGTH, D, 3).unbind(-1))
    return merged(F.scaled_dot_product_attention(q, k, v))


def grouped(y: Tensor) -> Tensor:
    q, k, v = y.split([16, 8, 8], -1)
    keys, values = (t.view(2, LENGTH, 2, DIM).transpose(1, 2) for t in (k, v))
    return merged(F.scaled_dot_product_attention(heads(q), keys, values, enable_gqa=True))


def grouped_by_einsum(y: Tensor) -> Tensor:
    q, k, v = y.split([16, 8, 8], -1)
    queries = q.view(2, LENGTH, 2, 2, DIM)
    keys, values = (t.view(2, LENGTH, 2, DIM) for t in (k, v))
    p = torch.einsum("bnkgd,bmkd->bkgnm", queries, keys).softmax(-1)
    return torch.einsum("bkgnm,bmkd->bnkgd", p, values).reshape(2, LENGTH, D)


def by_group(y: Tensor) -> Tensor:
    y = y.view(2, LENGTH, 2, 4, DIM)
    q, k, v = y[..., :2, :], y[..., 2:3, :], y[..., 3:, :]
    k, v = (t.expand(2, LENGTH, 2, 2, DIM) for t in (k, v))
    q, k, v = (t.reshape(2, LENGTH, HEADS, DIM).transpose(1, 2) for t in (q, k, v))
    return merged(F.scaled_dot_product_attention(q, k, v))


def multi_query(y: Tensor) -> Tensor:
    q, kv = y.split((16, 8), 2)
    k, v = kv.split(4, -1)
    rows = q.reshape(2, LENGTH * HEADS, DIM)
    t = torch.baddbmm(torch.empty(2, rows.shape[1], LENGTH), rows, k.transpose(1, 2), beta=0, alpha=0.5)
    return torch.bmm(t.softmax(-1), v).view(2, LENGTH, D)


def channels(y: Tensor) -> Tensor:
    q, k, v = y.reshape(2, LENGTH, 3, HEADS, DIM).permute(2, 0, 3, 4, 1).unbind(0)
    p = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1)
    return (p @ v).permute(0, 3, 1, 2).reshape(2, LENGTH, D)


def shifted_windows(y: Tensor) -> Tensor:
    windows = torch.roll(y, -1, 1).view(2, 3, 2, 3 * D).reshape(-1, 2, 3, HEADS, DIM)
    q, k, v = windows.permute(2, 0, 3, 1, 4).unbind(0)
    mask = torch.zeros(3, 2, 2)
    mask[-1, 0, 1] = -100.0
    t = ((q * 0.5) @ k.mT).view(2, 3, HEADS, 2, 2) + mask[None, :, None]
    z = t.view(-1, HEADS, 2, 2).softmax(-1) @ v
    return torch.roll(z.transpose(1, 2).reshape(2, LENGTH, D), 1, 1)


def scaled_in_place(y: Tensor) -> Tensor:
    q, k, v = y[..., :16], y[..., 16:32], y[..., 32:]
    q *= 0.25
    return merged((heads(q) @ heads(k).mT).softmax(-1) @ heads(v))


def one_for_queries_and_keys(y: Tensor) -> Tensor:
    q, v = (heads(part) for part in y.chunk(2, -1))
    return merged((q @ F.normalize(q, dim=-1).mT).softmax(-1) @ v)


def every(start: int) -> tuple[tuple[int, int], ...]:
    return tuple((i, i + 1) for i in range(start, 48, 3))


BLOCKS = (((0, 16),), ((16, 32),), ((32, 48),))
GROUPED = (((0, 16),), ((16, 24),), ((24, 32),))


@pytest.mark.parametrize(
    ("core", "rows"),
    [
        (keys_values_queries, (((32, 48),), ((0, 16),), ((16, 32),))),
        (by_channel, (every(0), every(1), every(2))),
        (grouped, GROUPED),
        (grouped_by_einsum, GROUPED),
        (by_group, (((0, 8), (16, 24)), ((8, 12), (24, 28)), ((12, 16), (28, 32)))),
        (multi_query, (((0, 16),), ((16, 20),), ((20, 24),))),
        (channels, BLOCKS),
        (shifted_windows, BLOCKS),
        (scaled_in_place, BLOCKS),
        (one_for_queries_and_keys, (((0, 16),), ((0, 16),), ((16, 32),))),
    ],
)
def test_layouts_of_a_fused_weight(core: Callable[[Tensor], Tensor], rows: Any) -> None:
    width = max(stop for role in rows for _, stop in role)
    found = roles_of(Fused(width, core), X)
    assert found["qkv"] == dict(zip("qkv", rows, strict=True))
    assert found["o"] == {"o": None}
    assert found["stem"] == {"stem": None}
    assert found["head"] == {"head": None}


# --- streams ---


class NoValues(Separate):
    """The values are the stream itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        z = (heads(self.q(x)) @ heads(self.k(x)).mT).softmax(-1) @ heads(x)
        return self.head((x + self.o(merged(z)) + 0 * self.v(x)).mean(1))


def test_a_stream_that_is_attended_to_itself_gives_no_role_to_what_made_it() -> None:
    assert roles_of(NoValues(flex), X) == {**NAMED, "v": {}}


class Crossed(Separate):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        z = F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(y)), heads(self.v(y)))
        return self.head((x + self.o(merged(z)) + 0 * self.stem(x)).mean(1))


def test_a_stream_that_a_learned_query_sums_is_its_own_keys_and_values() -> None:
    """A residual that attends over the depth: the blocks' results, weighed by one learned query."""

    class Depth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, D)
            self.block, self.next, self.head = (nn.Linear(D, D) for _ in range(3))
            self.query = nn.Parameter(torch.randn(D))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            stacked = F.layer_norm(torch.stack([x, self.block(x)], -2), (D,))
            query = self.query.view(1, D).expand(*x.shape[:-1], 1, D)
            x = F.scaled_dot_product_attention(query, stacked, stacked).squeeze(-2)
            return self.head(self.next(x).sigmoid())

    found = roles_of(Depth(), torch.randint(0, 9, (2, LENGTH)))
    assert found == {"embed": {"embedding": None}, "block": {}, "next": {}, "head": {"head": None}}


def test_a_cross_attention_says_which_stream_asks_which() -> None:
    found = sites_of(Crossed(flex), X, torch.randn(2, 3, D))
    for name in "qkv":
        assert dict(found[name].roles) == {name: None}
        assert found[name].notes == ("cross-attention: queries from x, keys and values from y",)


class OneBlock(nn.Module):
    """Attention and feed-forward side by side, their weights fused on both sides (ViT-22B, FLUX)."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.stem, self.first = nn.Linear(D, D), nn.Linear(D, 3 * D + (48 if gated else 24))
        self.last, self.head = nn.Linear(D + 24, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v, *wide = self.first(F.layer_norm(x, (D,))).split([D, D, D, *([24, 24][: 1 + self.gated])], -1)
        z = merged(F.scaled_dot_product_attention(heads(q), heads(k), heads(v)))
        y = F.silu(wide[0]) * wide[1] if self.gated else F.gelu(wide[0])
        return self.head((x + self.last(torch.cat([z, y], -1))).mean(1))


@pytest.mark.parametrize(
    ("gated", "wide"), [(False, {"up": ((48, 72),)}), (True, {"up": ((72, 96),), "gate": ((48, 72),)})]
)
def test_values_beside_a_feed_forward_block_are_no_part_of_it(gated: bool, wide: dict[str, Any]) -> None:
    found = roles_of(OneBlock(gated=gated), X)
    assert found["first"] == {"q": ((0, 16),), "k": ((16, 32),), "v": ((32, 48),), **wide}
    assert found["last"] == {"o": None, "down": None}
