"""What a model is made of, walked once: a walk over its modules takes long beside a small forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Parts:
    """A model's modules, parameters and buffers by name, each once."""

    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters and the buffers."""
        return *self.parameters.values(), *self.buffers.values()


def parts_of(model: nn.Module) -> Parts:
    """Return what a model is made of now."""
    return Parts(dict(model.named_modules()), dict(model.named_parameters()), dict(model.named_buffers()))
