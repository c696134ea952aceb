"""Small models of many attention architectures, with the sizes that the written truth speaks of.

Transformers models have width 32, 4 heads of 8 (2 key heads where grouped), feed-forward width 48 and
two layers unless said otherwise; timm models are their smallest variant, cut down where they allow it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any] | tuple[Tensor, ...]]
Builder = Callable[[], Built]

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN: dict[str, Any] = {
    **_TOKENS,
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "image_size": 32,
    "patch_size": 8,
}
TWO_SIDED: dict[str, Any] = {
    **_TOKENS,
    "vocab_size": 99,
    "d_model": 32,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
}
GPT2: dict[str, Any] = {
    "vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
WAVE: dict[str, Any] = {
    **PLAIN,
    "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
MLA: dict[str, Any] = {
    **PLAIN,
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 12, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
RESNET = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
        "out_features": ["stage2"],
    },
}  # fmt: skip


def ids(batch: int = 2, length: int = 8) -> Tensor:
    """Token ids."""
    return torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def normal(*shape: int) -> Tensor:
    """Random values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def text() -> dict[str, Tensor]:
    """One sequence of tokens."""
    return {"input_ids": ids()}


def pair() -> dict[str, Tensor]:
    """A source and a target sequence."""
    return {"input_ids": ids(), "decoder_input_ids": ids()}


def image(size: int = 32, batch: int = 2) -> dict[str, Tensor]:
    """A batch of images."""
    return {"pixel_values": normal(batch, 3, size, size)}


def hf(model: str, config: str, inputs: Callable[[], dict[str, Tensor]], **fields: Any) -> Builder:
    """Return a builder of a transformers model."""

    def build() -> Built:
        import transformers

        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**fields))
        return made.eval(), inputs()

    return build


def lm(name: str, **fields: Any) -> Builder:
    """Return a builder of a transformers decoder with grouped queries and PLAIN's sizes."""
    return hf(f"{name}ForCausalLM", f"{name}Config", text, **{**PLAIN, "num_key_value_heads": 2, **fields})


def vit(name: str, size: int | None = None, **fields: Any) -> Builder:
    """Return a builder of a timm model."""

    def build() -> Built:
        import timm

        torch.manual_seed(0)
        if fields.get("block_fn") == "parallel":
            fields["block_fn"] = timm.models.vision_transformer.ParallelScalingBlock
        made = timm.create_model(name, num_classes=5, **fields)
        side = size or made.default_cfg["input_size"][-1]
        return made.eval(), (normal(2, 3, side, side),)

    return build


SMALL_VIT: Mapping[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 4}
SMALL_SWIN: Mapping[str, Any] = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
