"""A peft folder and the model it is for -> an adapter file with its Plan.

What the tensors' keys say decides, not the patterns of the configuration: the ranks must agree, and a key
that names nothing in the model is an error.
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
from lora_fx.peft_config import refuse_unsupported
from lora_fx.peft_files import PREFIX, PeftFolder
from lora_fx.peft_keys import Adapted, listed, read_adapter, refused, same_delta, sorted_keys
from lora_fx.peft_layers import BASE, Layer, Layout, plain_path
from lora_fx.plans import Decision, Extra, Part, Plan, Reason
from lora_fx.sites import Site

_CHANGED_BASE = re.compile(r"(pissa|olora|corda|lora_ga|loftq)(_.*)?")
_PLAIN_STARTS = {"true", "false", "gaussian", "orthogonal", "eva"}


def from_peft(folder: PeftFolder, layout: Layout) -> AdapterFile:
    """Return a peft adapter as an adapter file for this model; it has no fingerprints of its base.

    Only where the folder holds a base weight itself (peft saves embeddings that are adapted) is there one.

    Raises:
        PeftFormatError: the configuration or a tensor says what lora_fx cannot represent; it is named.
        AdapterFileError: a tensor is missing or has another shape than the configuration says.
    """
    config = folder.config
    _refuse_config(config)
    entries, plain = sorted_keys(folder.tensors)
    found = [read_adapter(path, fields, config, layout) for path, fields in entries.items()]
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
            raise refused(PREFIX + key, "a parameter or buffer of the model", "none of that name", advice)
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
    adapted: Mapping[str, Adapted]
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
            raise refused(
                site.name,
                "one change of the weight wherever it is used",
                f"a change of {listed(set(names) - set(missing))} alone, which is {listed(missing)} too",
                "peft changes one module's use of a tied weight; lora_fx changes the weight.",
            )
        if whole:
            if any(not torch.equal(whole[0], other) for other in whole[1:]):
                raise refused(
                    site.name, "one value for tied weights", f"several ({listed(names)})", "Untie them."
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

    def _adapt(self, site: Site, low: list[Adapted]) -> tuple[Decision, dict[str, Tensor]]:
        first = low[0]
        for other in low[1:]:
            if not same_delta(first, other):
                raise refused(
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
