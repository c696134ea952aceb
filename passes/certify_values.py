"""The checks on weights: exactly the adapter's initializers changed, each by exactly its delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from lora_fx.certificates import Check
from lora_fx.passes.onnx_mapping import ParameterMap, Recipe
from lora_fx.passes.onnx_subject import Weights
from lora_fx.passes.onnx_tensors import as_torch, can_hold_weights, same_bits

Pairs = Sequence[tuple[ir.Value, ir.Value]]

ULPS = 2
"""How many units in the last place of the larger of base and expected value count as rounding."""


@dataclass
class Expected:
    """What the adapter makes of the base's initializers, by their names in the base."""

    values: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    owners: dict[str, str] = field(default_factory=dict[str, str])
    opaque: dict[str, str] = field(default_factory=dict[str, str])
    missing: tuple[str, ...] = ()
    same: tuple[str, ...] = ()


def same_tensor(base: ir.TensorProtocol | None, other: ir.TensorProtocol | None) -> bool:
    """Whether two initializers hold the same bits; the same place in the same file needs no reading."""
    if base is None or other is None:
        return base is other
    if base.dtype != other.dtype or list(base.shape.numpy()) != list(other.shape.numpy()):
        return False
    if isinstance(base, ir.ExternalTensor) and isinstance(other, ir.ExternalTensor):
        places = [(tensor.path, tensor.offset, tensor.length) for tensor in (base, other)]
        if places[0] == places[1]:
            return True
    if can_hold_weights(base):
        return same_bits(as_torch(base), as_torch(other))
    return base.tobytes() == other.tobytes()


def expect(base: ir.Model, mapping: ParameterMap, weights: Weights) -> Expected:
    """Return what every changed initializer should hold."""
    found = Expected()
    initializers = base.graph.initializers
    missing: list[str] = []
    same: list[str] = []
    for name in weights.names:
        placement = mapping.find(name)
        if placement is None or placement.status == "absent":
            missing.append(name)
            continue
        found.opaque |= dict.fromkeys(placement.opaque, name)
        for recipe in placement.recipes:
            tensor = initializers[recipe.initializer].const_value
            assert tensor is not None
            held = found.values.get(recipe.initializer, as_torch(tensor))
            new = recipe.apply(weights.effective(name, restored(recipe, held, placement.shape)), held)
            if same_bits(new, held):
                same.append(name)
                continue
            found.values[recipe.initializer] = new
            found.owners[recipe.initializer] = name
    found.missing, found.same = tuple(missing), tuple(same)
    return found


def restored(recipe: Recipe, held: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``W0`` as the base file holds it, in the parameter's own shape."""
    return recipe.restore(held, shape)


def value_checks(base: ir.Model, pairs: Pairs, mapping: ParameterMap, weights: Weights) -> list[Check]:
    """Return the checks ``changed-set``, ``delta`` and ``untouched``."""
    expected = expect(base, mapping, weights)
    differing = {b.name or "": (b, o) for b, o in pairs if not same_tensor(b.const_value, o.const_value)}
    return [
        _changed_set(expected, differing, pairs, weights),
        _delta(expected, pairs),
        _untouched(expected, differing, pairs),
    ]


def _changed_set(
    expected: Expected, differing: Mapping[str, tuple[ir.Value, ir.Value]], pairs: Pairs, weights: Weights
) -> Check:
    name = "changed-set"
    if expected.missing:
        return Check(
            name,
            ok=False,
            detail="the base file holds no initializer for this parameter",
            place=expected.missing[0],
        )
    untouched = [n for n in expected.values if n not in differing]
    if untouched:
        owner = expected.owners[untouched[0]]
        return Check(
            name,
            ok=False,
            detail=f"holds {owner}, which the adapter changes, and is as in the base",
            place=f"initializer {untouched[0]!r}",
        )
    if not expected.values and not expected.opaque:
        return Check(name, ok=False, detail="the adapter changes no weight: is it trained?")
    detail = f"{len(expected.values)} initializers of {len(pairs)} changed, for {len(weights.names)} weights"
    if expected.opaque:
        detail += f"; {len(expected.opaque)} more hold weights in a way that is not understood"
    if expected.same:
        detail += f"; unchanged by the adapter: {', '.join(expected.same[:3])}"
    return Check(name, ok=True, detail=detail, data={"changed": sorted(expected.values)})


def _delta(expected: Expected, pairs: Pairs) -> Check:
    worst = 0.0
    for base, other in pairs:
        wanted = expected.values.get(base.name or "")
        if wanted is None or base.const_value is None or other.const_value is None:
            continue
        if not can_hold_weights(other.const_value):
            continue
        gap = ulps(as_torch(other.const_value), wanted, as_torch(base.const_value))
        if gap > ULPS:
            owner = expected.owners[base.name or ""]
            found = as_torch(other.const_value)
            what = f"differs from W of {owner} by {gap:.3g} units in the last place"
            if not bool(found.isfinite().all()):
                what = f"holds {int((~found.isfinite()).sum())} values that are not finite"
            return Check("delta", ok=False, detail=what, place=f"initializer {other.name!r}")
        worst = max(worst, gap)
    bits = "bit for bit" if worst == 0 else f"to {worst:.2g} units in the last place"
    return Check(
        "delta",
        ok=True,
        detail=f"{len(expected.values)} changed initializers hold exactly W, {bits}",
        data={"ulps": worst},
    )


def _untouched(expected: Expected, differing: Mapping[str, tuple[ir.Value, ir.Value]], pairs: Pairs) -> Check:
    for name, (base, other) in differing.items():
        if name not in expected.values and name not in expected.opaque:
            return Check(
                "untouched",
                ok=False,
                detail=f"differs from the base ({_gap(base, other)}), and the adapter does not change it",
                place=f"initializer {other.name!r}",
            )
    kept = len(pairs) - len(differing)
    return Check("untouched", ok=True, detail=f"the other {kept} initializers are the base's, bit for bit")


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
