"""Reading one intercepted torch call: its tensors, its canonical name, its spelling in a graph."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_fx.kinds.names import canonical_op

Path = tuple[int, ...]
PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})
"""What most arguments are, that hold no tensor."""


class Function(NamedTuple):
    """What is known of an intercepted function, whatever it is called with."""

    func: Any
    name: str
    op: str
    """Its canonical name; that of reading ``x.T`` is ``"T"``."""
    attribute: str
    """What a ``__get__`` or ``__set__`` is about, else nothing."""
    in_place: bool
    """Whether its name says that it writes into its first argument."""
    operator: bool
    """Whether it is an operator with a schema, which says what it writes into."""
    method: bool
    """Whether it is a method of tensors."""


class Outcome(NamedTuple):
    """What one call returned (with the way to each tensor), which arguments changed, all arguments."""

    made: list[tuple[Path, Tensor]]
    changed: list[Tensor]
    given: list[Tensor]

    def written(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the arguments that the call wrote into; views of them share their version."""
        if "out" in kwargs:
            named: list[Tensor] = []
            collect(kwargs["out"], named)
            if named:
                return named
        if args and (function.in_place or kwargs.get("inplace")):
            first = args[0]
            # An inference tensor has no version to compare: its operation's name must do.
            if isinstance(first, Tensor) and (first.is_inference() or _among(first, self.changed)):
                return [first]
        if not self.changed and function.op not in _MOVING:
            return []
        returned = [t for t in self.changed if any(t is r for _, r in self.made)]
        found = returned or [*self.changed, *_statistics(function.op, args, kwargs)]
        return list({id(t): t for t in found}.values())

    @property
    def untouched(self) -> bool:
        """Whether the one result is an argument: ``contiguous``, ``to``, dropout in eval mode."""
        return len(self.made) == 1 and _among(self.made[0][1], self.given)


def _among(tensor: Tensor, others: list[Tensor]) -> bool:
    for other in others:  # noqa: SIM110 - asked for every call, and any() takes twice as long
        if other is tensor:
            return True
    return False


_MOVING = {"batch_norm": "training", "instance_norm": "use_input_stats"}
"""The sixth argument of what moves running statistics: whether it does."""


def _statistics(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the running statistics that a normalisation moves, which no version tells."""
    if op not in _MOVING or not (args[5] if len(args) > 5 else kwargs.get(_MOVING[op])):
        return []
    held = (*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var"))
    return [t for t in held if isinstance(t, Tensor)]


def collect(value: Any, into: list[Tensor]) -> None:
    """Append the tensors inside an argument, in order."""
    if isinstance(value, (tuple, list)):
        for item in value:
            if type(item) in PLAIN:
                continue
            if isinstance(item, Tensor):
                into.append(item)
            else:
                collect(item, into)
    elif isinstance(value, Tensor):
        into.append(value)
    elif isinstance(value, dict):
        collect(tuple(value.values()), into)
    elif isinstance(value, slice):
        collect((value.start, value.stop, value.step), into)


def collect_paths(value: Any, path: Path, into: list[tuple[Path, Tensor]]) -> None:
    """Append the tensors inside a result, with the indices that lead to each."""
    if isinstance(value, Tensor):
        into.append((path, value))
    elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        for index, item in enumerate(value):
            collect_paths(item, (*path, index), into)


def version_of(tensor: Tensor) -> int:
    """Return the number of writes to a tensor's memory, or -1 for an inference tensor."""
    return -1 if tensor.is_inference() else tensor._version


def versions_of(tensors: list[Tensor]) -> list[int]:
    """Return the versions of several tensors."""
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # one of them is an inference tensor
        return [version_of(t) for t in tensors]


def changed_since(tensors: list[Tensor], versions: list[int]) -> list[Tensor]:
    """Return those of the tensors that were written into since they had these versions."""
    now = versions_of(tensors)
    if now == versions:
        return []
    return [t for t, before, after in zip(tensors, versions, now, strict=True) if before != after]


def read_function(func: Any) -> Function:
    """Return what is known of an intercepted function."""
    name = getattr(func, "__name__", "")
    if name in {"__get__", "__set__"}:
        attribute = _attribute(func)
        op = attribute if name == "__get__" else name
    else:
        attribute, op = "", canonical_op(func)
    in_place = (op.endswith("_") and op != "requires_grad_") or op == "setitem"
    method = getattr(torch.Tensor, name, None) is func
    return Function(func, name, op, attribute, in_place, hasattr(func, "_schema"), method)


def _attribute(func: Any) -> str:
    descriptor = getattr(func, "__self__", None)
    getter = getattr(descriptor, "fget", None)
    return str(getattr(descriptor, "__name__", None) or getattr(getter, "__name__", "attribute"))


def may_write(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether a call could write into its arguments; batch norm's buffers are kept elsewhere.

    The functions of ``torch.nn.functional`` hand on their options by keyword, whatever the caller did.
    """
    if function.in_place or (function.operator and schema_writes(function.func, args, kwargs)):
        return True
    return bool(kwargs) and (
        "out" in kwargs or bool(kwargs.get("inplace")) or kwargs.get("max_norm") is not None
    )


def schema_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an operator's own schema says it writes into."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            collect(given, found)
    return found


_OPERATORS = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}


def spell(function: Function, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Return the node kind, target and arguments that write a call down."""
    name = function.name
    if name == "__get__":
        return "call_function", getattr, (args[0], function.attribute)
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name], args
    if name == "__rmatmul__":
        return "call_function", torch.matmul, (args[1], args[0])
    if function.method and args and isinstance(args[0], Tensor):
        return "call_method", name, args
    return "call_function", function.func, args
