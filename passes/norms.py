"""Normalisation statistics: a normalisation under frozen parameters uses them and leaves them."""

from __future__ import annotations

from torch import nn

from lora_fx.passes.runtime import BINDING, AdapterState, Binding, binding
from lora_fx.passes.subclass import attach


def is_running_norm(module: nn.Module) -> bool:
    """Say whether a module is a normalisation that moves running statistics in train mode."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None  # noqa: SLF001


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
