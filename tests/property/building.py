"""From a plain spec to a model, its inputs and a policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_fx
from tests.property.specs import Layer, ModelSpec, PolicySpec

WORDS = 11


class Wrapped(nn.Module):
    """A torch module inside the transposition that its axes need."""

    def __init__(self, inner: nn.Module, spatial: int) -> None:
        super().__init__()
        self.inner, self.spatial = inner, spatial

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1], *[1] * (self.spatial - 1))
        return self.inner(x).flatten(2).transpose(1, 2)


class Bare(nn.Module):
    """Parameters that the forward multiplies with itself."""

    def __init__(self, how: str, width: int, length: int) -> None:
        super().__init__()
        self.how = how
        shapes = {
            "left": (length, length),
            "einsum_heads": (width, 2, 3),
            "bmm": (2, width, width),
            "sliced": (2 * width, width),
            "joined": (width // 2, width),
        }
        self.weight = nn.Parameter(torch.randn(shapes.get(how, (width, width))) / width**0.5)
        self.offset = nn.Parameter(torch.randn(width) * 0.1)
        if how in ("joined", "einsum_heads"):
            other = (width // 2, width) if how == "joined" else (2, 3, width)
            self.other = nn.Parameter(torch.randn(other) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, width = self.weight, x.shape[-1]
        if self.how == "right":
            return x @ w + self.offset
        if self.how == "left":
            return w @ x
        if self.how == "transposed_right":
            return torch.matmul(x, w.t())
        if self.how == "einsum":
            return torch.einsum("bnd,ed->bne", x, w)
        if self.how == "einsum_heads":
            return torch.einsum("bnhk,hkd->bnd", torch.einsum("bnd,dhk->bnhk", x, w), self.other)
        if self.how == "addmm":
            return torch.addmm(self.offset, x.reshape(-1, width), w).view(x.shape)
        if self.how == "bmm":
            both = torch.bmm(torch.stack([x.reshape(-1, width)] * 2), w)
            return (both[0] * torch.sigmoid(both[1])).view(x.shape)
        if self.how == "sliced":
            return F.linear(x, w[:width]) * torch.sigmoid(F.linear(x, w[width:]))
        return F.linear(x, torch.cat([self.weight, self.other]))


class Attention(nn.Module):
    """Multi-head attention on one sequence, in torch's module or with one fused weight."""

    def __init__(self, how: str, width: int, bias: bool) -> None:
        super().__init__()
        self.how = how
        if how == "fused":
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        else:
            sizes = {"kdim": 3, "vdim": 2} if how == "mha_kdim" else {}
            self.attention = nn.MultiheadAttention(width, 2, bias=bias, batch_first=True, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "fused":
            b, n, d = x.shape
            q, k, v = self.qkv(x).view(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        key, value = (x[..., :3], x[..., :2]) if self.how == "mha_kdim" else (x, x)
        return self.attention(x, key, value, need_weights=self.how == "mha_weights")[0]


class Recurrent(nn.Module):
    """A recurrent module, its states dropped."""

    def __init__(self, cls: type[nn.Module], width: int, bias: bool) -> None:
        super().__init__()
        self.cells = cls(width, width, bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0]


class Embedded(nn.Module):
    """Adds embeddings of the positions, looked up one by one or in bags."""

    def __init__(self, how: str, width: int, length: int) -> None:
        super().__init__()
        if how == "bag":
            self.table: nn.Module = nn.EmbeddingBag(length, width, mode="sum")
        else:
            self.table = nn.Embedding(length + 1, width, padding_idx=0 if how == "padded" else None)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        found = self.table(positions.unsqueeze(1)) if self.how == "bag" else self.table(positions)
        return x + found


class Gated(nn.Module):
    """A gated feed-forward block."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 5, bias=bias), nn.Linear(width, 5, bias=bias)
        self.down = nn.Linear(5, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Bilinear(nn.Module):
    """A bilinear form of the input with itself."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.form = nn.Bilinear(width, width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.form(x, x))


_CONVS: dict[str, Callable[[int, bool], nn.Module]] = {
    "conv1d": lambda d, b: Wrapped(nn.Conv1d(d, d, 3, padding=1, bias=b), 1),
    "conv2d": lambda d, b: Wrapped(nn.Conv2d(d, d, 3, padding=1, bias=b), 2),
    "conv3d": lambda d, b: Wrapped(nn.Conv3d(d, d, (3, 1, 1), padding=(1, 0, 0), bias=b), 3),
    "grouped": lambda d, b: Wrapped(nn.Conv1d(d, d, 1, groups=2, bias=b), 1),
    "depthwise": lambda d, b: Wrapped(nn.Conv1d(d, d, 3, padding=1, groups=d, bias=b), 1),
    "same": lambda d, b: Wrapped(nn.Conv2d(d, d, 3, padding="same", dilation=2, bias=b), 2),
    "circular": lambda d, b: Wrapped(nn.Conv1d(d, d, 3, padding=1, padding_mode="circular", bias=b), 1),
    "reflect": lambda d, b: Wrapped(nn.Conv1d(d, d, 3, padding="same", padding_mode="reflect", bias=b), 1),
    "transposed1d": lambda d, b: Wrapped(nn.ConvTranspose1d(d, d, 3, padding=1, bias=b), 1),
    "transposed2d": lambda d, b: Wrapped(nn.ConvTranspose2d(d, d, 3, padding=1, bias=b), 2),
    "transposed3d": lambda d, b: Wrapped(nn.ConvTranspose3d(d, d, 1, bias=b), 3),
    "transposed_grouped": lambda d, b: Wrapped(nn.ConvTranspose1d(d, d, 3, padding=1, groups=2, bias=b), 1),
    "batch_norm": lambda d, b: nn.Sequential(nn.Linear(d, d, bias=b), Wrapped(nn.BatchNorm1d(d), 1)),
    "batch_norm_conv": lambda d, b: Wrapped(nn.Sequential(nn.Conv2d(d, d, 1, bias=b), nn.BatchNorm2d(d)), 2),
    "layer_norm": lambda d, b: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d, bias=b)),
    "group_norm": lambda d, b: Wrapped(nn.Sequential(nn.Conv1d(d, d, 1, bias=b), nn.GroupNorm(2, d)), 1),
    "linear": lambda d, b: nn.Linear(d, d, bias=b),
    "mlp": lambda d, b: nn.Sequential(nn.Linear(d, 7, bias=b), nn.GELU(), nn.Linear(7, d, bias=b)),
    "weight_norm": lambda d, b: nn.utils.parametrizations.weight_norm(nn.Linear(d, d, bias=b)),
    "gated": Gated,
    "bilinear": Bilinear,
    "lstm": lambda d, b: Recurrent(nn.LSTM, d, b),
    "gru": lambda d, b: Recurrent(nn.GRU, d, b),
    "rnn": lambda d, b: Recurrent(nn.RNN, d, b),
    "encoder": lambda d, b: nn.TransformerEncoderLayer(d, 2, 5, dropout=0.0, batch_first=True, bias=b),
}
_BARE = ("right", "left", "transposed_right", "einsum", "einsum_heads", "addmm", "bmm", "sliced", "joined")


