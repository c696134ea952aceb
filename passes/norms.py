"""Normalisation statistics: a normalisation under frozen parameters uses them and leaves them."""

from __future__ import annotations

from torch import nn

from lora_fx.passes.registers import own_buffers
from lora_fx.passes.runtime import BINDING, AdapterState, Binding, binding
from lora_fx.passes.subclass import attach


def is_running_norm(module: nn.Module) -> bool:
    """Say whether a module is a normalisation that moves running statistics in train mode."""
    mean = own_buffers(module).get("running_mean")
    return mean is not None and bool(getattr(module, "track_running_stats", True))


def freeze_norms(model: nn.Module, state: AdapterState) -> None:
    """Make every such normalisation use its running statistics in train mode too."""
    for module in model.modules():
        if not is_running_norm(module):
            continue
        held = binding(module)
        if held is None:
            held = Binding(state, type(module))
            module.__dict__[BINDING] = held
        held.frozen_norm = True
        attach(module)
