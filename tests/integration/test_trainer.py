"""Hugging Face's Trainer on an injected causal language model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import Policy, Rule
from tests.integration.small import with_values

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

WORDS = 64
POLICY = Policy(Rule(role="qv", rank=4, dropout=0.1), Rule(module="embed_tokens", rank=2))
INPUTS = {"input_ids": torch.arange(12).view(2, 6)}


def base() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def adapted() -> Any:
    return lora_fx.inject(base(), POLICY, INPUTS, seed=1)


def sentence(number: int) -> dict[str, Tensor]:
    words = torch.randint(WORDS, (8,), generator=torch.Generator().manual_seed(number))
    return {"input_ids": words, "labels": words}


DATA = [sentence(n) for n in range(16)]


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    from lora_fx.trainer import AdapterTrainer

    args = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=1e-2,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **options,
    )
    return AdapterTrainer(model, args, train_dataset=DATA, eval_dataset=DATA[:4])


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_checkpoints_hold_adapters_alone_and_resume_bit_for_bit(tmp_path: Path) -> None:
    whole = adapted()
    trainer(whole, tmp_path / "whole").train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    weights = {p.name for p in checkpoint.iterdir() if p.suffix in {".safetensors", ".bin"}}
    assert weights == {"lora_fx_default.safetensors", "training_args.bin"}
    resumed = adapted()
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    assert states_equal(whole, resumed)
    alone = lora_fx.load_adapter(base(), checkpoint / "lora_fx_default.safetensors")
    assert not torch.equal(lora_fx.parameters(alone)[0], lora_fx.parameters(whole)[0])


def test_a_model_without_adapters_is_not_trained(tmp_path: Path) -> None:
    model = lora_fx.unload(adapted())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lora_fx.AdapterNameError, match="without"):
        trainer(model, tmp_path).train()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_checkpoint_of_the_stock_trainer_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    args = trainer(adapted(), tmp_path).args
    args.max_steps, args.save_steps = 2, 1
    policy = Policy(Rule(role="qv", rank=4, dropout=0.1))
    stock, model = (lora_fx.inject(base(), policy, INPUTS, seed=1) for _ in range(2))
    transformers.Trainer(stock, args, train_dataset=DATA, eval_dataset=DATA[:2]).train()
    folder = tmp_path / "checkpoint-1"
    told = (
        r"lora_fx_default.*a stock Trainer's, of the whole model \(model\.safetensors\).*save_adapter\(model"
    )
    with pytest.raises(lora_fx.errors.NoAdapterFileError, match=told):
        trainer(model, tmp_path / "resumed").train(resume_from_checkpoint=str(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    lora_fx.save_adapter(model, folder / "lora_fx_default.safetensors")
    args.output_dir = str(tmp_path / "resumed")
    from lora_fx.trainer import AdapterTrainer

    AdapterTrainer(model, args, train_dataset=DATA, eval_dataset=DATA[:2]).train(
        resume_from_checkpoint=str(folder)
    )
    assert all(
        torch.equal(p, q) for p, q in zip(lora_fx.parameters(model), lora_fx.parameters(stock), strict=True)
    )


def test_a_checkpoint_of_another_adapter_is_named(tmp_path: Path) -> None:
    trainer(adapted(), tmp_path).train()
    model = lora_fx.inject(base(), POLICY, INPUTS, adapter="other", seed=1)
    told = r"lora_fx_other.*one of lora_fx_default\.safetensors.*Inject under the name"
    with pytest.raises(lora_fx.errors.NoAdapterFileError, match=told):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("first", [True, False])
def test_an_optimiser_made_before_inject_is_told(tmp_path: Path, first: bool) -> None:
    from lora_fx.trainer import AdapterTrainer

    model = base()
    early = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lora_fx.inject(model, POLICY, INPUTS, seed=1)
    optimiser = early if first else torch.optim.AdamW(lora_fx.parameters(model), lr=1e-2)
    args = trainer(model, tmp_path).args
    args.max_steps = 1
    run = AdapterTrainer(model, args, train_dataset=DATA, eval_dataset=DATA[:2], optimizers=(optimiser, None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
        lora_fx.save_adapter(model, tmp_path / "a.safetensors")
    told = [str(w.message) for w in caught if "lora_fx.parameters(model)" in str(w.message)]
    assert any("the optimiser holds none of the" in text for text in told) is first
    assert any("changes no weight" in text for text in told) is first


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = adapted()
    # The "best" is the one of the greatest loss: the first, so that loading it shows.
    run = trainer(
        model, tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    kept = lora_fx.load_adapter(base(), best / "lora_fx_default.safetensors")
    last = lora_fx.load_adapter(base(), tmp_path / "checkpoint-6" / "lora_fx_default.safetensors")
    pairs = list(zip(lora_fx.parameters(model), lora_fx.parameters(kept), strict=True))
    assert all(torch.equal(p, q) and p.requires_grad for p, q in pairs)
    assert not torch.equal(lora_fx.parameters(last)[0], lora_fx.parameters(kept)[0])


def test_an_injected_language_model_generates_as_its_folded_self() -> None:
    model = adapted().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    words = torch.arange(6).view(1, 6)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(words)}
    made = model.generate(words, **options)
    with lora_fx.folded(model):
        assert torch.equal(model.generate(words, **options), made)
    with lora_fx.disable_adapter(model):
        assert not torch.equal(model.generate(words, **options), made)


def test_generation_through_hooks_that_place_each_layer() -> None:
    accelerate = pytest.importorskip("accelerate")
    words = torch.arange(6).view(1, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(words)}
    plain = with_values(adapted()).eval().generate(words, **options)
    parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    places = {**{f"model.{part}": "cpu" for part in parts}, "lm_head": "cpu"}
    for inject_first in (True, False):
        model = adapted() if inject_first else base()
        accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
        if not inject_first:
            lora_fx.inject(model, POLICY, INPUTS, seed=1)
        assert hasattr(model.model.layers[0], "_hf_hook")
        assert torch.equal(with_values(model).eval().generate(words, **options), plain)
        with torch.no_grad():
            logits = model(words).logits
            with lora_fx.disable_adapter(model):
                assert not torch.allclose(model(words).logits, logits)
            with lora_fx.folded(model):
                torch.testing.assert_close(model(words).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_over_frozen_embeddings(reentrant: bool) -> None:
    words = torch.stack([each["input_ids"] for each in DATA[:4]])
    policy = Policy(Rule(role="qv", rank=4))
    models = [with_values(lora_fx.inject(base(), policy, INPUTS, seed=1)).train() for _ in range(2)]
    models[1].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for model in models:
        model(input_ids=words, labels=words).loss.backward()
    for p, q in zip(*(lora_fx.parameters(model) for model in models), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
