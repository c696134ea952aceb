"""How near two runs are: outputs and gradients by norm, by the dtype that they are computed in."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_fx.passes.precisions import tolerance_of
from lora_fx.reports import Comparison

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest allowed |injected - folded| / |folded| by norm, by the dtype of the output."""
GRADIENTS = 10.0
"""Gradients may lose so many times what outputs may."""
HALF = 0.5
"""No gradient may lose more in any dtype: one that is missing, or doubled, is off by 1."""
ROUNDING = 256.0
"""Gradients below so many times the rounding of the largest one are rounding themselves."""
DISCOUNT = 4.0
"""So many roundings of the largest gradient are no difference: what reaches a small one went through it."""


MASKED = 1e4
"""Elements so large, so many times larger than the others, and the same in both runs, are a mask's."""


def outputs_compared(
    found: list[Tensor], wanted: list[Tensor], case: str, through: frozenset[torch.dtype]
) -> Comparison:
    """Compare the outputs of two runs; the one nearest to its tolerance, or furthest past it, speaks."""
    worst = Comparison(case, "outputs", 0.0, TOLERANCES[torch.float32])
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return Comparison(case, "outputs", float("inf"), worst.tolerance)
    for got, expected in zip(found, wanted, strict=True):
        tolerance = tolerance_of(TOLERANCES, expected.dtype, *through)
        kept = unmasked(got, expected)
        one = Comparison(case, "outputs", relative(got[kept], expected[kept]), tolerance)
        if not one.difference / tolerance <= worst.difference / worst.tolerance:
            worst = one
    return worst


def gradients_compared(
    name: str,
    found: list[Tensor | None],
    wanted: list[Tensor | None],
    case: str,
    largest: float,
    through: frozenset[torch.dtype],
    *,
    noise: bool = False,
) -> Comparison:
    """Compare one adapter's gradients as one vector; gradients may lose ten times what outputs may.

    Where both are nothing but rounding beside the largest gradient of the model (a weight before a
    normalisation of single numbers), or are known to be ``noise``, their difference is taken against that
    one; where one is small (the
    query of keys that are nearly alike), a few roundings of the largest are no difference.
    """
    pairs = [(g, w) for g, w in zip(found, wanted, strict=True) if g is not None or w is not None]
    dtype = next((t.dtype for pair in pairs for t in pair if t is not None), torch.float32)
    left = [torch.zeros_like(w) if g is None and w is not None else g for g, w in pairs]
    right = [torch.zeros_like(g) if w is None and g is not None else w for g, w in pairs]
    got = torch.cat([t.flatten() for t in left if t is not None])
    expected = torch.cat([t.flatten() for t in right if t is not None])
    tolerance = min(HALF, GRADIENTS * tolerance_of(TOLERANCES, dtype, *through))
    rounding = torch.finfo(dtype).eps * largest
    gap = size([got - expected])
    if noise or max(size([got]), size([expected])) <= ROUNDING * rounding:
        doubtful = not noise and dtype is torch.float32 and relative(got, expected) > tolerance
        return Comparison(case, name, gap / largest if largest else 0.0, tolerance, doubtful)
    if gap <= DISCOUNT * rounding:
        return Comparison(case, name, 0.0, tolerance)
    return Comparison(case, name, relative(got, expected), tolerance)


def size(tensors: list[Tensor | None]) -> float:
    """Return the norm of tensors as one vector."""
    return float(sum(float(t.double().norm()) ** 2 for t in tensors if t is not None) ** 0.5)


def unmasked(found: Tensor, wanted: Tensor) -> Tensor:
    """Say of which elements two outputs are to be compared: not of a mask's -1e9 beside logits of size one.

    In the norm of the whole such numbers would leave nothing of the rest. They are told by being the same in
    both runs, bit for bit, and ``MASKED`` times the root mean square of the elements that are not; and by
    being that large themselves, since beside what cancels to a rounding every value is.
    """
    equal = found == wanted
    others = wanted[~equal & wanted.isfinite()]
    if not others.numel():
        return torch.ones_like(equal)
    bound = MASKED * others.double().square().mean().sqrt().clamp_min(1.0)
    return ~(equal & (wanted.abs().double() > bound))


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted| by norm; where both are infinite or NaN alike they agree."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return float("inf")
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    wide = torch.promote_types(wanted.dtype, torch.float64)
    gap = torch.where(same, 0.0, found.to(wide) - wanted.to(wide)).norm()
    size = torch.where(wanted.isfinite(), wanted.to(wide), 0.0).norm()
    if float(gap) == 0.0:
        return 0.0
    return float(gap / size) if float(size) > 0 else float("inf")


def within_rounding(comparison: Comparison, moved: float) -> Comparison:
    """Allow a comparison in float64 what rounding its base's weights does, at most what float32 may lose."""
    coarse = TOLERANCES[torch.float32] * (1.0 if comparison.what == "outputs" else GRADIENTS)
    return replace(
        comparison,
        case=f"{comparison.case}, within the base's own rounding",
        tolerance=max(comparison.tolerance, min(coarse, moved)),
    )
