"""A peft folder and the model it is for -> an adapter file with its Plan.

What the tensors' keys say decides, not the patterns of the configuration: the ranks must agree, and a key
that names nothing in the model is an error. Scales are not stored: they follow from the configuration as
in peft, ``alpha / r`` or ``alpha / sqrt(r)``, after ``rank_pattern`` and ``alpha_pattern``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_fx.adapter_file import AdapterFile, tensor_key
from lora_fx.errors import AdapterFileError, PeftFormatError
from lora_fx.fingerprints import Fingerprint, dtype_name, fingerprint
from lora_fx.matrix import MatrixForm
from lora_fx.peft_config import refuse_unsupported
from lora_fx.peft_files import PREFIX, PeftFolder
from lora_fx.peft_layers import BASE, Layer, Layout, as_parameter, matching_key, plain_path
from lora_fx.plans import Decision, Extra, Part, Plan, Reason
from lora_fx.sites import Site

_LORA = re.compile(r"(.*)\.lora_(?:embedding_)?(A|B)(?:\.weight)?|(.*)\.(lora_magnitude_vector)(?:\.weight)?")
_CHANGED_BASE = re.compile(r"(pissa|olora|corda|lora_ga|loftq)(_.*)?")
_PLAIN_STARTS = {"true", "false", "gaussian", "orthogonal", "eva"}
TWICE_UNTIL = (0, 21, 2)
"""The last peft known to apply the delta of an attention's output projection twice."""


@dataclass(frozen=True)
class _Adapted:
    """One wrapped parameter of the file: ``delta = scale * B A`` in its layer's matrix form."""

    layer: Layer
    a: Tensor
    b: Tensor
    scale: float
    alpha: float
    magnitude: Tensor | None = None


def from_peft(folder: PeftFolder, layout: Layout) -> AdapterFile:
    """Return a peft adapter as an adapter file for this model; it has no fingerprints of its base.

    Only where the folder holds a base weight itself (peft saves embeddings that are adapted) is there one.

    Raises:
        PeftFormatError: the configuration or a tensor says what lora_fx cannot represent; it is named.
        AdapterFileError: a tensor is missing or has another shape than the configuration says.
    """
    config = folder.config
    _refuse_config(config)
    entries, plain = _sorted_keys(folder.tensors)
    found = [_adapted(path, fields, config, layout) for path, fields in entries.items()]
    # What save_adapter writes beside an in-projection: peft wants an output projection's adapter too.
    by_name = {f.layer.name: f for f in found if f.layer.kind != "attention-out" or bool(f.a.any())}
    full, prints = _plain(plain, layout)
    return _Builder(config, layout, by_name, full, prints).build()


