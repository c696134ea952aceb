"""Normalisation statistics: a normalisation under frozen parameters uses them and leaves them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from lora_fx.errors import WrappedModelError
from lora_fx.passes.registers import own_buffers
from lora_fx.passes.runtime import BINDING, AdapterState, Binding, binding
from lora_fx.passes.subclass import attach, detach


def is_running_norm(module: nn.Module) -> bool:
    """Say whether a module is a normalisation that moves running statistics in train mode.

    One compiled by TorchScript is left alone: it cannot be given another forward.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return False
    mean = own_buffers(module).get("running_mean")
    return mean is not None and bool(getattr(module, "track_running_stats", True))


def freeze_norms(model: nn.Module, state: AdapterState) -> None:
    """Make every such normalisation use its running statistics in train mode too.

    One whose statistics the active adapter has its own copy of moves that copy instead.
    """
    for module in model.modules():
        if not is_running_norm(module):
            continue
        held = binding(module)
        if held is None:
            held = Binding(state, type(module))
            module.__dict__[BINDING] = held
        held.frozen_norm = True
        attach(module)


@contextmanager
def resting_norms_bare(model: nn.Module) -> Generator[None]:
    """Inside, normalisations in eval mode, which are frozen anyhow, have their own class."""
    resting = [m for m in model.modules() if (held := binding(m)) and held.frozen_norm and not m.training]
    for module in resting:
        detach(module)
    try:
        yield
    finally:
        for module in resting:
            attach(module)


def refuse_converted(model: nn.Module) -> None:
    """Refuse a model whose frozen normalisations were replaced by ones that move their statistics.

    Raises:
        WrappedModelError: ``SyncBatchNorm.convert_sync_batchnorm`` was called after inject.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and binding(module) is None:
            raise WrappedModelError(
                path,
                expected="the normalisation that inject knew, frozen or with an adapter's statistics",
                got="a SyncBatchNorm in its place",
                advice="Call convert_sync_batchnorm before inject; frozen normalisations need none.",
            )


def running_statistics(model: nn.Module) -> tuple[str, ...]:
    """Return the qualified names of every buffer that normalisations move in train mode."""
    names: list[str] = []
    for path, module in model.named_modules():
        if is_running_norm(module):
            found = [n for n in ("running_mean", "running_var", "num_batches_tracked") if _has(module, n)]
            names += [f"{path}.{n}" if path else n for n in found]
    return tuple(names)


def _has(module: nn.Module, name: str) -> bool:
    return own_buffers(module).get(name) is not None
