"""The keys of a peft file, read against a model: which parameter each pair A, B adapts, and at what scale.

Scales are not stored: they follow from the configuration as in peft, ``alpha / r`` or ``alpha / sqrt(r)``,
after ``rank_pattern`` and ``alpha_pattern``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import AdapterFileError, PeftFormatError
from lora_fx.matrix import MatrixForm
from lora_fx.peft_files import PREFIX
from lora_fx.peft_layers import BASE, Layer, Layout, as_parameter, matching_key, plain_path

_LORA = re.compile(r"(.*)\.lora_(?:embedding_)?(A|B)(?:\.weight)?|(.*)\.(lora_magnitude_vector)(?:\.weight)?")
TWICE_UNTIL = (0, 21, 2)
"""The last peft known to apply the delta of an attention's output projection twice."""


@dataclass(frozen=True)
class Adapted:
    """One wrapped parameter of the file: ``delta = scale * B A`` in its layer's matrix form."""

    layer: Layer
    a: Tensor
    b: Tensor
    scale: float
    alpha: float
    magnitude: Tensor | None = None


def sorted_keys(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Part the keys into adapters, by wrapped path, and whole tensors, by name."""
    entries: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise refused(key, f"keys that start with {PREFIX!r}", "another name", "Save it with PeftModel.")
        name = key.removeprefix(PREFIX)
        match = _LORA.fullmatch(name)
        if match is not None:
            path, what = (match[1], match[2]) if match[2] else (match[3], "magnitude")
            entries.setdefault(path, {})[what] = _wide(tensor)
        elif ".lora_" in name or ".token_adapter" in name:
            raise refused(key, "lora_A, lora_B and lora_magnitude_vector", "another tensor", "Remove it.")
        else:
            plain[name] = tensor
    return entries, plain


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def read_adapter(
    path: str, fields: Mapping[str, Tensor], config: Mapping[str, Any], layout: Layout
) -> Adapted:
    """Return what the tensors under one path adapt.

    Raises:
        PeftFormatError: the path names nothing in the model, or peft's adapter is no change of a weight.
        AdapterFileError: a tensor is missing or has another shape than the configuration says.
    """
    layer = _layer_of(path, config, layout)
    wanted = {"A", "B", "magnitude"} if config.get("use_dora") else {"A", "B"}
    if set(fields) != wanted:
        raise AdapterFileError(
            PREFIX + path, expected=listed(wanted), got=listed(fields), advice="Save the adapter again."
        )
    twice = layer.kind == "attention-out"
    if layer.obstacle is not None and not twice:
        raise refused(
            layer.name, "a layer whose weight the adapter changes", layer.obstacle, "Train it anew."
        )
    rank, alpha, scale = _scaling(layer.key, config)
    a, b = _matrices(layer, fields["A"], fields["B"], rank)
    if twice and bool(b.any()) and bool(a.any()):
        scale *= _applied(layer, config)
    magnitude = fields.get("magnitude")
    return Adapted(layer, a, b, scale, alpha, None if magnitude is None else magnitude.flatten())


def _layer_of(path: str, config: Mapping[str, Any], layout: Layout) -> Layer:
    """Return the parameter that a wrapper at this path adapts.

    The names of parameters are not in the keys: of several in one module, the last in the module's order
    is the outermost wrapper.
    """
    depth, outer = 0, path
    while outer.endswith(BASE):
        depth, outer = depth + 1, outer.removesuffix(BASE)
    name = plain_path(path)
    layers = layout.by_path.get(name, ())
    asked = config.get("target_parameters") or ()
    targeted = [layer for layer in layers if any(_is_or_ends(layer.name, t) for t in asked)]
    if depth < len(targeted):
        layer = targeted[len(targeted) - 1 - depth]
        return as_parameter(layer)
    wrapped = [layer for layer in layers if layer.attribute in ("weight", "in_proj_weight")]
    if depth or not wrapped:
        near = difflib.get_close_matches(name, layout.by_path, n=1)
        raise refused(
            PREFIX + path,
            f"a module of {layout.model or 'the model'} with a weight",
            "none of that path",
            f"The nearest is {near[0]!r}." if near else "Load the model that it was trained on.",
        )
    if wrapped[0].kind == "attention-out" and not path.endswith(f"{BASE}.out_proj"):
        alone = "an output projection adapted without its nn.MultiheadAttention, which peft's forward ignores"
        raise refused(PREFIX + path, "a layer whose weight the adapter changes", alone, "Train it anew.")
    if wrapped[0].kind == "parameter" and wrapped[0].obstacle is None:
        return replace(
            wrapped[0], obstacle="the module's forward is its own, and peft adds its branch outside of it"
        )
    return wrapped[0]


def _is_or_ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _scaling(key: str, config: Mapping[str, Any]) -> tuple[int, float, float]:
    """Return rank, alpha and scale as peft gives them to the module of this path."""
    ranks: Mapping[str, Any] = config.get("rank_pattern") or {}
    alphas: Mapping[str, Any] = config.get("alpha_pattern") or {}
    rank_key, alpha_key = matching_key(ranks, key), matching_key(alphas, key)
    rank = int(config.get("r", 8) if rank_key is None else ranks[rank_key])
    alpha = float(config.get("lora_alpha", 8) if alpha_key is None else alphas[alpha_key])
    return rank, alpha, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _matrices(layer: Layer, a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``A: (r, in)`` and ``B: (out, r)`` of the layer's matrix form; stacks for experts."""
    form, shapes = layer.form, f"{tuple(a.shape)} and {tuple(b.shape)}"
    experts = form.experts or 1
    wanted = (rank * experts, form.in_features), (form.out_features, rank * experts)
    if layer.kind == "conv":
        wide = (rank, *form.shape[1:]), (form.out_features, rank, *[1] * (len(form.shape) - 2))
        fits = (tuple(a.shape), tuple(b.shape)) == wide
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    else:
        fits = (tuple(a.shape), tuple(b.shape)) == wanted
    if not fits:
        raise AdapterFileError(
            layer.name,
            expected=f"A and B of rank {rank} for a weight of the shape {form.shape}",
            got=f"shapes {shapes}",
            advice="Load the model that it was trained on, or save the adapter again.",
        )
    if form.experts is None:
        return a, b
    a = a.reshape(experts, rank, form.in_features)
    return a, b.reshape(form.out_features, rank, experts).permute(2, 0, 1)


def _applied(layer: Layer, config: Mapping[str, Any]) -> float:
    """Return how often the peft that wrote a file applies an output projection's delta.

    Up to 0.21.2, once as the weight of the wrapper and once as that of what it wraps. Files of a peft that
    did not write its version yet are older.
    """
    version = config.get("peft_version")
    numbers = tuple(int(n) for n in re.findall(r"\d+", str(version).split("@")[0])[:3]) if version else ()
    if numbers <= TWICE_UNTIL:
        return 2.0
    raise refused(
        layer.name,
        f"a peft_version up to {'.'.join(map(str, TWICE_UNTIL))}, which applies this delta twice",
        repr(version),
        "How often this version applies the delta of an attention's output projection is not known.",
    )


def same_delta(one: Adapted, other: Adapted) -> bool:
    """Say whether two adapters of one weight are the same delta, the one's matrix transposed or not."""
    if one.scale != other.scale or one.magnitude is not None or other.magnitude is not None:
        return False
    a, b = (other.a, other.b) if one.layer.form == other.layer.form else (other.b.mT, other.a.mT)
    return _forms_agree(one.layer.form, other.layer.form) and torch.equal(one.a, a) and torch.equal(one.b, b)


def _forms_agree(one: MatrixForm, other: MatrixForm) -> bool:
    return other in (one, one.transposed)


def listed(names: Iterable[str]) -> str:
    """Return names in order, as an error lists them."""
    return ", ".join(sorted(names))


def refused(where: str, expected: str, got: str, advice: str) -> PeftFormatError:
    """Return the error for what a peft file says and lora_fx cannot represent."""
    return PeftFormatError(where, expected=expected, got=got, advice=advice)
