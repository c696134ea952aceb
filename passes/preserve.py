"""Leave a model as it was: buffers, modes, random state and gradients, whatever ran inside."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from lora_fx.passes.registers import own_buffers
from lora_fx.passes.snapshot import attributes_kept


@contextmanager
def preserved(model: nn.Module) -> Generator[None]:
    """Inside, the model may be run; afterwards buffers, modes, random states and attributes are as before.

    Attributes too: a model that keeps what it computed from a weight must not keep a probe's.
    """
    modules = list(model.modules())
    # A scripted module cannot replace its buffers, only write into them.
    registers = [(m, dict(own_buffers(m))) for m in modules if not isinstance(m, torch.jit.ScriptModule)]
    with _disable_current_modes():  # a fake mode would keep a copy without values
        values = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if _has_values(buffer)]
    modes = [(module, module.training) for module in modules]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        with attributes_kept(model):
            yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        for module, training in modes:
            module.training = training
        for module, held in registers:
            own_buffers(module).clear()
            own_buffers(module).update(held)
        with torch.no_grad(), _disable_current_modes():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def attention_spelt_out() -> Generator[None]:
    """Inside, attention's fast path is off: it is taken by what requires a gradient, and pads with zeros."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _has_values(tensor: Tensor) -> bool:
    # Sparse tensors cannot be compared, and no layer writes into one.
    real = tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)
    return real and tensor.layout is torch.strided
