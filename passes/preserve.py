"""Leave a model as it was: buffers, parameters, modes and random state, whatever ran inside."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from lora_fx.passes.aliases import geometry_of
from lora_fx.passes.moved import written_tensors
from lora_fx.passes.parts import Parts, parts_of
from lora_fx.passes.snapshot import attributes_kept


@contextmanager
def preserved(model: nn.Module, parts: Parts | None = None) -> Generator[None]:
    """Inside, the model may be run; afterwards buffers, modes, random states and attributes are as before.

    Attributes too: a model that keeps what it computed from a weight must not keep a probe's. Parameters
    as well, where the forward gives them other memory, and they and the tensors of plain attributes, where
    a recorded run saw it write into them.
    ``parts`` spares the walk over the model where somebody has made it already.
    """
    parts = parts or parts_of(model)
    modules = parts.modules.values()
    with _disable_current_modes():  # a fake mode would keep a copy without values
        places = [(parameter, parameter.detach()) for parameter in parts.parameters.values()]
        moving = [*parts.buffers.values(), *written_tensors(model)]
        values = [(tensor, tensor.detach().clone()) for tensor in moving if _has_values(tensor)]
    modes = [(module, module.training) for module in modules]
    try:
        # The registers of buffers are among the attributes; a scripted module cannot replace its buffers.
        with random_states_kept(), attributes_kept(modules):
            yield
    finally:
        for module, training in modes:
            if module.training is not training:
                module.training = training
        with torch.no_grad(), _disable_current_modes():
            for parameter, place in places:
                if not _lies_at(parameter, place):
                    parameter.data = place
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    put_back(tensor, value)


def put_back(tensor: Tensor, value: Tensor) -> None:
    """Write a value back into a tensor, which the model may have resized in between."""
    if tensor.shape != value.shape:
        tensor.resize_(value.shape)
    tensor.copy_(value)


@contextmanager
def random_states_kept() -> Generator[None]:
    """Afterwards torch, NumPy and Python draw the numbers that they would have drawn.

    Speech models choose what they mask in training with NumPy: two runs are the same only from one state
    of all three.
    """
    cpu, plain = torch.get_rng_state(), random.getstate()
    array = np.random.get_state()  # noqa: NPY002 - the global state is what models draw from
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        np.random.set_state(array)  # noqa: NPY002 - as above
        random.setstate(plain)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def attention_spelt_out() -> Generator[None]:
    """Inside, attention's fast path is off: it is taken by what requires a gradient, and pads with zeros."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


_is_alias: Callable[[Tensor, Tensor], bool] = vars(torch)["_C"]._is_alias_of


def _lies_at(parameter: Tensor, place: Tensor) -> bool:
    """Say whether a parameter is still in the memory that it was in."""
    return _is_alias(parameter, place) and geometry_of(parameter) == geometry_of(place)


@contextmanager
def casts_uncached() -> Generator[None]:
    """Inside, autocast casts every weight anew: it does not see that one was written to in place."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _has_values(tensor: Tensor) -> bool:
    # Sparse tensors cannot be compared, and no layer writes into one.
    real = tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)
    return real and tensor.layout is torch.strided
