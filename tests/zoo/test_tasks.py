"""One model of each task in which LoRA is used goes the whole way: train, save, load, export, certify."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import lora_fx
from lora_fx.passes.slopes import float_leaves
from tests.zoo.catalogue import build
from tests.zoo.measure import outputs_of, same

TASKS = {
    "image classification, attention": "transformers/vit",
    "image classification, convolutions": "transformers/convnext",
    "semantic segmentation": "transformers/segformer",
    "semantic segmentation, pyramid": "transformers/upernet",
    "detection": "transformers/detr",
    "instance segmentation": "transformers/mask2former",
    "language, fused attention": "transformers/gpt2",
    "language, rotary": "transformers/llama",
    "encoder": "transformers/roberta",
    "encoder, relative attention": "transformers/deberta-v2",
    "visual question answering": "transformers/blip",
    "vision-language model": "transformers/paligemma",
    "speech to text": "transformers/whisper",
    "speech": "transformers/wav2vec2",
    "diffusion, convolutions": "diffusers/UNet2DConditionModel",
    "diffusion, transformer": "diffusers/DiTTransformer2DModel",
}


@pytest.mark.zoo_full
@pytest.mark.parametrize("task", TASKS)
def test_whole_way(task: str, tmp_path: Path) -> None:
    if TASKS[task].startswith("diffusers/"):
        pytest.importorskip("diffusers")
    model, inputs = build(TASKS[task])
    base = copy.deepcopy(model)
    lora_fx.inject(model, lora_fx.Policy(lora_fx.Rule(rank=4)), inputs, seed=0)
    losses = train(model, inputs)
    assert losses[-1] < losses[0], losses
    lora_fx.save_adapter(model, tmp_path / "task.safetensors")
    loaded = lora_fx.load_adapter(copy.deepcopy(base), tmp_path / "task.safetensors", trainable=True)
    with torch.no_grad():
        assert same(outputs_of(loaded, inputs), outputs_of(model, inputs))
    certificate = lora_fx.export_onnx(model, tmp_path / "task.onnx", inputs)
    certificate.raise_for_failure()


def train(model: torch.nn.Module, inputs: dict[str, object], steps: int = 6) -> list[float]:
    """Draw every output towards one a little beside it, for a few steps; return the losses."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        wanted = [o + 0.3 * torch.randn(o.shape, generator=generator) for o in float_leaves(model(**inputs))]
    optimiser = torch.optim.Adam(lora_fx.parameters(model), lr=1e-5)
    losses: list[float] = []
    for _ in range(steps):
        found = float_leaves(model(**inputs))
        pairs = [(o, w) for o, w in zip(found, wanted, strict=True) if o.requires_grad]
        loss = torch.stack([(o - w).square().mean() for o, w in pairs]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses
