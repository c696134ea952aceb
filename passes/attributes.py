"""Tensors that modules hold as plain attributes, or in lists and dictionaries: no state dict has them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lora_fx.passes.calls import collect

_REGISTERS = frozenset(vars(nn.Module()))
"""What every module holds: parameters, buffers, submodules, hooks."""


def tensor_attributes(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """Return their names, as ``path.steps`` or ``path.cache[0]``, by identity."""
    return {id(tensor): name for name, tensor in reversed(named_attributes(modules))}


def named_attributes(modules: Mapping[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """Return them with their names."""
    found: list[tuple[str, Tensor]] = []
    for path, module in modules.items():
        for key, value in module.__dict__.items():
            if key in _REGISTERS or not isinstance(value, (Tensor, tuple, list, dict)):
                continue
            inside: list[Tensor] = []
            collect(value, inside)
            name = f"{path}.{key}" if path else key
            found += [(name if t is value else f"{name}[{index}]", t) for index, t in enumerate(inside)]
    return found
