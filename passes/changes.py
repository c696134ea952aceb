"""What folding an adapter changes, weight by weight.

The delta is added in float32 or wider and cast once. A half-precision weight keeps only a part of a
small delta: the *retained delta* ``1 - |cast(W) - W0 - delta| / |delta|`` says how much.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_fx.errors import AdapterValueError
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

    ``retained`` is the share of the delta that ``W`` holds after the cast to its dtype.
    """

    names: tuple[str, ...]
    before: Tensor
    after: Tensor
    retained: float = 1.0


def changes(model: nn.Module, adapter: str | None = None) -> Mapping[str, Change]:
    """Return what folding the adapter would change, by the parameters' first qualified names.

    Raises:
        AdapterNameError: the model has no adapters, or not this one.
        AdapterValueError: an adapter holds NaN or infinity, or ``W`` overflows the weight's dtype.
    """
    _, name = require(model, adapter)
    reshard(model)
    found: dict[int, Change] = {}
    with torch.no_grad():
        for path, module, attribute, spec in adapter_sites(model, name):
            qualified = f"{path}.{attribute}" if path else attribute
            key = id(raw(module, attribute))
            if key in found:
                found[key] = replace(found[key], names=(*found[key].names, qualified))
            else:
                found[key] = _change(module, attribute, spec, qualified)
    return {change.names[0]: change for change in found.values()}


def _change(module: nn.Module, attribute: str, spec: SiteSpec, qualified: str) -> Change:
    base = raw(module, attribute)
    for key in spec.names:
        _check_finite(whole(raw(module, key)), f"{qualified} ({key})")
    if base.dtype in (torch.float16, torch.bfloat16) and base.device.type != "meta":
        wide = effective(module, attribute, spec, base.float())
        after = wide.to(base.dtype)
        kept = retained(whole(base), whole(wide), whole(after))
    else:
        after, kept = effective(module, attribute, spec), 1.0
    if _may_overflow(module, spec, base) and bool(whole(base).isfinite().all()):
        _check_finite(whole(after), qualified)
    return Change((qualified,), base.detach(), after.detach(), kept)


def retained(before: Tensor, wide: Tensor, after: Tensor) -> float:
    """Return the share of ``wide - before`` that ``after - before`` holds: 1.0 is all of it."""
    delta = wide.float() - before.float()
    size = float(delta.norm())
    return 1.0 - float((after.float() - wide.float()).norm()) / size if size else 1.0


def _may_overflow(module: nn.Module, spec: SiteSpec, base: Tensor) -> bool:
    """Say whether ``W`` must be read through for overflow; for float32 a bound on A and B rules it out."""
    if base.device.type == "meta" or spec.full is not None:
        return False
    if base.dtype not in (torch.float32, torch.float64) or spec.magnitude is not None:
        return True
    bound = sum(
        float(whole(raw(module, part.a)).abs().max()) * float(whole(raw(module, part.b)).abs().max())
        for part in spec.parts
        if raw(module, part.a).numel() and raw(module, part.b).numel()
    )
    return not bound * abs(spec.scale) < _SAFE


def _check_finite(tensor: Tensor, where: str) -> None:
    if tensor.device.type != "meta" and not bool(tensor.isfinite().all()):
        raise AdapterValueError(
            where,
            expected="finite values",
            got="NaN or infinity",
            advice="The training diverged, or the file is damaged: go back to an earlier adapter.",
        )


def refuse_rounded_away(found: Iterable[Change], least: float) -> None:
    """Warn of deltas that a half precision rounds away in part; refuse those that it nearly loses.

    Raises:
        AdapterValueError: less than ``least`` of a delta is retained.
    """
    lossy = sorted((c for c in found if c.retained < WARN_RETAINED), key=lambda c: c.retained)
    if not lossy:
        return
    worst = lossy[0]
    dtype = str(worst.after.dtype).removeprefix("torch.")
    got = (
        f"{worst.retained:.0%} of the delta of {worst.names[0]} in {dtype}, and less than all of {len(lossy)}"
    )
    if worst.retained < least:
        raise AdapterValueError(
            worst.names[0],
            expected=f"at least {least:.0%} of the delta to survive the weight's dtype",
            got=got,
            advice="Fold into the float32 base, or pass min_retained=0 to accept the loss.",
        )
    warnings.warn(f"folding keeps {got}: fold into the float32 base to keep all of it", stacklevel=3)
