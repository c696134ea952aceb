"""Reading example inputs: what a user gives, or what the model says of itself."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lora_fx.errors import InputError
from lora_fx.passes.aliases import geometry_of

_ACCEPTED = "a tensor, a tuple of positional arguments, a mapping of keyword arguments, or (args, kwargs)"


@dataclass(frozen=True, eq=False)
class Examples:
    """Arguments to run a model with, and where they came from."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: str


def read_examples(model: nn.Module, example_inputs: Any) -> Examples:
    """Return the arguments that ``example_inputs`` means; None asks the model itself.

    Raises:
        InputError: it is none of the accepted forms, or None and the model has no inputs of its own.
    """
    if example_inputs is None:
        found = own_examples(model)
        if found is None:
            raise InputError(
                "example_inputs",
                expected=_ACCEPTED,
                got=f"None, and {type(model).__name__} has no example_input_array or dummy_inputs",
                advice="Pass inputs that the model can be run with.",
            )
        return found
    args, kwargs = _arguments(example_inputs)
    for path, tensor in tensors_in((args, kwargs)):
        if tensor.is_nested:
            raise InputError(
                f"example_inputs, {'.'.join(path)}",
                expected="a tensor with one size in each dimension",
                got="a nested tensor",
                advice="Pass padded examples, torch.nested.to_padded_tensor(x, 0.0); the adapted model then "
                "takes nested tensors where the base does.",
            )
    return Examples(args, kwargs, "given")


def own_examples(model: nn.Module) -> Examples | None:
    """Return the model's ``example_input_array`` (Lightning) or ``dummy_inputs`` (transformers)."""
    given = getattr(model, "example_input_array", None)
    if given is not None:
        args, kwargs = _arguments(given)
        return Examples(args, kwargs, f"{type(model).__name__}.example_input_array")
    given = getattr(model, "dummy_inputs", None)
    # transformers answers with token ids for every model, also for those that take something else.
    if not isinstance(given, Mapping) or getattr(model, "main_input_name", "input_ids") not in given:
        return None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    kwargs = {str(k): v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
    return Examples((), kwargs, f"{type(model).__name__}.dummy_inputs")


def _arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Tensor):
        return (given,), {}
    if _is_keywords(given):
        return (), dict(given)
    if isinstance(given, tuple) and hasattr(given, "_fields"):
        return (given,), {}  # a packed sequence, say: one argument
    if isinstance(given, tuple):
        if len(given) == 2 and isinstance(given[0], (tuple, list)) and _is_keywords(given[1]):
            return tuple(given[0]), dict(given[1])
        return tuple(given), {}
    raise InputError(
        "example_inputs",
        expected=_ACCEPTED,
        got=f"a {type(given).__name__}",
        advice="Wrap a single argument in a tuple: (value,).",
    )


def _is_keywords(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def own_copy(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return copies for one run, which may write into its inputs, or take entries out of them.

    What is one tensor or shares memory among the inputs does so among the copies. One that requires a
    gradient does so as a leaf.
    """
    distinct = {id(t): t for _, t in tensors_in((args, kwargs))}
    held: dict[int, list[Tensor]] = {}
    for tensor in distinct.values():
        shares = geometry_of(tensor) is not None and type(tensor) is Tensor
        key = _memory(tensor) if shares else -id(tensor)
        held.setdefault(key, []).append(tensor)
    copies = {id(t): copied for group in held.values() for t, copied in _copied(group)}
    return fresh(args, copies), {name: fresh(value, copies) for name, value in kwargs.items()}


def _memory(tensor: Tensor) -> int:
    return StorageWeakRef(tensor.untyped_storage()).cdata  # type: ignore[no-untyped-call, no-any-return]


def _copied(sharing: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (tensor, its copy) of tensors that lie in the same memory."""
    storage: Any = sharing[0].untyped_storage() if len(sharing) > 1 else None
    storage = None if storage is None else storage.clone()
    for tensor in sharing:
        made = tensor.detach()
        if storage is None:
            made = made.clone()
        else:
            place = made.storage_offset(), made.shape, made.stride()
            made = torch.empty(0, dtype=made.dtype, device=made.device).set_(storage, *place)
        yield tensor, made.requires_grad_(tensor.requires_grad)


def fresh(value: Any, copies: Mapping[int, Tensor] | None = None) -> Any:
    """Return the same tensors, or their copies, in new containers and copied objects."""
    copies = {} if copies is None else copies
    if isinstance(value, Tensor):
        return copies.get(id(value), value)
    if type(value) is dict:
        return {k: fresh(v, copies) for k, v in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(fresh(v, copies) for v in value)
    if value is None or isinstance(value, nn.Module) or callable(value):
        return value
    return copy.deepcopy(value, {id(t): copies.get(id(t), t) for _, t in tensors_in(value)})


def named_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the arguments with a name made of the argument's and the way to it."""
    names = _positional_names(model)
    for index, value in enumerate(args):
        name = names[index] if index < len(names) else f"arg_{index}"
        for path, tensor in tensors_in(value):
            yield "_".join([name, *path]), tensor
    for name, value in kwargs.items():
        for path, tensor in tensors_in(value):
            yield "_".join([name, *path]), tensor


def _positional_names(model: nn.Module) -> list[str]:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds]


def tensors_in(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yield every tensor inside nested containers, dataclasses and plain objects, each object once."""
    yield from _tensors_in(value, path, set())


def _tensors_in(
    value: Any, path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    if len(path) > _DEPTH or id(value) in seen:
        return
    for key, child in children(value):
        if child is not None and not isinstance(child, (str, int, float)):
            seen.add(id(value))
            yield from _tensors_in(child, (*path, key), seen)


_DEPTH = 8


def children(value: Any) -> list[tuple[str, Any]]:
    """Return what a container, a dataclass or a plain object holds, by key, index or attribute."""
    if isinstance(value, Mapping):
        return [(str(k), v) for k, v in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(str(i), v) for i, v in enumerate(value)]
    if isinstance(value, (nn.Module, type, torch.dtype, torch.device)) or callable(value):
        return []
    if is_dataclass(value):
        return [(f.name, getattr(value, f.name, None)) for f in fields(value)]
    slots = [name for cls in type(value).__mro__ for name in _listed(getattr(cls, "__slots__", ()))]
    held = {n: getattr(value, n) for n in slots if not n.startswith("__") and hasattr(value, n)}
    return [(str(k), v) for k, v in {**held, **getattr(value, "__dict__", {})}.items()]


def _listed(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
