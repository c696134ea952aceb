"""Dummy inputs of transformers models, from the forward's signature and the configuration."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

LENGTH, BATCH = 9, 2
GRID = 4
"""Patches in height and in width of an image that is given as a sequence of patches."""


def dummy_inputs(model: nn.Module, hints: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments for one forward; ``hints`` adds to them or replaces them."""
    accepted = inspect.signature(model.forward).parameters
    config: Any = model.config
    main = hints.get("main", getattr(model, "main_input_name", "input_ids"))
    makers = {
        "input_ids": lambda: _ids(config),
        "pixel_values": lambda: _image(config, hints),
        "pixel_values_videos": lambda: _video(config, hints),
        "input_values": lambda: _noise(BATCH, *hints.get("channels", ()), hints.get("samples", 1600)),
        "input_features": lambda: _noise(BATCH, *_mel(config, hints)),
        "decoder_input_ids": lambda: _ids(config),
        "bbox": lambda: torch.zeros(BATCH, LENGTH, 4, dtype=torch.long),
        "grid_thw": lambda: torch.tensor([[1, GRID, GRID]] * BATCH),
        "hidden_states": lambda: _patches(config),
        "past_values": lambda: _noise(BATCH, part_with(config, "context_length").context_length, 1),
    }
    extra = hints.get("inputs")
    given = extra(config) if callable(extra) else {}
    needed = [n for n in makers if _required(accepted, n)]
    wanted = list(dict.fromkeys([main, *needed, *hints.get("also", ())]))
    if "grid_thw" in wanted:
        makers["pixel_values"] = makers["hidden_states"]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        wanted.append("decoder_input_ids")
    if "bbox" in accepted:
        wanted.append("bbox")
    if (
        "pixel_values" in accepted
        and "pixel_values" not in wanted
        and "logit_scale" in dict(model.named_parameters())
    ):
        wanted.append("pixel_values")
    if "pixel_values" in wanted and main == "pixel_values" and _required(accepted, "input_ids"):
        wanted.append("input_ids")
    made = [name for name in wanted if name in makers and name in accepted and name not in given]
    found = {name: makers[name]() for name in made}
    if "use_cache" in accepted:
        found["use_cache"] = False
    if "attention_mask" in accepted and "input_ids" in found and hints.get("mask", True):
        found["attention_mask"] = torch.ones_like(found["input_ids"])
    found.update(given)
    return {k: v for k, v in found.items() if v is not None}


def _patches(config: Any) -> Tensor:
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", None) or 3
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[-1]
    frames = getattr(config, "temporal_patch_size", None) or 1
    return _noise(BATCH * GRID * GRID, channels * frames * patch * patch)


def _required(accepted: Any, name: str) -> bool:
    return name in accepted and accepted[name].default is inspect.Parameter.empty


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator())


def _ids(config: Any) -> Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    top = min(100, int(getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 100))
    return torch.randint(3, top, (BATCH, LENGTH), generator=_generator())


def part_with(config: Any, name: str) -> Any:
    """Return the first of a configuration and its parts that has this field set."""
    if getattr(config, name, None) is not None:
        return config
    for key in (
        "vision_config",
        "backbone_config",
        "encoder_config",
        "audio_config",
        "text_config",
        "qformer_config",
    ):
        part = getattr(config, key, None)
        if part is not None and not isinstance(part, dict):
            found = part_with(part, name)
            if found is not None:
                return found
    return None


def _image(config: Any, hints: dict[str, Any]) -> Tensor:
    size = hints.get("image")
    holder = part_with(config, "image_size")
    if size is None:
        size = 64 if holder is None else holder.image_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    holder = part_with(config, "num_channels") or part_with(config, "in_channels")
    channels = getattr(holder, "num_channels", None) or getattr(holder, "in_channels", None) or 3
    frames = hints.get("frames", ())
    return _noise(BATCH, *frames, channels if isinstance(channels, int) else 3, height, width)


def _video(config: Any, hints: dict[str, Any]) -> Tensor:
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None) or 2
    image = _image(config, hints)
    return _noise(BATCH, frames, *image.shape[1:])


def _mel(config: Any, hints: dict[str, Any]) -> tuple[int, int]:
    if "mel" in hints:
        return tuple(hints["mel"])
    holder = part_with(config, "num_mel_bins")
    bins = 80 if holder is None else holder.num_mel_bins
    positions = getattr(part_with(config, "max_source_positions"), "max_source_positions", None)
    return (bins, 2 * positions) if hints.get("bins_first") else (64, bins)
