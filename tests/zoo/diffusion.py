"""Diffusion models of diffusers at tiny configurations: denoisers with and without text, and a codec."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from tests.zoo.inputs import BATCH

_LATENT = {"sample_size": 8, "in_channels": 4}
_BLOCKS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
_CROSSED = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {**_LATENT, **_BLOCKS, **_CROSSED, "out_channels": 4, "attention_head_dim": 8},
    "UNet2DModel": {
        **_LATENT,
        **_BLOCKS,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    },
    "DiTTransformer2DModel": {
        **_LATENT,
        **_HEADS,
        "out_channels": 8,
        "num_layers": 2,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
    },
    "PixArtTransformer2DModel": {
        **_LATENT,
        **_HEADS,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "use_additional_conditions": False,
    },
    "SD3Transformer2DModel": {
        **_LATENT,
        **_HEADS,
        "out_channels": 4,
        "num_layers": 2,
        "patch_size": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 8,
    },
    "AutoencoderKL": {
        **_BLOCKS,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "sample_size": 16,
    },
}


def diffusers_names() -> list[str]:
    """Return the diffusion models, where diffusers is installed."""
    if importlib.util.find_spec("diffusers") is None:
        return []
    return sorted(f"diffusers/{name}" for name in CONFIGURATIONS)


def build_diffusion(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Build one model, and the inputs of one step of denoising."""
    import diffusers

    model: nn.Module = getattr(diffusers, name)(**CONFIGURATIONS[name])
    if name == "AutoencoderKL":
        return model, {"sample": torch.randn(BATCH, 3, 16, 16), "return_dict": False}
    latent, step, text = torch.randn(BATCH, 4, 8, 8), torch.tensor([3, 7]), torch.randn(BATCH, 5, 16)
    first = "sample" if name.startswith("UNet") else "hidden_states"
    inputs: dict[str, Any] = {first: latent, "timestep": step, "return_dict": False}
    if name.startswith("DiT"):
        inputs["class_labels"] = torch.tensor([1, 2])
    elif name != "UNet2DModel":
        inputs["encoder_hidden_states"] = text
    if name.startswith("SD3"):
        inputs["pooled_projections"] = torch.randn(BATCH, 16)
    if name.startswith("PixArt"):
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return model, inputs
