"""Adapters filled with random values, for checks that need them to do something; and all put back."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_fx.passes.runtime import SiteSpec, effective, injected, raw
from lora_fx.passes.switch import adapter_sites, trained_names

_PROBE_SIZE = 0.1
"""The probe's delta, as a share of the weight's own norm."""


@contextmanager
def held_active(model: nn.Module, adapter: str) -> Generator[None]:
    """Inside, this adapter is active and its own dropout is off."""
    record = injected(model)
    if record is None:
        raise RuntimeError("an injected model is needed")
    before = vars(record.state).copy()
    record.state.active, record.state.enabled, record.state.dropout = adapter, True, False
    try:
        yield
    finally:
        vars(record.state).update(before)


@contextmanager
def random_adapters(model: nn.Module, adapter: str) -> Generator[None]:
    """Inside, every adapter is random, with a delta of a tenth of its weight's norm."""
    generator = torch.Generator().manual_seed(0)
    kept: dict[int, tuple[nn.Parameter, Tensor, bool]] = {}
    try:
        for _, module, attribute, spec in adapter_sites(model, adapter):
            for parameter in trained_parameters(module, spec):
                if id(parameter) not in kept:
                    kept[id(parameter)] = (parameter, parameter.detach().clone(), parameter.requires_grad)
            _randomise(module, attribute, spec, generator)
        yield
    finally:
        for parameter, value, flag in kept.values():
            with torch.no_grad():
                parameter.copy_(value)
            parameter.requires_grad_(flag)


def _randomise(
    module: nn.Module,
    attribute: str,
    spec: SiteSpec,
    generator: torch.Generator,
) -> None:
    base = raw(module, attribute).detach()
    with torch.no_grad():
        if spec.full is not None:
            full = raw(module, spec.full)
            noise = torch.randn(full.shape, generator=generator, dtype=torch.float32)
            scale = max(float(base.float().std(correction=0)), 1e-2) * _PROBE_SIZE
            full.copy_(base + noise.to(full.device, full.dtype) * scale)
            return
        for part in spec.parts:
            b = raw(module, part.b)
            noise = torch.randn(b.shape, generator=generator, dtype=torch.float32)
            b.copy_(noise.to(b.device, b.dtype))
        delta = (effective(module, attribute, spec) - base).float()
        size = float(delta.norm())
        target = _PROBE_SIZE * max(float(base.float().norm()), 1e-2 * base.numel() ** 0.5)
        for part in spec.parts:
            if size > 0:
                raw(module, part.b).mul_(target / size)


def trained_parameters(module: nn.Module, spec: SiteSpec) -> list[nn.Parameter]:
    """Return the parameters that one site's adapter trains: ``A``, ``B`` and what goes with them."""
    return [p for n in trained_names(spec) if isinstance(p := raw(module, n), nn.Parameter)]
