"""What models that see need beside the general rules: the table of ``hints.py``, continued."""

from __future__ import annotations

from typing import Any

import torch

_SIDE = 64
"""Pixels in height and in width, where sixteen in a patch leave four patches."""


def _pointed(_: Any) -> dict[str, Any]:
    """Return three points on each image, the last of them outside the thing that is meant."""
    return {
        "input_points": torch.rand(2, 1, 3, 2) * _SIDE,
        "input_labels": torch.tensor([[[1, 1, 0]]] * 2),
    }


_SAM: dict[str, Any] = {
    "image": _SIDE,
    "config": {
        "vision_config.image_size": _SIDE,
        "vision_config.num_pos_feats": 16,
        "vision_config.window_size": 2,
        "vision_config.global_attn_indexes": [1],
        "vision_config.initializer_range": 0.02,
        "prompt_encoder_config.image_size": _SIDE,
        "prompt_encoder_config.image_embedding_size": _SIDE // 16,
    },
    "inputs": _pointed,
}
_HIERA: dict[str, Any] = {
    "image_size": [_SIDE, _SIDE],
    "hidden_size": 8,
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 2, 2, 2],
    "window_size_per_stage": [4, 2, 2, 2],
    "window_positional_embedding_background_size": [4, 4],
    "global_attention_blocks": [3],
}
_SAM2_VISION: dict[str, Any] = {
    **{f"backbone_config.{name}": value for name, value in _HIERA.items()},
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
_SAM3_VISION: dict[str, Any] = {
    "backbone_config.image_size": 56,
    "backbone_config.pretrain_image_size": 28,
    "backbone_config.window_size": 2,
    "backbone_config.global_attn_indexes": [1],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}


def _part(part: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}.{name}": value for name, value in fields.items()}


_FEW_FILTERS: dict[str, Any] = {
    "width_coefficient": 0.05,
    "depth_coefficient": 0.3,
    "hidden_dim": 64,
    "initializer_range": 0.3,
}


def _backed(**backbone: Any) -> dict[str, Any]:
    """Return four stages of a backbone, all of which are looked at."""
    return {"image": _SIDE, "config": _part("backbone_config", {**_FOUR_STAGES, **backbone})}


_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_FOUR_STAGES: dict[str, Any] = {
    "out_features": _STAGES,
    "out_indices": [1, 2, 3, 4],
    "num_hidden_layers": 4,
}
_LAST_OF_TWO: dict[str, Any] = {"out_features": ["stage2"], "out_indices": [2]}
_EDGE: dict[str, Any] = {
    "backbone_config.architecture": "repvit_m1",
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
_RT_DETR: dict[str, Any] = {
    "image": _SIDE,
    "config": {
        "backbone_config.embedding_size": 16,
        "backbone_config.hidden_sizes": [16, 32, 32, 32],
        "encoder_in_channels": [32, 32, 32],
    },
}

_LCNET: dict[str, Any] = {
    "stem_channels": [3, 16, 16],
    "block_configs": [
        [[3, 16, 16, 1, True]],
        [[3, 16, 16, 1, False]],
        [[3, 16, 32, [2, 1], False]],
        [[3, 32, 32, [2, 1], False]],
    ],
    "depths": [1, 1, 1, 1],
    "stage_out_channels": [16, 16, 32, 32],
    "out_features": _STAGES,
    "out_indices": [1, 2, 3, 4],
}
_HALVED: list[list[list[Any]]] = [
    [[3, 16, 16, 1, True]],
    [[3, 16, 16, 2, False]],
    [[3, 16, 32, 2, False]],
    [[3, 32, 32, 2, False]],
]
_UVDOC: dict[str, Any] = {
    "backbone_config.out_features": ["stage1", "stage2", "stage3", "stage4", "stage5", "stage6"],
    "backbone_config.out_indices": [1, 2, 3, 4, 5, 6],
}
_TIMM: dict[str, Any] = {
    "architecture": "vit_pe_core_tiny_patch16_384",
    "model_args": {"img_size": _SIDE, "depth": 2, "embed_dim": 32, "num_heads": 2},
}

VISION_HINTS: dict[str, dict[str, Any]] = {
    "sam": _SAM,
    "sam_hq": _SAM,
    "sam2": {
        "image": _SIDE,
        "config": {**_part("vision_config", _SAM2_VISION), "prompt_encoder_config.image_size": _SIDE},
        "inputs": _pointed,
    },
    "sam2_vision_model": {"image": _SIDE, "config": _SAM2_VISION},
    "sam2_hiera_det_model": {"image": _SIDE, "config": _HIERA},
    "sam3": {
        "image": 56,
        "also": ("input_ids",),
        "config": _part("vision_config", _SAM3_VISION),
    },
    "sam3_lite_text": {
        "image": 56,
        "also": ("input_ids",),
        "config": _part("vision_config", _SAM3_VISION),
    },
    "sam3_lite_text_text_model": {"main": "input_ids"},
    "sam3_tracker": {
        "image": 56,
        "config": {**_part("vision_config", _SAM3_VISION), "prompt_encoder_config.image_size": 56},
        "inputs": _pointed,
    },
    "align": {
        "image": _SIDE,
        "also": ("pixel_values",),
        "config": {**_part("vision_config", _FEW_FILTERS), "projection_dim": 8},
    },
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "rf_detr": _backed(image_size=_SIDE, patch_size=8, num_windows=2, num_register_tokens=0),
    "lw_detr": {
        "image": _SIDE,
        "config": {
            **_part("backbone_config", {**_FOUR_STAGES, "image_size": _SIDE, "window_block_indices": [1]}),
            "projector_scale_factors": [1.0],
            "num_feature_levels": 1,
        },
    },
    "depth_pro": {
        "image": _SIDE,
        "config": {
            "patch_size": 16,
            "fusion_hidden_size": 16,
            "intermediate_hook_ids": [1, 0],
            "intermediate_feature_dims": [16, 16],
            "scaled_images_feature_dims": [16, 16, 16],
            **{
                f"{part}_model_config.{name}": value
                for part in ("image", "patch", "fov")
                for name, value in {**_LAST_OF_TWO, "image_size": 16, "patch_size": 4}.items()
            },
        },
    },
    "tipsv2": {"config": _part("vision_config", _LAST_OF_TWO)},
    "edgetam_vision_model": {"image": _SIDE, "config": _EDGE},
    "edgetam": {
        "image": _SIDE,
        "config": {**_part("vision_config", _EDGE), "prompt_encoder_config.image_size": _SIDE},
        "inputs": _pointed,
    },
    "lightglue": {"image": _SIDE, "frames": (2,), "config": {"num_key_value_heads": 2}},
    "tvp": {
        "config": {
            "max_img_size": 64,
            "visual_prompt_size": 8,
            "num_frames": 2,
            "max_position_embeddings": 64,
        },
        "inputs": lambda _: {
            "input_ids": torch.randint(3, 100, (1, 9)),
            "pixel_values": torch.randn(1, 2, 3, 64, 64),
            "attention_mask": torch.ones(1, 9, dtype=torch.long),
        },
    },
    "donut-swin": {
        "image": 32,
        "config": {
            "window_size": 2,
            "image_size": 32,
            "num_heads": [2, 2],
            "depths": [1, 1],
            "embed_dim": 16,
        },
    },
    "videoprism": {"config": {"vision_config.num_frames": 2, "vision_config.tubelet_size": [1, 8, 8]}},
    "pp_ocrv6_small_det": {
        "image": 128,
        "config": {
            **_part("backbone_config", {**_LCNET, "block_configs": _HALVED}),
            "layer_list_out_channels": [16, 16, 32, 32],
        },
    },
    "pp_ocrv6_small_rec": {"image": (3, 48, 64), "config": _part("backbone_config", _LCNET)},
    "pp_ocrv6_tiny_rec": {"image": (3, 48, 64), "config": _part("backbone_config", _LCNET)},
    "pp_ocrv5_mobile_rec": {"image": (3, 96, 160)},
    "uvdoc": {"image": _SIDE, "config": _UVDOC},
    "pe_video_encoder": {"image": _SIDE, "frames": (), "config": _part("vision_config", _TIMM)},
    "pe_video": {
        "image": _SIDE,
        "config": _part("video_config", _part("vision_config", _TIMM)),
    },
    "perception_lm": {
        "image": _SIDE,
        "frames": (1,),
        "config": {"image_token_id": 99, **_part("vision_config", _TIMM)},
    },
    "timm_backbone": {"image": _SIDE, "config": {"backbone": "resnet18", "out_indices": [1, 2, 3, 4]}},
    "efficientnet": {"image": _SIDE, "config": _FEW_FILTERS},
    "pvt": {"image": _SIDE, "config": {"image_size": _SIDE, "num_encoder_blocks": 4}},
    "seggpt": {
        "image": 16,
        "head": "SegGptForImageSegmentation",
        "config": {
            "image_size": [32, 16],
            "patch_size": 4,
            "pretrain_image_size": 16,
            "num_hidden_layers": 3,
            "merge_index": 1,
            "intermediate_hidden_state_indices": [1, 2],
        },
        "inputs": lambda _: {
            "prompt_pixel_values": torch.randn(2, 3, 16, 16),
            "prompt_masks": torch.randn(2, 3, 16, 16),
        },
    },
}
