"""States that a model is put in for an export or a check, and taken out of again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.passes.registers import own_buffers, own_parameters


@contextmanager
def evaluating(model: nn.Module) -> Generator[nn.Module]:
    """Put a model in eval mode without gradients or attention's fast path; restore every module's flag."""
    flags = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in flags:
            module.training = training


@contextmanager
def replaced_state(model: nn.Module, replace: Callable[[Tensor], Tensor]) -> Generator[nn.Module]:
    """Put another tensor in the place of every parameter and buffer; the same one for tied ones.

    What is replaced lies in the modules' own dictionaries, so neither the tensors nor the modules
    change, and afterwards each dictionary holds the very objects that it held.
    """
    made: dict[int, Tensor] = {}
    undo: list[tuple[dict[str, Any], str, Tensor]] = []

    def other(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = replace(tensor)
            is_parameter = isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new.detach(), requires_grad=False) if is_parameter else new
        return made[id(tensor)]

    try:
        for module in model.modules():
            scripted: Any = module if isinstance(module, torch.jit.ScriptModule) else None
            stores: tuple[Any, ...] = (own_parameters(module), own_buffers(module))
            if scripted is not None:  # its registers are views of what was compiled, and can be written to
                stores = (scripted._parameters, scripted._buffers)
            for store in stores:
                for name, tensor in list(store.items()):
                    if tensor is not None:
                        undo.append((store, name, tensor))
                        store[name] = other(tensor)
        yield model
    finally:
        for store, name, tensor in undo:
            store[name] = tensor


class Casts:
    """Tensors in another dtype, each cast once however many states of a model hold it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a floating tensor cast, and any other as it is."""
        if not tensor.is_floating_point():
            return tensor
        # Views and Parameters made anew in each state share the memory that tells them apart.
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key not in self._made:
            self._made[key] = (tensor, tensor.detach().to(self._dtype))
        return self._made[key][1]


@contextmanager
def cast_state(model: nn.Module, casts: Casts | torch.dtype) -> Generator[nn.Module]:
    """Hold every floating parameter and buffer in another dtype; tied ones stay tied."""
    casts = casts if isinstance(casts, Casts) else Casts(casts)
    with replaced_state(model, casts):
        yield model


@contextmanager
def with_values(model: nn.Module, values: Mapping[str, Tensor]) -> Generator[nn.Module]:
    """Hold other values under the given qualified names, for every name of a tied tensor."""
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    chosen = {id(named[name]): value for name, value in values.items()}
    with replaced_state(model, lambda tensor: chosen.get(id(tensor), tensor)):
        yield model
