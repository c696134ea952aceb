"""What folding an adapter changes, weight by weight.

The delta is added in float32 or wider and cast once. A half-precision weight keeps only a part of a
small delta: the *retained delta* ``1 - |cast(W) - W0 - delta| / |delta|`` says how much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_fx.errors import AdapterValueError
from lora_fx.matrix import columns_form, rows_form
from lora_fx.notices import warn_user
from lora_fx.passes.registers import own_parameters, plain
from lora_fx.passes.runtime import SiteSpec, effective, raw
from lora_fx.passes.sharded import reshard, whole
from lora_fx.passes.switch import adapter_sites, require

WARN_RETAINED = 0.9
"""Below this share of a delta kept, folding into a half-precision weight warns."""
_SAFE = 1e30
"""Below this bound on |delta|, a float32 weight cannot overflow."""


@dataclass(frozen=True)
class Change:
    """One parameter that folding changes: all its names, ``W0`` and ``W``, same shape and dtype.

    ``retained`` is the share of the delta that ``W`` holds after the cast to its dtype. ``apart`` says that
    other owners of ``W0`` read it with another adapter, or with none: it must stay as it is for them.
    """

    names: tuple[str, ...]
    before: Tensor
    after: Tensor
    retained: float = 1.0
    apart: bool = False


@dataclass(frozen=True)
class Sum:
    """A change that is one product added where the weight lies: ``matrix += scale * left right``."""

    matrix: Tensor
    left: Tensor
    right: Tensor
    scale: float

    def add(self) -> None:
        """Add it."""
        self.matrix.addmm_(self.left, self.right, alpha=self.scale)


def changes(model: nn.Module, adapter: str | None = None) -> Mapping[str, Change]:
    """Return what folding the adapter would change, by the parameters' first qualified names.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
        AdapterValueError: an adapter holds NaN or infinity, or ``W`` overflows the weight's dtype.
    """
    _, name = require(model, adapter)
    reshard(model)
    with torch.no_grad():
        return {
            names[0]: replace(_change(module, attribute, spec, names[0]), names=names)
            for names, module, attribute, spec in _weights(model, name)
        }


def sums_and_changes(model: nn.Module, adapter: str) -> tuple[list[Sum], Mapping[str, Change]]:
    """Return what folding for good does: sums to be added in place, and the other changes.

    Raises:
        AdapterValueError: an adapter holds NaN or infinity, or ``W`` overflows the weight's dtype.
    """
    sums: list[Sum] = []
    others: dict[str, Change] = {}
    found_weights = _weights(model, adapter)
    shared = _in_other_hands(model, adapter, found_weights)
    with torch.no_grad():
        for names, module, attribute, spec in found_weights:
            apart = id(raw(module, attribute)) in shared
            found = None if apart else _sums(module, attribute, spec, names[0])
            if found is None:
                change = _change(module, attribute, spec, names[0])
                others[names[0]] = replace(change, names=names, apart=apart)
            else:
                sums += found
    return sums, others


_Weight = tuple[tuple[str, ...], nn.Module, str, SiteSpec]
"""All names, an owner, its attribute, the spec."""


def weight_key(module: nn.Module, attribute: str, spec: SiteSpec) -> tuple[int, ...]:
    """Return what two owners have in common whose weight is one: ``W0`` and its adapter's tensors.

    Weights that were tied after ``inject`` share ``W0`` and have an adapter each: they are two.
    """
    return id(raw(module, attribute)), *(id(raw(module, name)) for name in spec.names)


def _in_other_hands(model: nn.Module, adapter: str, weights: list[_Weight]) -> set[int]:
    """Return which ``W0`` some owner reads with another adapter, or with none: not to be written into."""
    keys: dict[int, set[tuple[int, ...] | None]] = {id(raw(m, a)): set() for _, m, a, _ in weights}
    specs = {(id(m), a): weight_key(m, a, spec) for _, m, a, spec in adapter_sites(model, adapter)}
    for module in model.modules():
        for attribute, parameter in own_parameters(module).items():
            if id(parameter) in keys:
                keys[id(parameter)].add(specs.get((id(module), attribute)))
    return {base for base, found in keys.items() if len(found) > 1}


def _weights(model: nn.Module, adapter: str) -> list[_Weight]:
    """Return each weight that an adapter changes, tied ones once, by every name that the model has for it."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(plain(path))
    found: dict[tuple[int, ...], _Weight] = {}
    for _, module, attribute, spec in adapter_sites(model, adapter):
        own = (f"{path}.{attribute}" if path else attribute for path in paths[id(module)])
        key = weight_key(module, attribute, spec)
        names = (*(found[key][0] if key in found else ()), *own)
        found[key] = (names, *(found[key][1:] if key in found else (module, attribute, spec)))
    return list(found.values())


