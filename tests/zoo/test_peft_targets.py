"""``Policy.from_peft`` on real models: the weights, ranks and scales that peft itself selects there."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import pytest
from torch import nn

import lora_fx
from lora_fx.passes.trace import Trace
from lora_fx.policy import Policy
from tests.unit.test_peft_config import theirs
from tests.zoo.roles_table import all_truths

peft = pytest.importorskip("peft", exc_type=ImportError)
pytestmark = pytest.mark.zoo

BERT, GPT2, LLAMA = "bert, eager, classifier", "gpt2 (Conv1D)", "llama"
SELECTIONS: list[tuple[str, dict[str, Any]]] = [
    (BERT, {"target_modules": ["query", "value"]}),
    (BERT, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    (BERT, {"target_modules": r".*\.attention\..*(query|key|dense)"}),
    (
        BERT,
        {
            "target_modules": ["query", "dense"],
            "exclude_modules": ["pooler.dense"],
            "layers_to_transform": [1],
        },
    ),
    (
        BERT,
        {
            "target_modules": ["query", "key"],
            "rank_pattern": {"layer.1.attention.self.query": 4, "key": 3},
            "alpha_pattern": {"query": 9},
            "use_rslora": True,
        },
    ),
    (BERT, {"target_modules": ["query", "word_embeddings"], "use_dora": True}),
    (BERT, {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"}),
    (BERT, {"target_modules": ["query"], "bias": "all"}),
    (GPT2, {"target_modules": ["c_attn", "c_proj"], "layers_to_transform": 0, "layers_pattern": "h"}),
    (GPT2, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    (LLAMA, {"target_modules": "all-linear"}),
    (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    (
        LLAMA,
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {r"layers\.0\..*": 5, "^model.layers.1.self_attn.q_proj": 7},
        },
    ),
    ("t5", {"target_modules": ["q", "wi", "wo"], "exclude_modules": r".*decoder.*"}),
    ("t5", {"target_modules": "all-linear"}),
    ("whisper", {"target_modules": ["q_proj", "v_proj", "conv1"]}),
    ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    ("resnet", {"target_modules": r"layer[34].*conv\d"}),
    ("vit", {"target_modules": ["attn.proj", "patch_embed.proj", "fc1"]}),
    ("swin v2 (cosine)", {"target_modules": ["qkv"], "layers_to_transform": [1], "layers_pattern": "blocks"}),
]  # fmt: skip


@cache
def built(name: str) -> Trace:
    model, inputs = {truth.name: truth.build for _, truth in all_truths()}[name]()
    return lora_fx.trace(model, inputs)


def trained_by_peft(config: Any, model: nn.Module) -> set[str]:
    """Return what peft trains in full, by the name that it has in the model."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    named = {n for n, p in wrapped.named_parameters() if p.requires_grad and "lora_" not in n}
    for piece in ("base_model.model.", ".base_layer", ".modules_to_save.default"):
        named = {name.replace(piece, "", 1) for name in named}
    return named


@pytest.mark.parametrize(("name", "fields"), SELECTIONS)
def test_peft_selects_the_same(name: str, fields: dict[str, Any]) -> None:
    traced = built(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, lora_alpha=6, fan_in_fan_out=name == GPT2, **fields)
        made = lora_fx.plan(traced, Policy.from_peft(config))
        expected = theirs(config, traced.model)
        assert {d.name: (d.rank, d.scale) for d in made.adapted} == expected != {}
        if {"modules_to_save", "bias", "task_type"} & set(fields):
            found = {d.name for d in made.trained} | {extra.name for extra in made.extras}
            assert found == trained_by_peft(config, traced.model)
