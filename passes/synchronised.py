"""Adapters that DDP does not know: gradients of what is trained only since it was wrapped stay apart.

DDP averages the gradients of what required them when it was made. Another adapter that is switched to
later, or injected into its ``.module``, would be trained on every process for itself, without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lora_fx.errors import WrappedModelError
from lora_fx.passes.registers import own_parameters
from lora_fx.passes.runtime import INJECTED, binding


def watch_wrappers(model: nn.Module) -> None:
    """Check before each forward of a distributed run that DDP knows what is trained now."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and refuse_unsynchronised not in _pre_hooks(model).values():
        model.register_forward_pre_hook(refuse_unsynchronised)


def unwatch_wrappers(model: nn.Module) -> None:
    """Take ``watch_wrappers`` back."""
    hooks = _pre_hooks(model)
    for key in [key for key, hook in hooks.items() if hook is refuse_unsynchronised]:
        del hooks[key]


def _pre_hooks(model: nn.Module) -> dict[int, Any]:
    hooks: dict[int, Any] = vars(model)["_forward_pre_hooks"]
    return hooks


def refuse_unsynchronised(model: nn.Module, args: Any) -> None:
    """Refuse a forward inside DDP that would train what DDP does not synchronise.

    Raises:
        WrappedModelError: a Parameter of an adapter is trained, and was not when DDP was made.
    """
    del args
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or INJECTED not in model.__dict__:
        return
    wrapper = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None:
        return
    known = _synchronised(wrapper)
    new = [name for name, parameter in _trained(model) if known is not None and id(parameter) not in known]
    if new:
        raise WrappedModelError(
            new[0],
            expected="parameters that were trained already when DDP was made",
            got=f"{len(new)} that DDP does not synchronise",
            advice="Call set_adapter (or inject) first, then make a new DistributedDataParallel.",
        )


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in model.named_modules():
        held = binding(module)
        for specs in () if held is None else held.sites.values():
            for name in (name for spec in specs.values() for name in spec.names):
                parameter = own_parameters(module).get(name)
                if parameter is not None and parameter.requires_grad:
                    yield f"{path}.{name}", parameter


_KNOWN = "_lora_fx_synchronised"


def _synchronised(wrapper: nn.Module) -> frozenset[int] | None:
    """Return the identities of the Parameters in DDP's buckets; None where this torch does not tell.

    Read once: reading makes zeros of their size. DDP keeps the Parameters, so that no identity is reused.
    """
    known: frozenset[int] | None = wrapper.__dict__.get(_KNOWN)
    buckets = getattr(wrapper.__dict__.get("reducer"), "_get_zeros_like_grad_buckets", None)
    if known is None and buckets is not None:
        known = frozenset(id(p) for bucket in buckets() for p in bucket.parameters())
        wrapper.__dict__[_KNOWN] = known
    return known
