"""Parameters that are spread over processes (DTensors): gathered whole, or laid out as another is.

FSDP2 keeps one shard of every parameter on each process between forwards, tensor parallelism all the
time. What reads a parameter for a file, a fingerprint or a fold gathers it; that is a collective, so
every process must make the same call.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import WrappedModelError
from lora_fx.kinds.spread import as_dtensor, is_sharded


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor gathered from all processes, differentiably; a plain one is returned itself."""
    if not is_sharded(tensor):
        return tensor
    spread: Any = as_dtensor(tensor)
    gathered: Tensor = spread.full_tensor()
    return gathered


def is_replicated(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor that every process has all of."""
    if not is_sharded(tensor):
        return False
    spread: Any = tensor
    return all(placement.is_replicate() for placement in spread.placements)


def laid_out_like(tensor: Tensor, model: Tensor) -> Tensor:
    """Return a whole tensor, equal on all processes, in the layout of another, differentiably."""
    if not is_sharded(model):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    layout: Any = model
    mesh, placements = layout.device_mesh, layout.placements
    replicated = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    result: Tensor = replicated.redistribute(mesh, placements)
    return result


def fill(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor's values into a tensor, or into this process's shard of it."""
    with torch.no_grad():
        value = value.to(target.device, target.dtype)
        if is_sharded(target):
            local(target).copy_(local(laid_out_like(value, target)))
        else:
            target.copy_(value)


class Gathered(Mapping[str, Tensor]):
    """Tensors by name, each gathered from all processes when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return whole(self._tensors[name].detach())

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard, or all of a plain tensor: no copy, and detached."""
    spread: Any = tensor.detach()
    shard: Tensor = spread.to_local() if is_sharded(tensor) else spread
    return shard


PLACING = ("torch.distributed.", "accelerate.")
"""Packages that read a weight to shard, move or tie it: they are given ``W0``."""


def is_read_by(caller: FrameType | None, packages: str | tuple[str, ...]) -> bool:
    """Say whether a package's own code reads an attribute, to keep what it gets as the base's."""
    return caller is not None and str(caller.f_globals.get("__name__", "")).startswith(packages)


def reshard(model: nn.Module) -> None:
    """Make FSDP2 free its gathered copies, so that the registered parameters are the shards themselves.

    After a forward without backward the root's stay gathered, in the forward's precision; the root may
    be what the model lies in.
    """
    for module in sharding_modules(model):
        module.reshard()


def sharding_modules(model: nn.Module) -> list[Any]:
    """Return the modules given to ``fully_shard`` that have parameters of the model, in it or around it."""
    return [*fsdp_modules(model), *_around(model)]


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules that were given to ``fully_shard``."""
    return [module for module in model.modules() if _is_fsdp(module)]


def _around(model: nn.Module) -> list[Any]:
    """Return the modules given to ``fully_shard`` that the model is a part of: theirs are its parameters."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed import _composable_state

    known: Any = getattr(_composable_state, "_module_state_mapping", ())
    outer = (m for m in list(known) if m is not model and _is_fsdp(m))
    return [m for m in outer if any(inner is model for inner in m.modules())]


def _is_fsdp(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def refuse_sharded(model: nn.Module, what: str, advice: str) -> None:
    """Refuse what cannot be done once ``fully_shard`` or tensor parallelism holds the parameters.

    Raises:
        WrappedModelError: a module of the model was given to ``fully_shard``, or a parameter is a DTensor.
    """
    found = "FSDPModule" if sharding_modules(model) else None
    if found is None and any(is_sharded(parameter) for parameter in model.parameters()):
        found = "parameters that are DTensors"
    if found is not None:
        raise WrappedModelError(what, expected="a model that is not sharded", got=found, advice=advice)


@contextmanager
def first_process(model: nn.Module) -> Generator[bool]:
    """Yield whether this process is the one that writes a file for all that share the model.

    Where a parameter is sharded, it is the first of its mesh, and the others wait until it is done.
    Where none is, every process that asks writes: it may be the only one that asks.
    """
    spread: Any = next((p for p in model.parameters() if is_sharded(p)), None)
    if spread is None:
        yield True
        return
    mesh = spread.device_mesh
    try:
        yield not any(mesh.get_coordinate() or ())
    finally:
        # Dimension by dimension: each process waits for one that has waited for the first.
        for dimension in range(mesh.ndim):
            torch.distributed.barrier(mesh.get_group(dimension))
