"""Attention and transformers of torch's own in all variants, in train and eval, on the fast path too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from tests.by_hand import check, distance, randomise, run

EVERYTHING = lora_fx.Policy(lora_fx.Rule(rank=2))
FAST = {"_native_multi_head_attention", "_transformer_encoder_layer_fwd"}


class Attention(nn.Module):
    """Multi-head attention with its call's further arguments."""

    def __init__(self, how: dict[str, Any], call: dict[str, Any]) -> None:
        super().__init__()
        self.attention, self.call = nn.MultiheadAttention(8, 2, **how), call

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.attention(q, k, v, **self.call)


MASK = torch.triu(torch.ones(5, 5, dtype=torch.bool), diagonal=1)
PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "plain": ({}, {}, (5, 2)),
    "batch first": ({"batch_first": True}, {}, (2, 5)),
    "not batched": ({}, {}, (5,)),
    "no weights": ({"batch_first": True}, {"need_weights": False}, (2, 5)),
    "weights by head": ({}, {"average_attn_weights": False}, (5, 2)),
    "without bias": ({"bias": False}, {}, (5, 2)),
    "bias of k and v": ({"add_bias_kv": True}, {}, (5, 2)),
    "zero attention": ({"add_zero_attn": True}, {"need_weights": False}, (5, 2)),
    "other widths": ({"kdim": 6, "vdim": 7}, {}, (5, 2)),
    "other widths, biased": ({"kdim": 6, "vdim": 7, "add_bias_kv": True, "batch_first": True}, {}, (2, 5)),
    "masked": ({"batch_first": True}, {"attn_mask": MASK, "need_weights": False}, (2, 5)),
    "causal": ({}, {"attn_mask": MASK, "is_causal": True, "need_weights": False}, (5, 2)),
    "padded": ({"batch_first": True}, {"key_padding_mask": PADDING}, (2, 5)),
    "dropout": ({"dropout": 0.5}, {}, (5, 2)),
}


def inputs(how: dict[str, Any], shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    widths = (8, how.get("kdim", 8), how.get("vdim", 8))
    q, k, v = (torch.randn(*shape, n, dtype=torch.float64) for n in widths)
    return q, k, v


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_multi_head_attention(name: str) -> None:
    torch.manual_seed(0)
    how, call, shape = VARIANTS[name]
    model, given = Attention(how, call).double(), inputs(how, shape)
    wanted = {n for n, p in model.named_parameters() if p.dim() == 2}
    base = run(model, *given)
    lora_fx.inject(model, EVERYTHING, given, seed=0)
    assert {d.name for d in lora_fx.audit(model).rows if d.action == "adapt"} == wanted
    randomise(model)
    assert distance(run(model, *given), base) > 1e-3
    check(model, *given)


@pytest.mark.parametrize("name", ["batch first", "no weights", "other widths"])
def test_self_attention_by_itself(name: str) -> None:
    """One tensor as query, key and value: what torch's fast path wants."""
    how, call, _ = VARIANTS[name]
    how = {**how, "kdim": None, "vdim": None}

    class Self(Attention):
        def forward(self, x: Tensor) -> Any:
            return self.attention(x, x, x, **self.call)

    model, x = Self(how, call).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    lora_fx.inject(model, EVERYTHING, x, seed=0)
    randomise(model)
    check(model, x)


def encoder(**how: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **how)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8))


class Decoder(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True, **how)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)


TRANSFORMERS: dict[str, Any] = {
    "encoder": (encoder, 1),
    "encoder, gelu": (lambda: encoder(activation="gelu", norm_first=True), 1),
    "encoder, without bias": (lambda: encoder(bias=False, dropout=0.0), 1),
    "decoder": (Decoder, 2),
    "decoder, norm first": (lambda: Decoder(norm_first=True, activation="gelu"), 2),
    "both": (lambda: nn.Transformer(8, 2, 1, 1, 12, batch_first=True), 2),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transformers(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, count = TRANSFORMERS[name]
    model, given = make().to(dtype), tuple(torch.randn(2, 5, 8, dtype=dtype) for _ in range(count))
    wanted = {n for n, p in model.named_parameters() if p.dim() == 2}
    lora_fx.inject(model, EVERYTHING, given, seed=0)
    assert {d.name for d in lora_fx.audit(model).rows if d.action == "adapt"} == wanted
    randomise(model)
    check(model, *given)


class Fast(TorchDispatchMode):
    """Notes which of the fused operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= {func.overloadpacket.__name__} & FAST
        return func(*args, **(kwargs or {}))


def fast_ops(model: nn.Module, *given: Any, **named: Any) -> tuple[set[str], Tensor]:
    with torch.no_grad(), Fast() as fast:
        output = model(*given, **named)
    return fast.seen, output


@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_an_encoder_reads_effective_weights(padded: bool) -> None:
    torch.manual_seed(0)
    model, x = encoder().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    named = {"src_key_padding_mask": PADDING} if padded else {}
    expected, base = fast_ops(model, x, **named)
    assert expected == {"_transformer_encoder_layer_fwd"}
    lora_fx.inject(model, EVERYTHING, ((x,), named), seed=0)
    assert torch.equal(fast_ops(model, x, **named)[1], base)
    randomise(model)
    seen, found = fast_ops(model, x, **named)
    assert seen == expected
    with lora_fx.folded(model):
        seen, wanted = fast_ops(model, x, **named)
    assert seen == expected
    assert distance(found, wanted) < 1e-12
    assert distance(found, base) > 1e-3


def test_the_fast_path_of_attention_reads_effective_weights() -> None:
    model, x = nn.MultiheadAttention(8, 2, batch_first=True).double().eval(), torch.randn(2, 5, 8).double()
    lora_fx.inject(model, EVERYTHING, (x, x, x), seed=0)
    randomise(model)
    seen, (found, _) = fast_ops(model, x, x, x)
    assert seen == {"_native_multi_head_attention"}
    with lora_fx.folded(model):
        assert distance(found, model(x, x, x)[0]) < 1e-12
