"""Leave a model as it was: buffers, modes, random state and gradients, whatever ran inside."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from lora_fx.passes.registers import own_buffers


@contextmanager
def preserved(model: nn.Module) -> Generator[None]:
    """Inside, the model may be run; afterwards buffers, modes and random states are as before."""
    buffers = [
        (
            module,
            dict(own_buffers(module)),
            {k: b.detach().clone() for k, b in own_buffers(module).items() if b is not None},
        )
        for module in model.modules()
    ]
    modes = [(module, module.training) for module in model.modules()]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        for module, training in modes:
            module.training = training
        for module, held, values in buffers:
            own_buffers(module).clear()
            own_buffers(module).update(held)
            for name, value in values.items():
                target = own_buffers(module)[name]
                if target is not None and target.device.type != "meta" and not torch.equal(target, value):
                    with torch.no_grad():
                        target.copy_(value)
