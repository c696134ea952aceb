"""The checks on weights: exactly the adapter's initializers changed, each by exactly its delta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from lora_fx.certificates import Check
from lora_fx.passes.onnx_canonical import all_initializers
from lora_fx.passes.onnx_mapping import ParameterMap
from lora_fx.passes.onnx_patch import Patch, Patches, find_patches
from lora_fx.passes.onnx_tensors import as_torch, can_hold_weights, same_bits, same_tensor
from lora_fx.passes.weights import Weights

Pairs = Sequence[tuple[ir.Value, ir.Value]]

ULPS = 2
"""How many units in the last place of the larger of base and expected value count as rounding."""


@dataclass
class _Findings:
    """What one pass over all initializers found."""

    changed: list[str] = field(default_factory=list[str])
    scaled: int = 0
    idle: list[str] = field(default_factory=list[str])
    untouched: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    wrong: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    foreign: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    derived: list[tuple[ir.Value, str]] = field(default_factory=list[tuple[ir.Value, str]])
    kept: int = 0
    ulps: float = 0.0


def value_checks(
    base: ir.Model,
    pairs: Pairs,
    mapping: ParameterMap,
    weights: Weights,
    derived: ir.Model | None = None,
) -> list[Check]:
    """Return the checks ``changed-set``, ``delta``, ``untouched`` and, where there is need, ``derived``."""
    patches = find_patches(base, mapping, weights)
    by_name = {patch.initializer: patch for patch in patches.patches}
    found = _Findings()
    for ours, theirs in pairs:
        patch = by_name.get(ours.name or "")
        if patch is not None:
            _patched(patch, theirs, found)
        elif same_tensor(ours.const_value, theirs.const_value):
            found.kept += 1
        elif ours.name not in patches.opaque:
            found.foreign.append((theirs.name or "", _gap(ours, theirs)))
        else:
            found.derived.append((theirs, patches.opaque[ours.name]))
    checks = [_changed_set(patches, found, len(pairs), weights), _delta(found), _untouched(found)]
    return [*checks, _derived(found, derived)] if found.derived else checks


def _patched(patch: Patch, other: ir.Value, found: _Findings) -> None:
    """Compare an initializer that the adapter changes with what it should hold."""
    name = other.name or ""
    wanted, before = patch.value(), as_torch(patch.base)
    if not can_hold_weights(other.const_value):
        found.wrong.append((name, "holds no floats"))
        return
    assert other.const_value is not None
    now = as_torch(other.const_value)
    if same_bits(wanted, before):
        found.idle.append(patch.owner)
    elif same_bits(now, before):
        found.untouched.append((name, patch.owner))
        return
    else:
        found.changed.append(patch.initializer)
        found.scaled += any(step.recipe.scale is not None for step in patch.steps)
    if same_bits(now, wanted):
        return
    if now.shape == wanted.shape and not bool(now.isfinite().all()) and bool(wanted.isfinite().all()):
        found.wrong.append((name, f"holds {int((~now.isfinite()).sum())} values that are not finite"))
        return
    gap = ulps(now, wanted, before)
    found.ulps = max(found.ulps, gap)
    if gap > ULPS:
        text = f"differs from W of {patch.owner} by {gap:.3g} units in the last place"
        found.wrong.append((name, text))


def _changed_set(patches: Patches, found: _Findings, total: int, weights: Weights) -> Check:
    name = "changed-set"
    data = {"changed": sorted(found.changed)}
    if patches.missing:
        detail = "the base file holds no initializer for this parameter"
        return Check(name, ok=False, detail=detail, place=patches.missing[0], data=data)
    if found.untouched:
        initializer, owner = found.untouched[0]
        detail = f"holds {owner}, which the adapter changes, and is as in the base"
        return Check(name, ok=False, detail=detail, place=f"initializer {initializer!r}", data=data)
    if not found.changed and not found.derived:
        detail = "it changes no weight: train it first"
        return Check(name, ok=False, detail=detail, place="the adapter", data=data)
    detail = f"{len(found.changed)} of {total} initializers changed, for {len(weights.names)} weights"
    if found.derived:
        detail += f"; {len(found.derived)} more were computed from such a weight"
    if patches.unused:
        detail += f"; not used by the exported graph: {', '.join(patches.unused[:3])}"
    if found.idle:
        detail += f"; left as they are by the adapter: {', '.join(found.idle[:3])}"
    return Check(name, ok=True, detail=detail, data=data)


def _delta(found: _Findings) -> Check:
    if found.wrong:
        initializer, detail = found.wrong[0]
        return Check("delta", ok=False, detail=detail, place=f"initializer {initializer!r}")
    bits = "bit for bit" if found.ulps == 0 else f"to {found.ulps:.2g} units in the last place"
    held = "W"
    if found.scaled:
        held = f"what W becomes ({found.scaled} of them W scaled by a folded normalisation)"
    detail = f"{len(found.changed)} changed initializers hold exactly {held}, {bits}"
    return Check("delta", ok=True, detail=detail, data={"ulps": found.ulps})


def _derived(found: _Findings, model: ir.Model | None) -> Check:
    """Compare constants that were computed from a changed weight with what the exporter makes of it."""
    if model is None:
        value, owner = found.derived[0]
        detail = (
            f"was computed from {owner} in a way that files alone do not tell; the certificate that "
            "export_onnx makes beside the model covers it"
        )
        return Check("derived", ok=False, detail=detail, place=f"initializer {value.name!r}")
    held = {value.name: value for value in all_initializers(model.graph)}
    for value, owner in found.derived:
        wanted = held.get(value.name)
        if wanted is None or not same_tensor(wanted.const_value, value.const_value):
            detail = f"is not what the exporter computes from W of {owner}"
            return Check("derived", ok=False, detail=detail, place=f"initializer {value.name!r}")
    owners = sorted({owner for _, owner in found.derived})
    detail = (
        f"{len(found.derived)} constants are what the exporter computes from W of {', '.join(owners[:3])}"
    )
    return Check("derived", ok=True, detail=f"{detail}, bit for bit")


def _untouched(found: _Findings) -> Check:
    if found.foreign:
        initializer, gap = found.foreign[0]
        detail = f"differs from the base ({gap}), and the adapter does not change it"
        return Check("untouched", ok=False, detail=detail, place=f"initializer {initializer!r}")
    detail = f"the other {found.kept} initializers are the base's, bit for bit"
    return Check("untouched", ok=True, detail=detail)


def ulps(found: Tensor, wanted: Tensor, base: Tensor) -> float:
    """Return the largest ``|found - wanted|`` in units in the last place of ``max(|wanted|, |base|)``."""
    if same_bits(found, wanted):
        return 0.0
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    info = torch.finfo(wanted.dtype)
    size = torch.maximum(wanted.double().abs(), base.double().abs()).clamp_min(info.tiny)
    # The spacing of floats at 2^k <= size < 2^(k+1) is eps * 2^k.
    unit = torch.exp2(torch.floor(torch.log2(size))) * info.eps
    gap = (found.double() - wanted.double()).abs() / unit
    gap = torch.where(found.isnan() & wanted.isnan(), 0.0, gap)
    return float(gap.nan_to_num(float("inf")).max())


def _gap(base: ir.Value, other: ir.Value) -> str:
    if not can_hold_weights(base.const_value) or not can_hold_weights(other.const_value):
        return "other values"
    assert base.const_value is not None
    assert other.const_value is not None
    a, b = as_torch(base.const_value).double(), as_torch(other.const_value).double()
    if a.shape != b.shape:
        return f"shape {list(b.shape)} instead of {list(a.shape)}"
    return f"relative distance {float((a - b).norm() / a.norm().clamp_min(1e-300)):.3g}"