def build_layer(layer: Layer, width: int, length: int) -> nn.Module:
    """Build one layer; it keeps the shape ``(batch, length, width)``."""
    if layer.kind in _CONVS:
        return _CONVS[layer.kind](width, layer.bias)
    if layer.kind in _BARE:
        return Bare(layer.kind, width, length)
    if layer.kind in ("positions", "bag", "padded"):
        return Embedded(layer.kind, width, length)
    return Attention(layer.kind, width, layer.bias)


class Model(nn.Module):
    """A drawn model."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.reads == "ids":
            self.words = nn.Embedding(WORDS, spec.width)
        self.layers = nn.ModuleList(build_layer(y, spec.width, spec.length) for y in spec.layers)
        self.again = nn.ModuleDict(
            {str(i): self.layers[i] for i, y in enumerate(spec.layers) if y.use == "shared"}
        )
        self.joins = nn.ModuleDict(
            {
                str(i): nn.Linear(2 * spec.width, spec.width)
                for i, y in enumerate(spec.layers)
                if y.use == "concatenated"
            }
        )
        if spec.head != "none":
            self.head = nn.Linear(spec.width, WORDS, bias=False)
        if spec.head == "tied" and spec.reads == "ids":
            self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.reads == "ids":
            x = self.words(x)
        for index, layer in enumerate(self.spec.layers):
            x = self.use(x, index, layer.use)
            x = x / (1.0 + x.abs().mean())
        return self.head(x) if self.spec.head != "none" else x

    def use(self, x: Tensor, index: int, use: str) -> Tensor:
        layer = self.layers[index]
        if use == "residual":
            return x + layer(x)
        if use == "concatenated":
            return self.joins[str(index)](torch.cat([x, layer(x)], dim=-1))
        if use == "looped":
            for _ in range(2):
                x = torch.tanh(layer(x))
            return x
        if use == "shared":
            return layer(x) + torch.tanh(self.again[str(index)](x * 0.5))
        if use == "functional" and isinstance(layer, nn.Linear):
            return layer(x) + F.linear(torch.sin(x), layer.weight)
        if use == "split":
            return torch.cat([layer(part) for part in x.chunk(2, dim=0)])
        return layer(x)


def build(spec: ModelSpec, dtype: torch.dtype) -> tuple[Model, Tensor]:
    """Build a model and one batch of inputs."""
    torch.manual_seed(spec.seed)
    model = Model(spec).to(dtype).eval()
    for buffer_owner in model.modules():
        if isinstance(buffer_owner, nn.modules.batchnorm._BatchNorm):
            buffer_owner.running_mean.normal_(0, 0.1)
    if spec.reads == "ids":
        return model, torch.randint(0, WORDS, (4, spec.length))
    return model, torch.randn(4, spec.length, spec.width, dtype=dtype)


def policy_of(spec: PolicySpec, model: nn.Module) -> lora_fx.Policy:
    """Build the policy for a model; the first rule names the model's first weight.

    A branch is asked for where there can be one.
    """
    name = next(n for n, p in model.named_parameters() if p.dim() >= 2)
    first: dict[str, Any] = {"skip": lora_fx.Skip(name=name), "train": lora_fx.Train(name=name)}
    rule = lora_fx.Rule(
        rank=spec.rank, alpha=spec.alpha, rslora=spec.rslora, dora=spec.dora, init=spec.init, optional=True
    )
    rules: list[Any] = [] if spec.first == "adapt" else [first[spec.first]]
    if spec.compute == "branch":
        rules += [replace(rule, dora=False, compute="branch", where=_can_be_branched), rule]
    else:
        rules.append(replace(rule, compute=spec.compute))
    return lora_fx.Policy(*rules, bias=spec.bias, norm_stats=spec.norm_stats)


def _can_be_branched(site: lora_fx.Site) -> bool:
    return bool(site.uses) and all(use.branch for use in site.uses)


def plainer(spec: PolicySpec) -> PolicySpec:
    """Return the policy that asks for the same in plain LoRA."""
    return replace(spec, dora=False, init="kaiming")
