"""Tiny configurations of transformers models, made from a configuration class's own fields."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

VOCABULARY = 160
HIDDEN, HEADS, INNER, LAYERS = 32, 2, 48, 2

# The first pattern that matches a field's name decides; None keeps the default. `n` is the default.
_INTEGERS: tuple[tuple[str, Any], ...] = (
    (r"(num_)?(image|frame|crop)_?size|img_size", lambda n: min(32, n)),
    (r".*patch_size|patch_.*|.*_stride|.*kernel.*|.*num_channels|in_chans?|.*in_channels|stride", None),
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id|sep_token_id", 2),
    (r".*token_(id|index)", lambda n: n if n < VOCABULARY else None),
    (r".*codebook_size", lambda n: min(n, 128)),  # a power of two
    (r".*(vocab_size|num_embeddings|vocab_size_.*)", lambda n: min(n, VOCABULARY)),
    (r"type_vocab_size|num_labels", None),
    (
        r"max_.*position.*|n_positions|.*max_position.*|max_(seq|source|target).*|context_length",
        lambda n: min(n, 128),
    ),
    (r".*(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|key_value_heads)", "kv"),
    (r".*(heads|n_head|num_head)", HEADS),
    (r".*(qk_rope_head_dim|qk_nope_head_dim)", 8),
    (r".*(v_head_dim|head_dim|d_kv|head_size|dim_head|attention_head_size)", HIDDEN // HEADS),
    (r".*lora_rank|.*_rank", lambda n: min(n, 12)),
    (r".*(intermediate|ffn|d_ff|mlp_dim|n_inner|feed_?forward|expert_ff).*", INNER),
    (r".*(experts_per_tok|per_token|topk|top_k)", lambda n: min(n, 2)),
    (r"(n|num)_(shared|zero|null)_experts?", lambda n: min(n, 1)),
    (r".*num.*experts|n_routed_experts|.*moe_num_.*", lambda n: min(n, 4)),
    (r"first_k_dense_replace|.*dense_replace", lambda n: min(n, 1)),
    (r"n_group|topk_group|num_groups", lambda n: min(n, 1)),
    (
        r"n_layers?|.*num_.*layers?|.*_layers|depth|.*_depth|num_blocks|.*num_.*blocks",
        lambda n: min(n, LAYERS),
    ),
    (
        r"num_(object_)?quer(y|ies).*|.*num_queries|.*query_tokens|num_latents|.*resampler_n_latents",
        lambda n: min(n, 8),
    ),
    (
        r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|embedding_dim|emb_dim|hidden_dim|d_latents)",
        HIDDEN,
    ),
    (
        r".*(width|projection_dim|proj_dim|out_hidden_size|output_dim|decoder_dim|model_dim|latent_dim|feature_size)",
        HIDDEN,
    ),
    (
        r"dim|.*_dim|.*hidden_sizes?|.*_size_per_layer_input|.*hidden_channels|.*_channels",
        lambda n: HIDDEN if n >= 48 else n,
    ),
    (r".*attention_window|sliding_window|window", lambda n: min(n, 16)),
    (r"chunk_size|block_size|.*chunk_length", lambda n: min(n, 16)),
)
_LISTS: tuple[tuple[str, Any], ...] = (
    (r".*depths|.*num_(hidden_)?layers|.*num_blocks|layer_depths", lambda n: 1),
    (r".*heads", lambda n: min(n, HEADS)),
    (
        r".*(hidden_sizes|embed_dims?|_channels|channels|conv_dim|dims?|hidden_sizes|widths?|filters)",
        lambda n: min(n, HIDDEN),
    ),
)


_LAYERED = ("layer_types", "mlp_layer_types", "layers_block_type")
_SECTIONS = [2, 3, 3]
"""Parts of half a head, for time, height and width."""


def tiny(config_class: type, overrides: dict[str, Any]) -> Any:
    """Return a small configuration of this class; ``overrides`` name fields, ``a.b`` those of a part."""
    return config_class(**tiny_fields(config_class, overrides))


def tiny_fields(config_class: type, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``tiny``: every field that a pattern knows, and parts in their turn."""
    default = config_class()
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        value = _value(default, field.name)
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            inner = {k.partition(".")[2]: v for k, v in overrides.items() if k.startswith(field.name + ".")}
            fields[field.name] = {**_kept(value), **_changed(value, inner), "model_type": value.model_type}
            continue
        small = _small(field.name, value, default)
        if small is not None:
            fields[field.name] = small
    for layered in _LAYERED:
        fields.pop(layered, None)
    if fields.get("head_dim") is None and "head_dim" in {f.name for f in dataclasses.fields(config_class)}:
        fields["head_dim"] = HIDDEN // HEADS
    fields.update({k: v for k, v in overrides.items() if "." not in k and not k.startswith("_")})
    return fields


def _changed(config: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """A part keeps its own defaults where no pattern knows better."""
    changed = tiny_fields(type(config), overrides)
    own = {field.name for field in dataclasses.fields(type(config))}
    for name in own.intersection(_LAYERED):
        if getattr(config, name, None) is not None and name not in overrides:
            changed[name] = None
    return changed


def _kept(config: Any) -> dict[str, Any]:
    """Return what a part says of itself, less what it says of layers and heads that a small one lacks."""
    kept = config.to_dict()
    if "num_key_value_heads" not in {field.name for field in dataclasses.fields(type(config))}:
        kept.pop("num_key_value_heads", None)
    if isinstance(kept.get("per_layer_config"), dict):
        kept["per_layer_config"] = {k: v for k, v in kept["per_layer_config"].items() if int(k) < LAYERS}
    return kept


def _value(default: Any, name: str) -> Any:
    try:
        return getattr(default, name, None)
    except Exception:  # noqa: BLE001 - a field that each layer has of its own: the class says so its own way
        return None


def _is_words(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)


def _small(name: str, value: Any, default: Any) -> Any:
    if isinstance(value, bool):
        return None
    if isinstance(value, dict) and "mrope_section" in value:
        return {**value, "mrope_section": _SECTIONS[: len(value["mrope_section"])]}
    if name == "per_layer_config" and isinstance(value, dict):
        return {k: v for k, v in value.items() if int(k) < LAYERS}
    layers = _value(default, "num_hidden_layers")
    if _is_words(value) and isinstance(layers, int) and len(value) == layers > LAYERS:
        return value[:LAYERS]
    if isinstance(value, int) and value > 0:
        return _integer(name, value, default)
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) and v > 0 for v in value):
        for pattern, rule in _LISTS:
            if re.fullmatch(pattern, name):
                return type(value)(rule(v) for v in value)
    return None


def _integer(name: str, value: int, default: Any) -> int | None:
    for pattern, rule in _INTEGERS:
        if not re.fullmatch(pattern, name):
            continue
        if rule == "kv":
            heads = getattr(default, "num_attention_heads", None)
            return HEADS if value == heads or not isinstance(heads, int) else 1
        found = rule(value) if callable(rule) else rule
        if found is None and name.endswith(("token_id", "token_index")) and value >= VOCABULARY:
            return 100 + sum(map(ord, name)) % 53  # distinct for the few tokens of one model
        return found if found is None or value > found or name.endswith("token_id") else None
    return None
