"""What FSDP2 manages beside the shards themselves: the list of parameters that it gathers.

``fully_shard`` notes every parameter of its modules, sets them anew on the modules at each gathering, and
has no call that takes one back. What adapters brought is taken off its lists when they go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_fx.errors import WrappedModelError
from lora_fx.passes.registers import own_parameters
from lora_fx.passes.sharded import sharding_modules


@dataclass(frozen=True)
class _Group:
    """Parameters that are gathered together, and which module and attribute each belongs to."""

    state: Any
    group: Any
    places: tuple[tuple[Any, nn.Module, str], ...]


def refuse_unknown_sharding(model: nn.Module, what: str) -> None:
    """Refuse a torch whose FSDP2 keeps its lists in another way, before anything is changed.

    Raises:
        WrappedModelError: it does.
    """
    try:
        list(_groups(model))
    except AttributeError as error:
        raise WrappedModelError(
            what,
            expected="FSDP2 as torch 2.13 has it",
            got=f"another ({error})",
            advice="Use lora_fx.folded or disable_adapter here; save the adapter, and load it unsharded.",
        ) from error


def forget_removed(model: nn.Module) -> None:
    """Take off FSDP2's lists what its modules no longer have, so that it is not set on them again."""
    for found in list(_groups(model)):
        kept = [each for each, module, name in found.places if own_parameters(module).get(name) is not None]
        if len(kept) < len(found.places):
            found.group.fsdp_params[:] = kept
            # Which dtype gradients are reduced in depends on what is trained now. A group of several cannot
            # be trained, by FSDP2's own rule, but it can be evaluated.
            if len({p.dtype for each in kept if (p := each.sharded_param).requires_grad}) <= 1:
                found.group._init_mp_dtypes()
        if not kept:
            _listed(found.state).remove(found.group)


def _groups(model: nn.Module) -> Iterator[_Group]:
    for module in sharding_modules(model):
        state = module._get_fsdp_state()
        for group in list(_listed(state)):
            infos = [(each, each._module_info) for each in group.fsdp_params]
            yield _Group(state, group, tuple((each, i.module, i.param_name) for each, i in infos))


def _listed(state: Any) -> list[Any]:
    found: list[Any] = state._fsdp_param_groups
    return found