def _sums(module: nn.Module, attribute: str, spec: SiteSpec, qualified: str) -> list[Sum] | None:
    """Return a change as sums in place, where it is nothing else and no value can go wrong."""
    base = raw(module, attribute).detach()
    plain = base.dtype in (torch.float32, torch.float64) and type(base) is Tensor and base.is_contiguous()
    if not plain or base.device.type == "meta" or base.is_inference() or spec.form is None:
        return None
    if not spec.low_rank or any(p.rows is not None or p.start_a is not None for p in spec.parts):
        return None
    if _may_overflow(spec, base, _bounds(module, spec, qualified)):
        return None
    pairs = [(raw(module, p.a).to(base.dtype), raw(module, p.b).to(base.dtype)) for p in spec.parts]
    if spec.form == rows_form(spec.form.shape):
        flat = base.view(spec.form.out_features, spec.form.in_features)
        return [Sum(flat, b, a, spec.scale) for a, b in pairs]
    if base.dim() == 2 and spec.form == columns_form(spec.form.shape):
        return [Sum(base, a.mT, b.mT, spec.scale) for a, b in pairs]
    return None


def _change(module: nn.Module, attribute: str, spec: SiteSpec, qualified: str) -> Change:
    base = raw(module, attribute)
    bounds = _bounds(module, spec, qualified)
    if base.dtype in (torch.float16, torch.bfloat16) and base.device.type != "meta":
        wide = effective(module, attribute, spec, base.float())
        after = wide.to(base.dtype)
        kept = retained(whole(base), whole(wide), whole(after))
    else:
        after, kept = effective(module, attribute, spec), 1.0
    if _may_overflow(spec, base, bounds) and bool(whole(base).isfinite().all()):
        _check_finite(whole(after), qualified)
    return Change((qualified,), base.detach(), after.detach(), kept)


def retained(before: Tensor, wide: Tensor, after: Tensor) -> float:
    """Return the share of ``wide - before`` that ``after - before`` holds: 1.0 is all of it."""
    delta = wide.float() - before.float()
    size = float(delta.norm())
    return 1.0 - float((after.float() - wide.float()).norm()) / size if size else 1.0


def _may_overflow(spec: SiteSpec, base: Tensor, bounds: Mapping[str, float]) -> bool:
    """Say whether ``W`` must be read through for overflow; for float32 a bound on A and B rules it out."""
    if base.device.type == "meta" or spec.full is not None:
        return False
    if base.dtype not in (torch.float32, torch.float64) or spec.magnitude is not None:
        return True
    delta = sum(bounds[part.a] * bounds[part.b] for part in spec.parts)
    return not delta * abs(spec.scale) < _SAFE


def _bounds(module: nn.Module, spec: SiteSpec, qualified: str) -> dict[str, float]:
    """Return the largest magnitude in each of an adapter's tensors, in one pass over each.

    Raises:
        AdapterValueError: one holds NaN or infinity.
    """
    found: dict[str, float] = {}
    for name in spec.names:
        tensor = whole(raw(module, name))
        if tensor.device.type == "meta" or not tensor.numel():
            found[name] = 0.0
            continue
        low, high = torch.aminmax(tensor.detach())
        found[name] = max(abs(float(low)), abs(float(high)))
        if not math.isfinite(found[name]) or math.isnan(float(low)):
            raise not_finite(f"{qualified} ({name})")
    return found


def _check_finite(tensor: Tensor, where: str) -> None:
    if tensor.device.type != "meta" and not bool(tensor.isfinite().all()):
        raise not_finite(where)


def not_finite(where: str) -> AdapterValueError:
    """Return the error about an adapter, or an effective weight, that holds NaN or infinity."""
    return AdapterValueError(
        where,
        expected="finite values",
        got="NaN or infinity",
        advice="The training diverged, or the file is damaged: go back to an earlier adapter.",
    )


def refuse_rounded_away(found: Iterable[tuple[str, str, float]], least: float) -> None:
    """Warn of deltas that a half precision rounds away in part; refuse those that it nearly loses.

    ``found`` tells of every weight its name, its dtype, and the share of its delta that is retained.

    Raises:
        AdapterValueError: less than ``least`` of a delta is retained.
    """
    lossy = sorted((each for each in found if each[2] < WARN_RETAINED), key=lambda each: each[2])
    if not lossy:
        return
    name, dtype, kept = lossy[0]
    got = f"{kept:.0%} of the delta of {name} in {dtype}, and less than all of {len(lossy)}"
    if kept < least:
        raise AdapterValueError(
            name,
            expected=f"at least {least:.0%} of the delta to survive the weight's dtype",
            got=got,
            advice="Fold into the float32 base, or pass min_retained=0 to accept the loss.",
        )
    warn_user(f"folding keeps {got}: fold into the float32 base to keep all of it")