def _refuse_config(config: Mapping[str, Any]) -> None:
    refuse_unsupported(config)
    start = str(config.get("init_lora_weights", True)).lower()
    if _CHANGED_BASE.fullmatch(start):
        raise PeftFormatError(
            f"adapter_config.json: init_lora_weights={start!r}",
            expected="an adapter of the base model as it is",
            got="one of a base that the initialisation changed",
            advice="Convert it in peft: save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    if start not in _PLAIN_STARTS:
        raise PeftFormatError(
            "adapter_config.json: init_lora_weights",
            expected=", ".join(sorted(_PLAIN_STARTS)),
            got=repr(start),
            advice="Say which initialisation left the base as it was.",
        )


def _sorted_keys(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Part the keys into adapters, by wrapped path, and whole tensors, by name."""
    entries: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise _refused(key, f"keys that start with {PREFIX!r}", "another name", "Save it with PeftModel.")
        name = key.removeprefix(PREFIX)
        match = _LORA.fullmatch(name)
        if match is not None:
            path, what = (match[1], match[2]) if match[2] else (match[3], "magnitude")
            entries.setdefault(path, {})[what] = _wide(tensor)
        elif ".lora_" in name or ".token_adapter" in name:
            raise _refused(key, "lora_A, lora_B and lora_magnitude_vector", "another tensor", "Remove it.")
        else:
            plain[name] = tensor
    return entries, plain


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _adapted(path: str, fields: Mapping[str, Tensor], config: Mapping[str, Any], layout: Layout) -> _Adapted:
    layer = _layer_of(path, config, layout)
    wanted = {"A", "B", "magnitude"} if config.get("use_dora") else {"A", "B"}
    if set(fields) != wanted:
        raise AdapterFileError(
            PREFIX + path, expected=_listed(wanted), got=_listed(fields), advice="Save the adapter again."
        )
    twice = layer.kind == "attention-out"
    if layer.obstacle is not None and not twice:
        raise _refused(
            layer.name, "a layer whose weight the adapter changes", layer.obstacle, "Train it anew."
        )
    rank, alpha, scale = _scaling(layer.key, config)
    a, b = _matrices(layer, fields["A"], fields["B"], rank)
    if twice and bool(b.any()) and bool(a.any()):
        scale *= _applied(layer, config)
    magnitude = fields.get("magnitude")
    return _Adapted(layer, a, b, scale, alpha, None if magnitude is None else magnitude.flatten())


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
        raise _refused(
            PREFIX + path,
            f"a module of {layout.model or 'the model'} with a weight",
            "none of that path",
            f"The nearest is {near[0]!r}." if near else "Load the model that it was trained on.",
        )
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
    raise _refused(
        layer.name,
        f"a peft_version up to {'.'.join(map(str, TWICE_UNTIL))}, which applies this delta twice",
        repr(version),
        "How often this version applies the delta of an attention's output projection is not known.",
    )


def _plain(plain: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], dict[str, Fingerprint]]:
    """Part whole tensors into what is trained, by name, and base weights that lie beside an adapter."""
    full: dict[str, Tensor] = {}
    prints: dict[str, Fingerprint] = {}
    for key, tensor in plain.items():
        name = plain_path(key)
        known = layout.state.get(name)
        if known is None:
            near = difflib.get_close_matches(name, layout.state, n=1)
            advice = f"The nearest is {near[0]!r}." if near else "Load the model that it was trained on."
            raise _refused(PREFIX + key, "a parameter or buffer of the model", "none of that name", advice)
        if key.endswith(f"{BASE}.weight") and name in layout.layers:
            prints[name] = fingerprint(tensor)
        elif tuple(known.shape) != tuple(tensor.shape):
            raise AdapterFileError(
                PREFIX + key,
                expected=f"shape {tuple(known.shape)}",
                got=f"{tuple(tensor.shape)}",
                advice="Load the model that it was trained on.",
            )
        else:
            full[name] = tensor
    return full, prints


@dataclass(frozen=True)
class _Builder:
    """Puts decisions and tensors together, one decision per site."""

    config: Mapping[str, Any]
    layout: Layout
    adapted: Mapping[str, _Adapted]
    full: Mapping[str, Tensor]
    prints: Mapping[str, Fingerprint]

    def build(self) -> AdapterFile:
        """Return the adapter file."""
        tensors: dict[str, Tensor] = {}
        decisions: list[Decision] = []
        sited: set[str] = set()
        notes = [_provenance(self.config)]
        for site in self.layout.sites:
            sited.update((site.name, *site.names))
            decision, own = self._decide(site)
            decisions.append(decision)
            tensors |= own
        extras, buffers = self._beside(sited, tensors)
        dropout = float(self.config.get("lora_dropout") or 0.0)
        if dropout and any(d.action == "adapt" and not d.dropout for d in decisions):
            notes.append(f"lora_dropout={dropout:g} is left out where the adapter is an effective weight")
        plan = Plan(
            tuple(decisions),
            model=self.layout.model,
            extras=extras,
            buffers=buffers,
            notes=tuple(notes),
            base_parameters=self.layout.base_parameters,
        )
        return AdapterFile(plan, self.prints, tensors)

    def _decide(self, site: Site) -> tuple[Decision, dict[str, Tensor]]:
        names = tuple(dict.fromkeys((site.name, *site.names)))
        low = [self.adapted[name] for name in names if name in self.adapted]
        whole = [self.full[name] for name in names if name in self.full]
        if not low and not whole:
            return Decision(site, "skip", Reason.NO_RULE, detail="not in the peft adapter"), {}
        missing = [n for n in names if n not in (self.adapted if low else self.full)]
        if missing or (low and whole):
            raise _refused(
                site.name,
                "one change of the weight wherever it is used",
                f"a change of {_listed(set(names) - set(missing))} alone, which is {_listed(missing)} too",
                "peft changes one module's use of a tied weight; lora_fx changes the weight.",
            )
        if whole:
            if any(not torch.equal(whole[0], other) for other in whole[1:]):
                raise _refused(
                    site.name, "one value for tied weights", f"several ({_listed(names)})", "Untie them."
                )
            decision = Decision(
                site,
                "train",
                Reason.RULE,
                rule="peft: modules_to_save",
                form="full",
                form_reason="a trained copy",
            )
            return decision, {tensor_key(site.name, None, "full"): whole[0]}
        return self._adapt(site, low)

    def _adapt(self, site: Site, low: list[_Adapted]) -> tuple[Decision, dict[str, Tensor]]:
        first = low[0]
        for other in low[1:]:
            if not _same_delta(first, other):
                raise _refused(
                    site.name,
                    "one delta for tied weights",
                    f"other deltas at {other.layer.name}",
                    "peft changes each use of a tied weight on its own; lora_fx changes the weight.",
                )
        layer = first.layer
        form = layer.form
        branch = layer.branch and first.magnitude is None and layer.kind != "parameter"
        dropout = float(self.config.get("lora_dropout") or 0.0) if branch else 0.0
        rank = int(first.a.shape[-2])
        decision = Decision(
            replace(site, form=form, unfit=None),
            "adapt",
            Reason.RULE,
            rule=f"peft: r={rank}, lora_alpha={first.alpha:g}"
            + (", use_rslora" if self.config.get("use_rslora") else ""),
            form="branch" if branch else "weight",
            form_reason=_form_reason(layer, first.magnitude, branch=branch),
            parts=(Part(rank),),
            alpha=first.alpha,
            scale=first.scale,
            dropout=dropout,
            dora=first.magnitude is not None,
        )
        own = {tensor_key(site.name, None, "A"): first.a, tensor_key(site.name, None, "B"): first.b}
        if first.magnitude is not None:
            own[tensor_key(site.name, None, "magnitude")] = first.magnitude
        return decision, own

    def _beside(
        self, sited: set[str], tensors: dict[str, Tensor]
    ) -> tuple[tuple[Extra, ...], tuple[str, ...]]:
        extras: list[Extra] = []
        buffers: list[str] = []
        for name, value in self.full.items():
            if name in sited:
                continue
            if name in self.layout.parameters:
                base = self.layout.state[name]
                detail = "saved by peft (modules_to_save, or bias)"
                extras.append(Extra(name, tuple(base.shape), dtype_name(base), detail))
                tensors[tensor_key(name, None, "full")] = value
            else:
                buffers.append(name)
                tensors[tensor_key(name, None, "buffer")] = value
        return tuple(extras), tuple(buffers)


def _same_delta(one: _Adapted, other: _Adapted) -> bool:
    """Say whether two adapters of one weight are the same delta, the one's matrix transposed or not."""
    if one.scale != other.scale or one.magnitude is not None or other.magnitude is not None:
        return False
    a, b = (other.a, other.b) if one.layer.form == other.layer.form else (other.b.mT, other.a.mT)
    return _forms_agree(one.layer.form, other.layer.form) and torch.equal(one.a, a) and torch.equal(one.b, b)


def _forms_agree(one: MatrixForm, other: MatrixForm) -> bool:
    return other in (one, one.transposed)


def _form_reason(layer: Layer, magnitude: Tensor | None, *, branch: bool) -> str:
    if branch:
        return "its module's own forward uses it"
    return "DoRA scales whole rows" if magnitude is not None else f"peft's adapter of a {layer.kind} weight"


def _provenance(config: Mapping[str, Any]) -> str:
    origin = config.get("base_model_name_or_path") or "a base that it does not name"
    version = f"peft {config['peft_version']}" if config.get("peft_version") else "peft"
    return (
        f"read from a {version} folder, trained on {origin}: it carries no fingerprint; names and shapes "
        "were checked, and nothing proves that this is the right base"
    )


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))


def _refused(where: str, expected: str, got: str, advice: str) -> PeftFormatError:
    return PeftFormatError(where, expected=expected, got=got, advice=advice)
