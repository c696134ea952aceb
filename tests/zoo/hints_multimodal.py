"""What models of several kinds of input need beside the general rules: ``hints.py``, continued."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

IMAGE, SOUND, SEEN, SAID = 99, 98, 97, 96
"""The tokens that stand for a part of an image and of a sound, and those after which each starts."""
GRID = 4
"""Patches in height and in width of an image."""


def patches(vision: Any, images: int = 2) -> torch.Tensor:
    """Return images as one sequence of patches, each laid flat with its frames."""
    channels = getattr(vision, "in_channels", None) or vision.num_channels
    frames = getattr(vision, "temporal_patch_size", None) or 1
    return torch.randn(images * GRID * GRID, channels * frames * vision.patch_size**2)


def worded(*tokens: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return words of two texts, then so many of each of these tokens."""
    stood = [torch.full((2, count), token) for token, count in tokens]
    ids = torch.cat([torch.randint(3, 90, (2, 5)), *stood], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _looked(*, merged: int = 4, kinds: bool = True) -> Callable[[Any], dict[str, Any]]:
    """Return the maker of an image and a text about it; ``merged`` patches become one token."""

    def make(config: Any) -> dict[str, Any]:
        text = worded((IMAGE, GRID * GRID // merged))
        told = {"mm_token_type_ids": (text["input_ids"] == IMAGE).long()} if kinds else {}
        return {
            **text,
            **told,
            "pixel_values": patches(config.vision_config),
            "image_grid_thw": torch.tensor([[1, GRID, GRID]] * 2),
        }

    return make


_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_LOOKS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "text_config.rope_parameters": _ROPE,
}


def _heard(frames: int, tokens: int) -> Callable[[Any], dict[str, Any]]:
    """Return the maker of an image, a sound and a text about both."""

    def make(config: Any) -> dict[str, Any]:
        return {
            **worded((SEEN, 1), (IMAGE, GRID * GRID // 4), (95, 1), (SAID, 1), (SOUND, tokens), (94, 1)),
            "pixel_values": patches(config.vision_config),
            "image_grid_thw": torch.tensor([[1, GRID, GRID]] * 2),
            "input_features": torch.randn(2, config.audio_config.num_mel_bins, frames),
            "feature_attention_mask": torch.ones(2, frames, dtype=torch.long),
        }

    return make


MULTIMODAL_HINTS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"config": _LOOKS, "inputs": _looked()},
    "qwen2_5_vl": {
        "config": {**_LOOKS, "vision_config.fullatt_block_indexes": [1]},
        "inputs": _looked(),
    },
    "qwen2_5_omni_thinker": {
        "config": {
            "image_token_id": IMAGE,
            "audio_token_id": SOUND,
            "vision_start_token_id": SEEN,
            "audio_start_token_id": SAID,
            "text_config.rope_parameters": _ROPE,
            "vision_config.fullatt_block_indexes": [1],
        },
        "inputs": _heard(16, 4),
    },
    "qwen3_omni_moe_thinker": {
        "config": {
            "image_token_id": IMAGE,
            "audio_token_id": SOUND,
            "vision_start_token_id": SEEN,
            "audio_start_token_id": SAID,
            "text_config.rope_parameters": _ROPE,
            "vision_config.deepstack_visual_indexes": [0],
            "vision_config.num_position_embeddings": 16,
        },
        "inputs": _heard(16, 2),
    },
    "qwen3_asr_encoder": {
        "inputs": lambda config: {
            "input_features": torch.randn(2, config.num_mel_bins, 100),
            "input_features_mask": torch.ones(2, 100, dtype=torch.long),
        },
    },
    "paddleocr_vl": {
        "config": {**_LOOKS, "vision_config.image_size": 56},
        "inputs": lambda config: {
            **_looked()(config),
            "pixel_values": torch.randn(2 * GRID * GRID, 3, 14, 14),
        },
    },
    "hunyuan_vl_text": {"config": {"rope_parameters": _ROPE}},
    "hunyuan_vl": {"config": {"text_config.rope_parameters": _ROPE}},
    "kimi_k25_vision": {
        "config": {"pos_emb_height": 8, "pos_emb_width": 8},
        "inputs": lambda config: {
            "pixel_values": torch.randn(2 * GRID * GRID, 3, config.patch_size, config.patch_size),
            "grid_thw": torch.tensor([[1, GRID, GRID]] * 2),
        },
    },
    "minicpmv4_7_vision": {
        "config": {"image_size": 56},
        "inputs": lambda config: {
            "pixel_values": torch.randn(1, 3, config.patch_size, 2 * GRID * GRID * config.patch_size),
            "target_sizes": torch.tensor([[GRID, GRID]] * 2),
        },
    },
    "muse_spark_vision": {
        "inputs": lambda _: {
            "pixel_values": torch.randn(32, 1176),
            "grid_thw": torch.tensor([[1, GRID, GRID]] * 2),
        },
    },
    "muse_glimmer_vision": {
        "config": {"pos_emb_height": 8, "pos_emb_width": 8},
        "inputs": lambda config: {
            "pixel_values": torch.randn(32, config.patch_temporal * 3 * config.patch_size**2),
            "grid_thw": torch.tensor([[1, GRID, GRID]] * 2),
        },
    },
    "voxtral_realtime": {
        "inputs": lambda config: {
            "input_ids": torch.randint(3, 90, (2, 8)),
            "input_features": torch.randn(2, config.audio_config.num_mel_bins, 64),
        }
    },
    "ernie4_5_vl_moe": {
        "config": {
            "image_token_id": IMAGE,
            "text_config.rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]},
            "text_config.moe_k": 2,
        },
        "inputs": _looked(),
    },
    "gemma4_vision": {
        "config": {"position_embedding_size": 16, "pooling_kernel_size": 2},
        "inputs": lambda config: {
            "pixel_values": torch.rand(2, GRID * GRID, 3 * config.patch_size**2),
            "pixel_position_ids": torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).repeat(
                2, 1, 1
            ),
        },
    },
    "pi0": {
        "config": {
            "chunk_size": 4,
            "max_state_dim": 8,
            "max_action_dim": 8,
            "vlm_config.image_token_id": IMAGE,
            "vlm_config.image_token_index": IMAGE,
            "vlm_config.vision_config.patch_size": 8,
            "vlm_config.text_config.head_dim": 16,
            "dit_config.head_dim": 16,
        },
        "inputs": lambda config: {
            **worded((IMAGE, 16)),
            "pixel_values": torch.randn(2, 1, 3, 32, 32),
            "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
            "state": torch.randn(2, config.max_state_dim),
            "noise": torch.randn(2, config.chunk_size, config.max_action_dim),
            "timestep": torch.rand(2),
        },
    },
    "idefics": {
        "config": {"alpha_initializer": "ones"},
        "frames": (2,),
        "also": ("pixel_values",),
        "inputs": lambda _: {"image_attention_mask": torch.ones(2, 9, 2, dtype=torch.long)},
    },
    "oneformer": {
        "main": "pixel_values",
        "inputs": lambda config: {"task_inputs": torch.randint(3, 100, (2, config.task_seq_len))},
    },
    "bridgetower": {
        "config": {
            "hidden_size": 64,
            "text_config.hidden_size": 64,
            "vision_config.hidden_size": 64,
        },
        "also": ("pixel_values", "input_ids"),
    },
    "chameleon": {
        "config": {
            "vocabulary_map": {"<image>": IMAGE},
            "vq_config.resolution": 32,
            "vq_config.channel_multiplier": [1, 1],
        }
    },
    "emu3": {"config": {"pad_token_id": 0, "vocabulary_map": {"<image>": IMAGE}}},
    "vision-text-dual-encoder": {
        "config": {"vision_config.pooler_output_size": 32},
        "also": ("pixel_values", "input_ids"),
    },
    "video_llama_3_vision": {
        "inputs": lambda config: {
            "pixel_values": patches(config),
            "grid_thw": torch.tensor([[1, GRID, GRID]] * 2),
            "merge_sizes": torch.tensor([2, 2]),
        },
    },
}
