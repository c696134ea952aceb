"""What models of sounds and of series need beside the general rules: ``hints.py``, continued."""

from __future__ import annotations

from typing import Any

import torch

_MIXED: dict[str, Any] = {"num_hidden_layers": 4, "use_mamba_kernels": False}
_MIXED_LAYERS = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_FEW_CODES: dict[str, Any] = {
    "num_filters": 4,
    "upsample_groups": 32,
    "codebook_dim": 32,
    "vector_quantization_hidden_dimension": 32,
}
_LITTLE_AHEAD: dict[str, Any] = {"sliding_window": 6, "default_num_lookahead_tokens": 1}
_FEW_SOUNDS: dict[str, Any] = {
    "dac_config.downsampling_ratios": [2, 4],
    "dac_config.encoder_hidden_size": 8,
    "dac_config.hidden_size": 32,
    "dac_config.hop_length": 8,
    "dac_config.codebook_dim": 8,
}


def _sound(samples: int = 1600) -> dict[str, Any]:
    """Return one channel of sound."""
    return {"inputs": lambda _: {"input_values": torch.randn(2, 1, samples)}}


SERIES_HINTS: dict[str, dict[str, Any]] = {
    "zamba": {
        "config": {
            **_MIXED,
            "layers_block_type": _MIXED_LAYERS,
            "attention_hidden_size": 64,
            "attention_head_dim": 32,
        }
    },
    "zamba2": {
        "config": {
            **_MIXED,
            "layers_block_type": _MIXED_LAYERS,
            "n_mamba_heads": 4,
            "num_mem_blocks": 2,
            "use_shared_attention_adapter": True,
        }
    },
    "wav2vec2-bert": {"config": {"vocab_size": 100}, "mel": (20, 32)},
    "timesfm": {
        "config": {"patch_length": 4, "context_length": 16, "horizon_length": 8},
        "inputs": lambda _: {"past_values": [torch.randn(16), torch.randn(16)], "freq": [0, 1]},
    },
    "timesfm2_5": {
        "config": {"patch_length": 4, "context_length": 16, "horizon_length": 8, "output_quantile_len": 8},
        "inputs": lambda _: {"past_values": [torch.randn(16), torch.randn(16)]},
    },
    "xcodec": {"config": {"codebook_dim": 288}, **_sound(3200)},
    "mimi": {"config": _FEW_CODES, **_sound(1920)},
    "mimi_decoder": {
        "config": _FEW_CODES,
        "inputs": lambda config: {"latents": torch.randn(2, config.hidden_size, 3)},
    },
    "csm": {"config": {f"codec_config.{name}": value for name, value in _FEW_CODES.items()}},
    "kyutai_speech_to_text": {
        "config": {f"codec_config.{name}": value for name, value in _FEW_CODES.items()},
        "inputs": lambda config: {"input_ids": torch.randint(3, 100, (2, 9, config.num_codebooks + 1))},
    },
    "pocket_tts_audio_tokenizer": {"config": {"upsample_groups": 32, "num_filters": 4}, **_sound(1920)},
    "audioflamingo3_encoder": {
        "mel": (128, 256),
        "inputs": lambda _: {"input_features_mask": torch.ones(2, 256, dtype=torch.long)},
    },
    "moonshine_streaming": {"config": {"num_key_value_heads": 2}},
    "musicgen_melody": {
        "head": "MusicgenMelodyForConditionalGeneration",
        "config": {"audio_encoder.num_filters": 4},
        "inputs": lambda config: {
            "input_ids": torch.randint(3, 100, (2, 9)),
            "decoder_input_ids": torch.randint(3, 100, (2 * config.decoder.num_codebooks, 6)),
            "input_features": torch.randn(2, 5, config.num_chroma),
        },
    },
    "fastspeech2_conformer_with_hifigan": {
        "config": {
            "model_config.num_mel_bins": 32,
            "vocoder_config.model_in_dim": 32,
            "vocoder_config.upsample_initial_channel": 32,
        },
        "inputs": lambda _: {"input_ids": torch.randint(3, 70, (2, 9))},
    },
    "vibevoice_acoustic_tokenizer": {
        "config": {"downsampling_ratios": [2, 2, 4], "depths": [1, 1, 1, 1], "num_filters": 4},
        **_sound(320),
    },
    "glmasr_encoder": {"mel": (128, 32)},
    "voxtral_realtime_encoder": {"mel": (128, 64)},
    "voxtral_realtime_text": {"inputs": lambda config: {"t_cond": torch.randn(1, config.hidden_size)}},
    "nemotron_asr_streaming_encoder": {"config": _LITTLE_AHEAD},
    "nemotron_asr_streaming": {
        "config": {f"encoder_config.{name}": value for name, value in _LITTLE_AHEAD.items()}
    },
    "nemotron3_5_asr": {"config": {f"encoder_config.{name}": value for name, value in _LITTLE_AHEAD.items()}},
    "gemma4_audio": {"config": {"subsampling_conv_channels": [80, 32]}},
    "granite_speech5_encoder": {"mel": (64, 320)},
    "granite_speech5_ctc": {"mel": (64, 320)},
    "pe_audio_encoder": {"config": _FEW_SOUNDS, **_sound(256)},
    "pe_audio": {
        "config": {f"audio_config.{name}": value for name, value in _FEW_SOUNDS.items()},
        **_sound(256),
        "also": ("input_ids",),
    },
    "vibevoice_acoustic_tokenizer_encoder": {
        "config": {"downsampling_ratios": [2, 2], "depths": [1, 1, 1], "num_filters": 8},
        "inputs": lambda _: {"hidden_states": torch.randn(2, 1, 64)},
    },
    "vibevoice_acoustic_tokenizer_decoder": {
        "config": {"downsampling_ratios": [2, 2], "depths": [1, 1, 1], "num_filters": 8},
        "inputs": lambda config: {"hidden_states": torch.randn(2, config.hidden_size, 9)},
    },
    "clap": {
        "config": {
            "audio_config.spec_size": 32,
            "audio_config.num_mel_bins": 16,
            "audio_config.window_size": 2,
            "audio_config.depths": [1, 1],
            "audio_config.num_attention_heads": [2, 2],
            "audio_config.patch_embeds_hidden_size": 16,
            "audio_config.hidden_size": 32,
        },
        "inputs": lambda _: {
            "input_features": torch.randn(2, 1, 64, 16),
            "is_longer": torch.zeros(2, 1, dtype=torch.bool),
        },
    },
    "t5gemma2_encoder": {"config": {"text_config.dropout_rate": 0.0}},
    "musicgen": {
        "head": "MusicgenForConditionalGeneration",
        "config": {"audio_encoder.num_filters": 4},
        "inputs": lambda config: {
            "input_ids": torch.randint(3, 100, (2, 9)),
            "decoder_input_ids": torch.randint(3, 100, (2 * config.decoder.num_codebooks, 6)),
        },
    },
    "perceiver": {
        "config": {"max_position_embeddings": 9},
        "main": "inputs",
        "inputs": lambda _: {
            "inputs": torch.randint(3, 100, (2, 9)),
            "attention_mask": torch.ones(2, 9, dtype=torch.long),
        },
    },
    "udop": {
        "also": ("pixel_values",),
        "inputs": lambda _: {"bbox": torch.rand(2, 9, 4)},
    },
}
