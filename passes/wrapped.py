"""Refuse models that are already wrapped for data, sharded or tensor parallelism."""

from __future__ import annotations

from torch import nn

from lora_fx.errors import WrappedModelError
from lora_fx.passes.sharded import is_sharded

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if adapters put into this model would not be synchronised, or not be seen.

    Raises:
        WrappedModelError: the model is, or holds, a DDP, DataParallel or FSDP wrapper, was given to
            ``fully_shard``, or has parameters that are DTensors (tensor parallelism).
    """
    for path, module in model.named_modules():
        names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.")}
        found = next((w for w in (*_WRAPPERS, "FSDPModule") if w in names), None)
        if found is not None:
            raise _refusal(path or "the model", found)
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise _refusal(name, "a DTensor parameter")


def _refusal(where: str, got: str) -> WrappedModelError:
    return WrappedModelError(
        where,
        expected="a model that is not yet wrapped",
        got=got,
        advice="Inject first, then wrap: gradients of adapters that are added later are not synchronised.",
    )
