"""What the root of an injected model answers for all of it: ties, and parameters by name.

Tied weights share one adapter: the same A and B are registered on every owner. What replaces
Parameters (``to_empty``, ``load_state_dict(assign=True)``) gives every owner its own; the root ties
them again, ``W0`` as well as A and B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import WeightWriteError
from lora_fx.passes.registers import module_at, own_parameters
from lora_fx.passes.runtime import Injected, binding, injected
from lora_fx.passes.synchronised import unwatch_wrappers

Member = tuple[nn.Module, str]
"""A module and the name of one of its Parameters."""


def attributes(base: type[nn.Module]) -> dict[str, Any]:
    """Return what the subclass of a root's class overrides."""
    body: dict[str, Any] = {"_apply": _apply_of(base), "get_parameter": _get_parameter_of(base)}
    if hasattr(base, "resize_token_embeddings"):
        body["resize_token_embeddings"] = _resize_of(base)
    return body


def watch(model: nn.Module) -> None:
    """Tie again after each ``load_state_dict``, of the model or of what it lies in."""
    register: Any = model.register_load_state_dict_post_hook
    register(_tie_loaded)


def unwatch(model: nn.Module) -> None:
    """Take ``watch`` back."""
    unwatch_wrappers(model)
    hooks: dict[int, Any] = model.__dict__["_load_state_dict_post_hooks"]
    for key in [key for key, hook in hooks.items() if hook is _tie_loaded]:
        del hooks[key]


def ties(model: nn.Module, record: Injected) -> Iterator[list[Member]]:
    """Yield the owners of each adapted weight that has several, and of each of its adapters' tensors."""
    for adapter, groups in record.ties.items():
        for names in groups:
            members = [_member(model, name) for name in names]
            yield members
            specs = [held.sites[n][adapter] for m, n in members if (held := binding(m)) is not None]
            for own_names in zip(*(spec.names for spec in specs), strict=True):
                yield [(module, name) for (module, _), name in zip(members, own_names, strict=True)]


def _member(model: nn.Module, name: str) -> Member:
    path, _, attribute = name.rpartition(".")
    return module_at(model, path), attribute


def _parameter(member: Member) -> nn.Parameter | None:
    return own_parameters(member[0]).get(member[1])


def _tie(members: list[Member], parameter: nn.Parameter | None) -> None:
    for module, name in members:
        own_parameters(module)[name] = parameter


def _apply_of(base: type[nn.Module]) -> Callable[..., nn.Module]:
    inherited: Any = vars(nn.Module)["_apply"]
    apply_base: Any = getattr(base, "_apply", inherited)

    def apply_and_tie(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Convert every tensor (``to``, ``to_empty``); what was tied stays tied.

        Adapters that leave the meta device hold NaN until they are loaded or given their first values:
        what lay in that memory before is no adapter.
        """
        record = injected(self)
        bare = [member for member in _adapter_tensors(self) if _on_meta(member)]
        groups = [] if record is None or not recurse else list(ties(self, record))
        tied = [group for group in groups if len({id(_parameter(m)) for m in group}) == 1]
        apply_base(self, fn, recurse)
        for group in tied:
            _tie(group, _parameter(group[0]))
        with torch.no_grad():
            for parameter in (_parameter(member) for member in bare):
                if parameter is not None and not parameter.is_meta:
                    parameter.fill_(torch.nan)
        return self

    return apply_and_tie


def _adapter_tensors(model: nn.Module) -> Iterator[Member]:
    for module in model.modules():
        held = binding(module)
        for specs in () if held is None else held.sites.values():
            yield from ((module, name) for spec in specs.values() for name in spec.names)


def _on_meta(member: Member) -> bool:
    parameter = _parameter(member)
    return parameter is not None and parameter.is_meta


def _tie_loaded(model: nn.Module, keys: Any) -> None:
    """Tie again what ``load_state_dict(assign=True)`` gave every owner its own of.

    Raises:
        WeightWriteError: the owners of one weight were given different values.
    """
    del keys
    record = injected(model)
    if record is None:
        return
    for group in ties(model, record):
        given = [member for member in group if member[1] in _assigned(member[0])]
        before = {_assigned(m).get(name, id(_parameter((m, name)))) for m, name in group}
        if not given or len(before) > 1:
            continue
        first, *others = [_parameter(member) for member in given]
        if any(not _equal(first, other) for other in others):
            raise WeightWriteError(
                " and ".join(f"{name!r} of {type(module).__name__}" for module, name in group),
                expected="one value for what is tied",
                got="different ones in the state dict",
                advice="Load without assign=True, or call lora_fx.unload first and untie them.",
            )
        _tie(group, first)
    for module in model.modules():
        _assigned(module).clear()


def _assigned(module: nn.Module) -> dict[str, int]:
    held = binding(module)
    return {} if held is None else held.assigned


def _equal(one: nn.Parameter | None, other: nn.Parameter | None) -> bool:
    if one is None or other is None or one.is_meta or other.is_meta:
        return one is other or (one is not None and other is not None)
    return one is other or torch.equal(one, other)


def _get_parameter_of(base: type[nn.Module]) -> Callable[[nn.Module, str], nn.Parameter]:
    def get_parameter(self: nn.Module, target: str) -> nn.Parameter:
        """Return a Parameter by its qualified name: of an adapted weight, ``W0``."""
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        held, parameter = binding(module), own_parameters(module).get(name)
        if held is not None and name in held.sites and parameter is not None:
            return parameter
        return base.get_parameter(self, target)

    return get_parameter


def _resize_of(base: Any) -> Callable[..., Any]:
    resize: Any = base.resize_token_embeddings

    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Resize the embeddings, if no adapter hangs on their size.

        Raises:
            WeightWriteError: the embedding or the head is adapted.
        """
        ends = {"the embedding": self.get_input_embeddings(), "the head": self.get_output_embeddings()}
        adapted = [
            n for n, m in ends.items() if m is not None and (held := binding(m)) is not None and held.sites
        ]
        if adapted:
            raise WeightWriteError(
                f"{base.__name__}.resize_token_embeddings",
                expected="embeddings without adapters",
                got=f"adapters on {' and '.join(adapted)}",
                advice="Call lora_fx.unload first, resize, and inject again.",
            )
        return resize(self, *args, **kwargs)

    return resize_token_embeddings
