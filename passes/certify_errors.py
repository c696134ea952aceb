"""How far an ONNX file may lie from the torch model: each error against rounding that would explain it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FACTOR = 3.0
"""How many times the base's own error the folded file's may be."""
FLOOR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-13}
"""Errors that are not looked into: a few roundings of the outputs' dtype."""
SOUND = 100.0
"""How many times the torch model's own rounding the base file's error may be."""
SMALL = 500.0
"""Multiples of the floor up to which the base file's error is taken for rounding, whatever torch's own is;
an output that torch's own rounding moves by more is compared natively."""
INJECTED = 1e-5
"""How far the injected model may lie from the folded one in float32 (the design's figure); where the base
itself loses more than that by rounding, ``FACTOR`` times what it loses, or what noise does to the folded."""

DIGITS = 0.1
"""Where more than this is allowed, not one digit is compared, and a note says so."""


@dataclass(frozen=True)
class Errors:
    """Distances on one set of inputs: over the outputs that float64 is a reference for, or of one other."""

    inputs: str
    base: float
    folded: float
    injected: float
    own: float = 0.0
    """Of the injected torch model against the folded one in float64; natively, what noise does to it."""
    rounding: float = 0.0
    """Of the folded torch model in the file's precision, where the file's error asks for a look at it."""
    apart: float = INJECTED
    """How far the injected model may lie from the folded one."""
    output: str = ""
    """The output that is compared natively, with the torch models in their own dtype."""
    steady: float | None = None
    """The share of that output, all that rounding leaves alone, which these distances are over."""

    @property
    def what(self) -> str:
        """The output, or the part of it, that is compared natively."""
        part = "" if self.steady is None else f" ({self.steady:.0%} of it, which rounding leaves alone)"
        return f"{self.output}{part}"

    @property
    def name(self) -> str:
        """What the certificate calls these distances."""
        return f"{self.inputs}: {self.what}" if self.output else self.inputs

    def limit(self, floor: float) -> float:
        """Return what the folded file's error may be: other weights may lose more than the base's."""
        noise = self.own if self.output else min(self.rounding, SMALL * floor)
        return max(FACTOR * self.base, FACTOR * noise, floor)

    def fault(self, floor: float) -> str | None:
        """Return what is wrong, or None: each error is held against the rounding that would explain it."""
        limit = self.limit(floor)
        if not self.base <= max(SMALL * floor, SOUND * self.own):
            return (
                f"error {self.base:.3g} of the base file against the base model, whose own rounding is "
                f"{self.own:.2g}: the exporter or onnxruntime computes something else"
            )
        if not self.folded <= limit:
            return f"error {self.folded:.3g} against the folded model; the base file's own is {self.base:.3g}"
        if not self.injected <= self.apart + limit:
            return f"error {self.injected:.3g} against the injected model"
        return None
