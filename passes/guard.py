"""What reading an adapted weight yields: ``W``, guarded against writes that would be lost.

``W`` is computed at each reading, so ``module.weight.data.fill_(0)`` or ``nn.init`` on it would write
into a tensor that nobody reads again. A guarded weight computes like any tensor and raises on a write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_fx.errors import WeightWriteError

_HARMLESS = frozenset({"retain_grad", "share_memory_"})
_HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook"})
"""What hangs on a tensor that nobody reads again, and would never fire."""
_MAY_KEEP = frozenset({"clamp_", "clamp_min_", "clamp_max_", "clip_", "mul_", "div_"})
"""What may leave all values as they are, and then writes nothing: a clamp to bounds that they are within
(Gemma 3n's forward, in training), a factor of one (RWKV's, in its first layers)."""
_ARRAYS = frozenset({"numpy", "__array__"})
_SHARED = frozenset({"__dlpack__"})
"""What hands the memory itself to another library, which may write into it: take a clone's."""


class _ReadOnlyStorage(torch.UntypedStorage):
    """The memory of an effective weight: whoever writes to it writes to what nobody reads again."""

    def _refuse(self, *values: Any, **named: Any) -> Any:
        del values, named
        raise _refusal("untyped_storage", (), {})

    fill_ = copy_ = resize_ = __setitem__ = _refuse


class _ReadOnlyTypedStorage(torch.TypedStorage):
    """The same memory, as ``Tensor.storage()`` gives it."""

    def _refuse(self, *values: Any, **named: Any) -> Any:
        del values, named
        raise _refusal("storage", (), {})

    fill_ = copy_ = resize_ = __setitem__ = _refuse

    def _new_wrapped_storage(self, untyped_storage: torch.UntypedStorage) -> Any:
        """Give copies their own class back: they are nobody's weight."""
        plain: Any = torch.TypedStorage
        return plain(wrap_storage=untyped_storage, dtype=self.dtype, _internal=True)


_plainly: Any = vars(torch)["_C"].DisableTorchFunctionSubclass
"""Context in which subclasses compute as plain tensors; torch has no public spelling."""


