"""A module's own registers of parameters and buffers, past every property and override."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the module's live register of parameters: writing to it registers."""
    return cast("dict[str, nn.Parameter | None]", module.__dict__["_parameters"])


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the module's live register of buffers: writing to it registers."""
    return cast("dict[str, Tensor | None]", module.__dict__["_buffers"])
