"""What assigns, loads or deletes an adapted module's weights: it acts on ``W0``, or it is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn

from lora_fx.errors import WeightWriteError
from lora_fx.kinds.spread import is_sharded
from lora_fx.passes.guard import EffectiveWeight
from lora_fx.passes.registers import own_buffers, own_parameters
from lora_fx.passes.runtime import Binding, binding
from lora_fx.passes.sharded import is_read_by
from lora_fx.passes.spreading import refuse_unspreadable, spread_adapters


def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """Register a Parameter; ``W0`` may be replaced by one of its shape, past the property of its name.

    A DTensor that tensor parallelism registers is as trainable as what it replaces; what FSDP2 sets, by
    attribute, it manages itself.

    Raises:
        WeightWriteError: the new weight has another shape than its adapters; or a reparametrization would
            put parameters of its own in an adapted weight's place.
        WrappedModelError: tensor parallelism splits what adapters do not follow.
    """
    held, old, frame = binding(self), own_parameters(self).get(name), inspect.currentframe()
    if held is None or param is None or not is_sharded(param) or _is_set(frame and frame.f_back):
        _register(self, name, param)
        return
    refuse_unspreadable(self, held, name, param)
    if old is not None:
        param.requires_grad_(old.requires_grad)
    _register(self, name, param)
    spread_adapters(self, held)


def _is_set(caller: FrameType | None) -> bool:
    """Say whether it is ``Module.__setattr__`` that registers."""
    return is_read_by(caller, "torch.nn.modules.module")


def _register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    held, old = binding(module), own_parameters(module).get(name)
    if held is not None:
        _refuse_replacing(module, held, name, param)
    if held is None or name not in held.sites:
        nn.Module.register_parameter(module, name, param)
        return
    if old is not None and (param is None or param.shape != old.shape):
        raise WeightWriteError(
            f"{name!r} of {held.base_class.__name__}",
            expected=f"a weight of shape {tuple(old.shape)}, as its adapters have it",
            got="None" if param is None else f"one of shape {tuple(param.shape)}",
            advice="Call lora_fx.unload first, and inject again after the change.",
        )
    own_parameters(module)[name] = param


def _refuse_replacing(module: nn.Module, held: Binding, name: str, param: object) -> None:
    """Refuse what pruning and weight_norm register in the place of an adapted weight.

    Raises:
        WeightWriteError: an effective weight is registered as a Parameter, or an adapted weight is gone.
    """
    gone = [n for n in held.sites if n != name and _is_gone(module, n)]
    if not gone and not isinstance(param, EffectiveWeight):
        return
    raise WeightWriteError(
        f"{gone[0] if gone else name!r} of {held.base_class.__name__}",
        expected="an adapted weight to stay in its module",
        got=f"a new parameter {name!r} in its place, as pruning or weight_norm after the adapters makes",
        advice=("Put it back (register_parameter). " if gone else "")
        + "Call lora_fx.unload first, or prune and reparametrize before the adapters.",
    )


def _is_gone(module: nn.Module, name: str) -> bool:
    return own_parameters(module).get(name) is None and own_buffers(module).get(name) is None


def delattr_of(base: type[nn.Module]) -> Callable[[nn.Module, str], None]:
    """Return the ``__delattr__`` of a subclass of ``base``."""

    def delete_attribute(self: nn.Module, name: str) -> None:
        """Delete an attribute; an adapted weight stays, as weight_norm and its like would lose its adapter.

        Raises:
            WeightWriteError: the attribute is an adapted weight.
        """
        held = binding(self)
        if held is not None and name in held.sites:
            frame = inspect.currentframe()
            if frame is not None and is_read_by(frame.f_back, "torch.distributed.fsdp."):
                raise WeightWriteError(
                    f"{name!r} of {base.__name__}",
                    expected="an adapted weight to stay in its module",
                    got="FullyShardedDataParallel (FSDP1), which puts a flat parameter in its place",
                    advice="Use torch.distributed.fsdp.fully_shard (FSDP2), which keeps parameters apart.",
                )
            raise WeightWriteError(
                f"{name!r} of {base.__name__}",
                expected="an adapted weight to stay in its module",
                got="its deletion, as a parametrization added after the adapters begins with",
                advice="Call lora_fx.unload first, or add the parametrization before the adapters.",
            )
        base.__delattr__(self, name)

    return delete_attribute


def loader_of(base: type[nn.Module]) -> Callable[..., None]:
    """Return the ``_load_from_state_dict`` of a subclass of ``base``."""
    own_loader: Any = vars(nn.Module)["_load_from_state_dict"]
    load: Any = getattr(base, "_load_from_state_dict", own_loader)

    def load_from_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Load, and note which Parameters were assigned and not written into (``assign=True``)."""
        before = dict(own_parameters(self))
        load(self, *args, **kwargs)
        held, now = binding(self), own_parameters(self)
        if held is not None:
            held.assigned.update({n: id(old) for n, old in before.items() if now.get(n) is not old})

    return load_from_state_dict
