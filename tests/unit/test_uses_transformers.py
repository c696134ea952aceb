"""What transformers does to a model's weights after inject: it acts on W0, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from tests.by_hand import branched, randomise, run

transformers = pytest.importorskip("transformers")

EVERYTHING = lora_fx.Policy(lora_fx.Rule(rank=2))
IDS = {"input_ids": torch.arange(1, 11).reshape(2, 5)}
SIZES = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(params=sorted(SIZES))
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    tokens = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(
        request.param, **SIZES[request.param], **tokens, initializer_range=0.3
    )
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    lora_fx.inject(made, EVERYTHING, IDS, seed=0)
    randomise(made)
    return made


def tied(model: Any) -> bool:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = ("weight", "lora_A__weight__default", "lora_B__weight__default")
    return all(ends[0]._parameters[n] is ends[1]._parameters[n] for n in names)


def logits(model: Any) -> torch.Tensor:
    return run(model, **IDS).logits.detach()


def test_embedding_and_head_are_branches_of_one_adapter(model: Any) -> None:
    assert tied(model)
    assert {"lm_head.weight"} < branched(model)
    assert any("wte" in name or "embed_tokens" in name for name in branched(model))
    lora_fx.verify(model, IDS).raise_for_failure()


@pytest.mark.parametrize("method", ["tie_weights", "init_weights", "post_init"])
def test_ties_and_initialisation_leave_the_function_alone(model: Any, method: str) -> None:
    wanted = logits(model)
    getattr(model, method)()
    assert tied(model)
    assert torch.equal(logits(model), wanted)


def test_resizing_is_refused_and_works_after_unload(model: Any) -> None:
    wanted = logits(model)
    with pytest.raises(lora_fx.WeightWriteError, match="unload"):
        model.resize_token_embeddings(40)
    assert torch.equal(logits(model), wanted)
    lora_fx.unload(model)
    model.resize_token_embeddings(40)
    lora_fx.inject(model, EVERYTHING, IDS, seed=0)
    assert logits(model).shape[-1] == 40


def test_embeddings_without_adapters_can_be_resized() -> None:
    config = transformers.AutoConfig.for_model("gpt2", **SIZES["gpt2"], vocab_size=32, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    lora_fx.inject(model, lora_fx.Policy.paper(2), IDS, seed=0)
    model.resize_token_embeddings(40)
    assert logits(model).shape[-1] == 40


def test_generation_with_and_without_a_cache(model: Any) -> None:
    how = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS["input_ids"])}
    found = [model.generate(**IDS, **how, use_cache=cache) for cache in (True, False)]
    with lora_fx.folded(model):
        found.append(model.generate(**IDS, **how))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model: Any, reentrant: bool) -> None:
    model.train()
    gradients = []
    for on in (True, False):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        else:
            model.gradient_checkpointing_disable()
        model.zero_grad()
        torch.manual_seed(0)
        model(**IDS, labels=IDS["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in lora_fx.parameters(model)])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    lora_fx.verify(model, IDS).raise_for_failure()


def test_a_folded_model_is_saved_as_the_base_would_be(model: Any, tmp_path: Path) -> None:
    wanted = logits(model)
    with lora_fx.folded(model):
        model.save_pretrained(tmp_path)
    loaded = type(model).__mro__[1].from_pretrained(tmp_path).eval()
    assert isinstance(loaded, nn.Module)
    torch.testing.assert_close(logits(loaded), wanted)
    assert not any("lora_" in name for name in loaded.state_dict())


def test_parameters_by_name_are_the_base(model: Any) -> None:
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter
