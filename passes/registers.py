"""A module's own registers of parameters and buffers, past every property and override; names and paths.

What is put around modules after inject (checkpointing, a compiled submodule) adds a segment to the names
of all below. Adapters keep the names without, so that what is saved there loads anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the module's live register of parameters: writing to it registers; of a scripted one, a copy."""
    register: Any = module.__dict__.get("_parameters")
    # The question about scripted modules costs more than all the rest, and this is asked in every forward.
    if type(register) is not dict and isinstance(module, torch.jit.ScriptModule):
        return dict(module.named_parameters(recurse=False, remove_duplicate=False))
    return register  # type: ignore[no-any-return]


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the module's live register of buffers: writing to it registers; of a scripted one, a copy."""
    register: Any = module.__dict__.get("_buffers")
    # The question about scripted modules costs more than all the rest, and this is asked in every forward.
    if type(register) is not dict and isinstance(module, torch.jit.ScriptModule):
        return dict(module.named_buffers(recurse=False, remove_duplicate=False))
    return register  # type: ignore[no-any-return]


WRAPPED = frozenset({"_checkpoint_wrapped_module", "_orig_mod"})
"""The attributes under which checkpoint_wrapper and torch.compile keep what they were given."""


def plain(name: str) -> str:
    """Return a qualified name without the segments of wrappers inside the model."""
    if not any(part in name for part in WRAPPED):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return a submodule by its plain path, through every wrapper on the way."""
    module = model
    for part in plain(path).split(".") if path else ():
        module = _inside(module.get_submodule(part))
    return module


def _inside(module: nn.Module) -> nn.Module:
    children = dict(module.named_children())
    inner = next((children[name] for name in sorted(WRAPPED & children.keys())), None)
    return module if inner is None else _inside(inner)
