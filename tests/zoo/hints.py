"""What single model types need beside the general rules: a plain table.

``config``: fields (``part.field`` for those of a part); ``head``: the class to take; the other keys are
read by ``inputs.dummy_inputs``. A type with ``skip`` cannot be built here, and the text says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.zoo.hints_language import LANGUAGE_HINTS
from tests.zoo.hints_multimodal import MULTIMODAL_HINTS
from tests.zoo.hints_series import SERIES_HINTS
from tests.zoo.hints_vision import VISION_HINTS

_SERIES: dict[str, Any] = {
    "config": {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2, 3]},
    "inputs": lambda config: {
        "past_values": torch.randn(2, 15),
        "past_time_features": torch.randn(2, 15, config.num_time_features),
        "past_observed_mask": torch.ones(2, 15),
        "future_values": torch.randn(2, 4),
        "future_time_features": torch.randn(2, 4, config.num_time_features),
    },
}


def _rotary(sections: list[int], part: str = "") -> dict[str, Any]:
    """Return a hint of how many channels of half a head turn with time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    return {"config": {f"{part}rope_parameters": rope}}


_IMAGE = 99
"""The token that stands for a part of an image, where a configuration has none."""


def _asked(frames: int) -> Callable[[Any], dict[str, Any]]:
    """Return the maker of a question about an image: as many image tokens as the model has queries."""

    def make(config: Any) -> dict[str, Any]:
        words = torch.randint(3, _IMAGE - 1, (2, 5))
        ids = torch.cat([words, torch.full((2, frames * config.num_query_tokens), _IMAGE)], dim=1)
        question = {} if config.model_type == "blip-2" else {"qformer_input_ids": words}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **question}

    return make


def _patched(config: Any) -> dict[str, Any]:
    """Return an image as a sequence of its patches, their number in height and width beside it."""
    vision = getattr(config, "vision_config", config)
    return {
        "pixel_values": torch.randn(2, 16, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.full((2, 2), 4),
    }


_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_BACKBONE: dict[str, Any] = {
    "config": {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 16,
            "hidden_sizes": [16, 16, 32, 32],
            "depths": [1, 1, 1, 1],
            "out_features": ["stage4"],
        },
    }
}

HINTS: dict[str, dict[str, Any]] = {
    **VISION_HINTS,
    **LANGUAGE_HINTS,
    **SERIES_HINTS,
    **MULTIMODAL_HINTS,
    "swin": {"config": {"window_size": 2, "image_size": 64}},
    "swinv2": {"config": {"window_size": 2}},
    "codegen": {"config": {"n_head": 4, "rotary_dim": 4}},
    "gptj": {"config": {"rotary_dim": 8}},
    "audio-spectrogram-transformer": {
        "config": {"max_length": 64, "num_mel_bins": 32},
        "main": "input_values",
        "inputs": lambda _: {"input_values": torch.randn(2, 64, 32)},
    },
    "autoformer": _SERIES,
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "detr": {**_BACKBONE, "head": "DetrForObjectDetection"},
    "upernet": {
        "config": {
            "backbone": None,
            "backbone_config": {**_BACKBONE["config"]["backbone_config"], "out_features": _STAGES},
            "auxiliary_in_channels": 32,
        }
    },
    "conditional_detr": _BACKBONE,
    "dab-detr": _BACKBONE,
    "table-transformer": _BACKBONE,
    "deformable_detr": {
        "config": {**_BACKBONE["config"], "num_feature_levels": 1},
    },
    "textnet": {"image": 64},
    "univnet": {"mel": (4, 100)},
    **{
        name: _rotary([2, 3, 3], "text_config.")
        for name in ("glm46v", "glm4v", "glm_image", "glm_ocr", "glmga")
    },
    **{name: _rotary([2, 3, 3]) for name in ("glm4v_text", "glm_image_text", "glm_ocr_text")},
    "glm4v_moe": _rotary([1, 1, 2], "text_config."),
    "glm4v_moe_text": _rotary([1, 1, 2]),
    "vits": {"config": {"upsample_initial_channel": 32, "spectrogram_bins": 33}},
    "gemma3n_vision": {"config": {"architecture": "mobilenetv3_small_050"}},
    "mobilebert": {"config": {"embedding_size": 16}},  # its head's second part is of what is left of 32
    "flava": {"image": 32},
    "mamba2": {"config": {"num_heads": 4, "head_dim": 16, "hidden_size": 32, "expand": 2, "n_groups": 1}},
    "gpt_neo": {"config": {"attention_types": [[["global", "local"], 1]]}},
    "xmod": {"config": {"languages": ["en_XX"], "default_language": "en_XX"}},
    "bros": {"config": {"hidden_size": 64}, "inputs": lambda _: {"bbox": torch.rand(2, 9, 4)}},
    "vilt": {"also": ("pixel_values",)},
    "kosmos-2": {
        "config": {"latent_query_num": 4},
        "also": ("pixel_values", "input_ids"),
        "inputs": lambda _: {"image_embeds_position_mask": (torch.arange(9) < 4).repeat(2, 1)},
    },
    "blip-2": {"config": {"image_token_index": _IMAGE}, "inputs": _asked(1)},
    "instructblip": {"config": {"image_token_index": _IMAGE}, "inputs": _asked(1)},
    "instructblipvideo": {"config": {"video_token_index": _IMAGE}, "frames": (2,), "inputs": _asked(2)},
    "blip_2_qformer": {
        "inputs": lambda config: {
            "query_embeds": torch.randn(2, 4, config.hidden_size),
            "encoder_hidden_states": torch.randn(2, 5, config.encoder_hidden_size),
        }
    },
    "lilt": {"config": {"hidden_size": 48}},
    "layoutlmv3": {"config": {"coordinate_size": 4, "shape_size": 8}},
    "mobilevitv2": {"image": 128},
    "siglip2": {"inputs": _patched},
    "siglip2_vision_model": {"inputs": _patched},
    **{name: _rotary([2, 3, 3]) for name in ("qwen2_vl_text", "qwen2_5_vl_text")},
    "lxmert": {
        "inputs": lambda config: {
            "visual_feats": torch.randn(2, 4, config.visual_feat_dim),
            "visual_pos": torch.rand(2, 4, config.visual_pos_dim),
        }
    },
}
