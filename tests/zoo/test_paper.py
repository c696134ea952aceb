"""The trainable parameters that Hu et al. 2021 count, from the models themselves, on the meta device.

L layers of width d, matrices of rank r:  2 * d * r for each, so 4 * L * d * r for query and value
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.passes.trace import Trace
from lora_fx.policy import Policy

XXL = {
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "conv_kernel_size": 3,
}


def encoder(layers: int, width: int, kind: str = "Roberta", **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
        config = getattr(transformers, f"{kind}Config")(num_attention_heads=width // 64, **sizes, **more)
        return getattr(transformers, f"{kind}Model")(config)  # type: ignore[no-any-return]

    return build


def decoder(layers: int, width: int, heads: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
        return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]

    return build


MODELS: dict[str, tuple[int, int, Callable[[], nn.Module]]] = {
    "RoBERTa base": (12, 768, encoder(12, 768)),
    "RoBERTa large": (24, 1024, encoder(24, 1024)),
    "DeBERTa XXL": (48, 1536, encoder(48, 1536, "DebertaV2", **XXL)),
    "GPT-2 medium": (24, 1024, decoder(24, 1024, 16)),
    "GPT-2 large": (36, 1280, decoder(36, 1280, 20)),
    "GPT-3 175B": (96, 12288, decoder(96, 12288, 96)),
}


@cache
def traced(name: str) -> Trace:
    with torch.device("meta"):
        model = MODELS[name][2]().eval()
    inputs = {"input_ids": torch.randint(3, 99, (2, 8))}
    if name.startswith("DeBERTa"):
        inputs["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
    return lora_fx.trace(model, inputs)


FIGURES: list[tuple[str, Policy, int]] = [
    ("RoBERTa base", Policy.paper(8), 294_912),
    ("RoBERTa large", Policy.paper(8), 786_432),
    ("DeBERTa XXL", Policy.paper(16), 4_718_592),
    ("GPT-2 medium", Policy.paper(4), 393_216),
    ("GPT-2 large", Policy.paper(4), 737_280),
    ("GPT-3 175B", Policy.paper(1), 4_718_592),
    ("GPT-3 175B", Policy.paper(8), 37_748_736),
    ("GPT-3 175B", Policy.attention(4), 37_748_736),
    ("GPT-3 175B", Policy.paper(64), 301_989_888),
    ("GPT-3 175B", Policy.attention(64), 603_979_776),
]
QUICK = {"RoBERTa base", "GPT-2 medium"}


@pytest.mark.parametrize(
    ("name", "policy", "expected"),
    [
        pytest.param(*figure, marks=pytest.mark.zoo if figure[0] in QUICK else pytest.mark.zoo_full)
        for figure in FIGURES
    ],
)
def test_presets_train_what_the_paper_counts(name: str, policy: Policy, expected: int) -> None:
    layers, width, _ = MODELS[name]
    made = lora_fx.plan(traced(name), policy)
    roles = policy.rules[0].roles
    ranks = {part.rank for decision in made.adapted for part in decision.parts}
    assert made.parameters == expected == 2 * layers * len(roles) * width * ranks.pop()
    assert not ranks
    assert {decision.site.block for decision in made.adapted} == {(i, layers) for i in range(layers)}
