"""Leave a model as it was: buffers, modes, random state and gradients, whatever ran inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Inside, the model may be run; afterwards buffers, modes and random states are as before."""
    buffers = [
        (module, dict(module._buffers), {k: b.detach().clone() for k, b in module._buffers.items() if b is not None})  # noqa: SLF001
        for module in model.modules()
    ]
    modes = [(module, module.training) for module in model.modules()]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        for module, training in modes:
            module.training = training
        for module, held, values in buffers:
            module._buffers.clear()  # noqa: SLF001
            module._buffers.update(held)  # noqa: SLF001
            for name, value in values.items():
                target = module._buffers[name]  # noqa: SLF001
                if target is not None and target.device.type != "meta":
                    with torch.no_grad():
                        target.detach().copy_(value)
