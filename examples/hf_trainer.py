"""Hugging Face's Trainer: a small language model learns to count backwards, by adapters on q and v.

Checkpoints hold the adapters alone; the best one is loaded at the end, and ``generate`` uses it. Run it
with ``python examples/hf_trainer.py``; it needs transformers and accelerate, and no download.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import lora_fx
from lora_fx.trainer import AdapterTrainer

OUT = Path("artifacts/hf_trainer")
WORDS, LENGTH = 32, 12


def sentences(step: int, count: int) -> list[dict[str, Tensor]]:
    """Count up (step 1) or down (step -1) from a random number, around the end."""
    starts = torch.randint(WORDS, (count, 1), generator=torch.Generator().manual_seed(step % 7))
    words = (starts + step * torch.arange(LENGTH)) % WORDS
    return [{"input_ids": row, "labels": row} for row in words]


def pretrained() -> LlamaForCausalLM:
    """Return a model that counts upwards; a real one would come from ``from_pretrained``."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    words = torch.stack([s["input_ids"] for s in sentences(1, 64)])
    for _ in range(120):
        model(input_ids=words, labels=words).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def counted(model: LlamaForCausalLM) -> list[int]:
    """Continue 20, 19, 18."""
    words = torch.tensor([[20, 19, 18]])
    made = model.generate(words, attention_mask=torch.ones_like(words), max_new_tokens=6, do_sample=False)
    return made[0].tolist()


def main() -> None:
    model = pretrained()
    before = counted(model)
    policy = lora_fx.Policy(
        lora_fx.Rule(role="qv", rank=8), lora_fx.Rule(role=("up", "gate", "down"), rank=8)
    )
    lora_fx.inject(model, policy, {"input_ids": torch.arange(LENGTH).unsqueeze(0)}, seed=0)
    args = TrainingArguments(
        output_dir=str(OUT),
        max_steps=120,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=40,
        save_steps=40,
        load_best_model_at_end=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    data = sentences(-1, 64)
    trainer = AdapterTrainer(model, args, train_dataset=data, eval_dataset=data[:16])
    trainer.train()
    print(lora_fx.audit(model))
    print("before:", before, "after:", counted(model))
    with lora_fx.disable_adapter(model):
        print("adapter off:", counted(model))
    best = Path(str(trainer.state.best_model_checkpoint))
    for file in sorted(best.iterdir()):
        print(f"{file.stat().st_size:>10,}  {file}")


if __name__ == "__main__":
    main()
