"""Refuse models that cannot take adapters: already wrapped, adapted by peft, or not initialised."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lora_fx.errors import PlanError, WrappedModelError
from lora_fx.kinds.spread import is_sharded
from lora_fx.passes.registers import WRAPPED
from lora_fx.passes.runtime import binding, injected

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")
_FIRST = "Inject first, then wrap: gradients of adapters that are added later are not synchronised."
_SPLIT = (
    "Inject first, then parallelize_module (or fully_shard): adapters are laid out beside what they adapt."
    " What transformers split at loading is loaded without tp_plan, injected, and given parallelize_module."
)
_COMPILED = "Inject into its _orig_mod, or before torch.compile; the compiled model then sees the adapters."
_INSIDE = "Inject first, then wrap: names that a wrapper changes would fit no other model."
_PEFT = (
    "Take peft's adapters off first: unload(), or merge_and_unload() to keep what they learned. A folder that"
    " peft saved is read into the plain model by lora_fx.load_adapter(model, folder)."
)
_OFFLOADED = "Inject before dispatching: offloaded weights are in the model only while it runs."


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if adapters put into this model would not be synchronised, or not be seen.

    Raises:
        WrappedModelError: the model is, or holds, a DDP, DataParallel or FSDP wrapper, was given to
            ``fully_shard``, has parameters that are DTensors (tensor parallelism), is what
            ``torch.compile`` returned, has weights that accelerate keeps elsewhere, or has submodules
            inside a checkpoint_wrapper or compiled one by one.
    """
    for path, module in model.named_modules():
        names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.")}
        found = next((w for w in _WRAPPERS if w in names), None)
        if found is not None:
            raise _refusal(path or "the model", found, _FIRST)
        if not path and "OptimizedModule" in names:
            raise _refusal("the model", "what torch.compile returned", _COMPILED)
        inner = WRAPPED.intersection(name for name, _ in module.named_children())
        if path and inner:
            raise _refusal(path, f"a wrapper that keeps its module as {min(inner)}", _INSIDE)
        if any(getattr(hook, "offload", False) for hook in _hooks(module)):
            raise _refusal(path or "the model", "weights that accelerate offloads", _OFFLOADED)
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise _refusal(name, "a DTensor parameter", _SPLIT)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return accelerate's hooks of a module: one, or the parts of a sequence."""
    hook = module.__dict__.get("_hf_hook")
    return (hook, *getattr(hook, "hooks", ()))


def refuse_parts(model: nn.Module) -> None:
    """Raise if a part of the model has adapters of its own, or shares those of what it is a part of.

    Raises:
        WrappedModelError: the model is a PeftModel, or has peft's layers.
        PlanError: adapters were injected into a part of the model, or into a whole that it is part of.
    """
    record = injected(model)
    for path, module in model.named_modules():
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
            raise _refusal(path or "the model", f"peft's {type(module).__name__}", _PEFT)
        held = binding(module)
        if held is not None and (record is None or held.state is not record.state):
            raise PlanError(
                path or "the model",
                expected="adapters of the whole model, or none",
                got="adapters that were injected into a part of it, or into what it is a part of",
                advice="Inject into the whole model, with Skip for what is to stay, or unload first.",
            )


def refuse_lazy(model: nn.Module) -> None:
    """Raise if a parameter has no shape yet; its module changes its class when it gets one.

    Raises:
        PlanError: the model has uninitialised parameters.
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise PlanError(
            ", ".join(lazy[:5]),
            expected="parameters with a shape",
            got="uninitialised ones, of lazy modules",
            advice="Run the model once on example inputs, and plan or inject then.",
        )


def _refusal(where: str, got: str, advice: str) -> WrappedModelError:
    return WrappedModelError(where, expected="a model that is not yet wrapped", got=got, advice=advice)