class EffectiveWeight(Tensor):
    """The effective weight ``W`` of an adapted parameter; a write raises ``WeightWriteError``.

    Only what would leave every value as it is, a clamp to bounds that all are within, say, is let pass.
    """

    written_as: str = "an adapted weight"
    """The weight's attribute and its module's class, for what is said of a write."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute as on a plain tensor; refuse what would write into the weight."""
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]  # an overload's: "fill_.Scalar"
        if _writes(name, args, kwargs):
            if name in _MAY_KEEP and _changes_nothing(func, args, kwargs):
                return args[0]
            raise _refusal(name, args, kwargs)
        with _plainly():
            result = func(*args, **kwargs)
        if name in _ARRAYS and isinstance(result, np.ndarray):
            result.flags.writeable = False
        if name == "untyped_storage" and type(result) is torch.UntypedStorage:
            result.__class__ = _ReadOnlyStorage
        if name == "storage" and type(result) is torch.TypedStorage:
            result.__class__ = _ReadOnlyTypedStorage
        return _guard_views(result, args)

    def set_(self, *source: Any, **named: Any) -> Tensor:
        """Raise: torch does not ask ``__torch_function__`` about this write."""
        del source, named
        raise _refusal("set_", (self,), {})

    def as_subclass(self, cls: Any) -> Any:
        """Return it as another class; as a plain tensor it stays guarded, being one that computes alike."""
        made: Any = super().as_subclass(cls)
        return _marked(made, self.written_as) if type(made) is Tensor else made

    def _use_count(self) -> int:
        """Raise: ``torch.utils.swap_tensors`` asks this of both tensors before it exchanges them."""
        raise _refusal("swap_tensors", (self,), {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy the values as a plain tensor."""
        del memo
        return self.detach().clone()


def _changes_nothing(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Say whether this write, tried on a copy, leaves every value of the weight as it is."""
    if not args or args[0].is_meta:
        return False  # without values, what is done to them cannot be told
    with _plainly(), torch.no_grad():
        weight = args[0].detach()
        copy = weight.clone()
        func(copy, *args[1:], **kwargs)
        return torch.equal(copy, weight)


def refuse_written(where: str) -> WeightWriteError:
    """Return the error for an effective weight that was written past its guard, found at the next reading."""
    return WeightWriteError(
        where,
        expected="a write to the base weight W0",
        got="a write to the effective weight W past its guard (Tensor._make_subclass, torch.Tensor(W), "
        "another library's memory): it is lost",
        advice="Write to dict(module.named_parameters())[name], which is W0, or unload first.",
    )


def _refusal(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> WeightWriteError:
    where = _named((*args, *kwargs.values()))
    return WeightWriteError(
        f"{where}, Tensor.{name}",
        expected="a write to the base weight W0",
        got="a write to the effective weight W, which is computed anew at each reading",
        advice="Write to dict(module.named_parameters())[name], which is W0, or unload first: a "
        "parametrization goes on before the adapters. Where the model's own forward writes it, Skip this "
        "weight.",
    )


def _named(values: Sequence[Any]) -> str:
    """Name the first guarded weight among a call's arguments, and in the lists that it takes."""
    flat = [item for value in values for item in (value if isinstance(value, (tuple, list)) else (value,))]
    return next(
        (item.written_as for item in flat if isinstance(item, EffectiveWeight)), EffectiveWeight.written_as
    )


def _guard_views(result: Any, args: Sequence[Any]) -> Any:
    """Guard what shares memory with a guarded argument: views, and tuples of them."""
    if isinstance(result, (tuple, list)) and any(isinstance(r, Tensor) for r in result):
        made = [_guard_views(r, args) for r in result]
        return tuple(made) if type(result) is tuple else made if type(result) is list else result
    if type(result) is not Tensor:
        return result
    shared = next((a for a in args if isinstance(a, EffectiveWeight) and _is_alias(result, a)), None)
    return result if shared is None else _marked(result, shared.written_as)


def _marked(weight: Tensor, where: str) -> EffectiveWeight:
    marked = weight.as_subclass(EffectiveWeight)
    marked.written_as = where
    return marked


_is_alias: Callable[[Tensor, Tensor], bool] = vars(torch)["_C"]._is_alias_of


def guarded(weight: Tensor, reader: FrameType | None, where: str) -> Tensor:
    """Return the weight guarded against writes, which name it; plain where the program is being captured.

    It is plain, too, where a forward of torch's own reads it: those only read, and they take their fast
    paths (attention's, in eval) for plain tensors alone.
    """
    if torch.compiler.is_compiling() or type(weight) is not Tensor or _stock_forward(reader):
        return weight
    return _marked(weight, where)


def _stock_forward(reader: FrameType | None) -> bool:
    return (
        reader is not None
        and reader.f_code.co_name == "forward"
        and (
            str(reader.f_globals.get("__name__", "")).startswith("torch.nn.modules.")
            or reader.f_code.co_filename.startswith("<lora_fx ")
        )
    )


def _writes(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    out = kwargs.get("out")
    outs = out if isinstance(out, (tuple, list)) else (out,)
    if any(isinstance(o, EffectiveWeight) for o in outs):
        return True
    # torch.nn.init hands its tensor on by name.
    target = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
    if name.startswith("_foreach_") and name.endswith("_") and isinstance(target, (tuple, list)):
        return any(isinstance(t, EffectiveWeight) for t in target)
    if not isinstance(target, EffectiveWeight):
        return False
    in_place = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    in_place = in_place or kwargs.get("inplace") is True
    return (
        in_place
        or name in _HOOKS
        or name in _SHARED
        or name in {"__setitem__", "__set__"}
        or (name.startswith("__i") and name in _IN_PLACE)
    )


_IN_PLACE = frozenset(
    f"__i{op}__"
    for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
) | frozenset({"__ilshift__", "__irshift__"})
