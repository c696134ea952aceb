"""What models of several kinds of input need beside the general rules: ``hints.py``, continued."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

IMAGE, SOUND = 99, 98
"""The tokens that stand for a part of an image and of a sound."""
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
    ids = torch.cat([torch.randint(3, 97, (2, 5)), *stood], dim=1)
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
            **worded((IMAGE, GRID * GRID // 4), (SOUND, tokens)),
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
            "image_token_index": IMAGE,
            "audio_token_index": SOUND,
            "text_config.rope_parameters": _ROPE,
            "vision_config.fullatt_block_indexes": [1],
        },
        "inputs": _heard(16, 4),
    },
    "qwen3_omni_moe_thinker": {
        "config": {
            "image_token_id": IMAGE,
            "audio_token_id": SOUND,
            "text_config.rope_parameters": _ROPE,
            "vision_config.deepstack_visual_indexes": [0],
            "vision_config.num_position_embeddings": 16,
        },
        "inputs": _heard(16, 2),
    },
    "qwen3_asr_encoder": {
        "config": {"n_window": 8, "n_window_infer": 16},
        "inputs": lambda config: {
            "input_features": torch.randn(2, config.num_mel_bins, 32),
            "input_features_mask": torch.ones(2, 32, dtype=torch.long),
        },
    },
    "video_llama_3_vision": {
        "inputs": lambda config: {
            "pixel_values": patches(config),
            "grid_thw": torch.tensor([[1, GRID, GRID]] * 2),
            "merge_sizes": torch.tensor([2, 2]),
        },
    },
}
