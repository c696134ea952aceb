"""What language models need beside the general rules: the table of ``hints.py``, continued."""

from __future__ import annotations

from typing import Any

import torch

_NESTED: dict[str, Any] = {
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0, 0.0],
    "intermediate_size": 48,
}


def _decided(config: Any) -> dict[str, Any]:
    """Return five steps of two lives: what was seen, done and earned."""
    return {
        "states": torch.randn(2, 5, config.state_dim),
        "actions": torch.randn(2, 5, config.act_dim),
        "rewards": torch.randn(2, 5, 1),
        "returns_to_go": torch.randn(2, 5, 1),
        "timesteps": torch.arange(5).repeat(2, 1),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
    }


LANGUAGE_HINTS: dict[str, dict[str, Any]] = {
    "esm": {"config": {"vocab_size": 100, "pad_token_id": 1, "mask_token_id": 32}},
    "deepseek_v2": {"config": {"num_experts_per_tok": 2, "first_k_dense_replace": 1}},
    "nemotron": {"config": {"num_key_value_heads": 1}},
    "dbrx": {
        "config": {
            "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        }
    },
    "ernie4_5_moe": {"config": {"moe_k": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 1}},
    "lfm2_moe": {"config": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}},
    "nemotron_h": {
        "config": {
            "layers_block_type": ["mamba", "moe", "attention", "mlp"],
            "n_groups": 1,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "use_mamba_kernels": False,
        }
    },
    "gemma3n_text": {"config": _NESTED},
    "llama4": {
        "head": "Llama4ForConditionalGeneration",
        "config": {
            "text_config.no_rope_layers": [1, 0],
            "text_config.moe_layers": [1],
            "text_config.layer_types": ["chunked_attention", "full_attention"],
            "image_token_index": 99,
            "vision_config.patch_size": 8,
            "vision_config.intermediate_size": 128,
            "vision_config.vision_output_dim": 32,
            "vision_config.projector_input_dim": 32,
            "vision_config.projector_output_dim": 32,
        },
    },
    "longcat_flash": {"config": {"head_dim": 8}},
    "dots1": {"config": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}},
    "gemma3n": {
        "config": {
            **{f"text_config.{name}": value for name, value in _NESTED.items()},
            "vision_config.architecture": "mobilenetv3_small_050",
        }
    },
    "glm5_next_text": {"config": {"index_kpool": 1}},
    "glm5_next": {"config": {"text_config.index_kpool": 1}},
    "step3p7": {"config": {"text_config.sliding_window": 8}},
    "diffusion_gemma": {
        "config": {
            "text_config.num_experts": 4,
            "text_config.top_k_experts": 2,
            "text_config.moe_intermediate_size": 24,
        }
    },
    "decision_transformer": {"main": "states", "inputs": _decided},
    "reformer": {
        "train": True,  # its own backward refuses eval mode; nothing in it drops here
        "config": {
            "axial_pos_shape": [4, 4],
            "axial_pos_embds_dim": [16, 16],
            "max_position_embeddings": 16,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "attn_layers": ["local", "lsh"],
            "num_buckets": 2,
            "num_hashes": 1,
            "hash_seed": 3,
            "is_decoder": True,
            "hidden_dropout_prob": 0.0,
            "local_attention_probs_dropout_prob": 0.0,
            "lsh_attention_probs_dropout_prob": 0.0,
        },
        "mask": False,
        "inputs": lambda _: {"input_ids": torch.randint(3, 100, (2, 16))},
    },
}
