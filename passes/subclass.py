"""The dynamic subclass that an adapted module gets, and the properties it reads its weights through.

For every adapted weight ``name`` of the module, the subclass of the module's *own* class has::

    name        ->  W   (a property; ``_parameters[name]`` keeps W0, so the state_dict is unchanged)
    name__W0    ->  what a branch starts from, raw
    name__lora  ->  the active adapter's parts (name__lora_t: for the transposed weight)

and, where the module's forward is stock, a ``forward`` that computes the branch. The subclass keeps
``__module__`` and ``__qualname__`` (tracers ask them whether a module is torch's own).
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from lora_fx.kinds import KINDS
from lora_fx.kinds.base import LiveParts, transposed
from lora_fx.passes import root
from lora_fx.passes.assigning import delattr_of, loader_of, register_parameter
from lora_fx.passes.graph_copies import deepcopy_graph, reduce_graph
from lora_fx.passes.guard import guarded
from lora_fx.passes.inner_forwards import cells_of, point
from lora_fx.passes.registers import own_parameters
from lora_fx.passes.runtime import (
    BINDING,
    Binding,
    binding,
    branch_base,
    current_weight,
    is_own,
    live_parts,
)
from lora_fx.passes.stock_forward import (
    LORA_SUFFIX,
    TRANSPOSED_SUFFIX,
    W0_SUFFIX,
    compile_forward,
    left_out,
    rewrite,
    stock_home,
    trace_stock,
)

_classes: dict[tuple[Any, ...], type[nn.Module]] = {}
_made: set[type[nn.Module]] = set()
"""The subclasses of adapted modules, as against what others make of them."""
_first: dict[type[nn.Module], type[nn.Module]] = {}
"""Of a class that others put on top and that was put over another: the one that they made."""


def attach(module: nn.Module) -> None:
    """Give the module the subclass that its Binding calls for; its own class where nothing is left."""
    held = module.__dict__[BINDING]
    forward, former = _forward(module, held), type(module).forward
    wrapped = list(cells_of(module, former))
    _set_class(module, _subclass(held.base_class, frozenset(held.sites), forward, is_root=held.root))
    point(module, wrapped)
    _rebind(module, held, former)


def detach(module: nn.Module) -> None:
    """Give the module its own class and its own instance-level forwards back."""
    held: Binding = module.__dict__[BINDING]
    former = type(module).forward
    wrapped = list(cells_of(module, former))
    _set_class(module, held.base_class)
    point(module, wrapped)
    for attribute, value in held.rebound.items():
        module.__dict__[attribute] = value
    held.rebound.clear()
    for attribute, _ in _bound_forwards(module, former):
        module.__dict__[attribute] = types.MethodType(held.base_class.forward, module)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give the module a class, under those that others put on top since: fully_shard, parametrizations."""
    held: Binding = module.__dict__[BINDING]
    module.__class__ = _under(type(module), held.base_class, cls)


def _under(current: type[nn.Module], base: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """Return ``current`` with ``cls`` in the place of ``base``, or of the subclass of it made here."""
    if current is base or current in _made:
        return cls
    first = _first.get(current, current)
    bases = tuple(_under(b, base, cls) if issubclass(b, base) else b for b in first.__bases__)
    if bases == first.__bases__:
        return first
    key = ("on top", first, bases)
    if key not in _classes:
        body = {k: v for k, v in vars(first).items() if k not in {"__dict__", "__weakref__"}}
        _classes[key] = _new_class(cls, bases, body, first.__name__)
        _first[_classes[key]] = first
    return _classes[key]


def stock_class(module: nn.Module, homes: tuple[type[nn.Module], ...]) -> type[nn.Module] | None:
    """Return the one of these classes whose very forward the module's class runs, if there is one."""
    found = stock_home(own_class(module))
    return None if found is None or found[0] not in homes else found[0]


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module had before it was adapted."""
    held = binding(module)
    return type(module) if held is None else held.base_class


def _forward(module: nn.Module, held: Binding) -> Callable[..., Any] | None:
    if held.frozen_norm:
        return _frozen_norm_forward(held.base_class)
    if not held.branched:
        return None
    key = ("forward", held.base_class, frozenset(held.branched.items()), constants(module))
    if key not in _forwards:
        graph = trace_stock(module, held.base_class)
        rewrite(graph, held.branched)
        forward = compile_forward(graph, held.base_class.__name__)
        _forwards[key] = _with_defaults(held.base_class, forward)
    return _forwards[key]


def _with_defaults(base: type[nn.Module], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run the module's own forward where an argument is given that the rewritten one leaves out."""
    absent = left_out(base)
    if not absent:
        return forward
    first, names = min(absent) - 1, [name for name, _ in absent.values()]

    def choose(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute the branch, or read the weight by its property where arguments are not the default."""
        if len(args) > first or any(name in kwargs for name in names):
            return base.forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    choose.__lora_fx_source__ = forward.__lora_fx_source__  # type: ignore[attr-defined]
    return choose


_forwards: dict[tuple[Any, ...], Callable[..., Any]] = {}


def constants(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """What tracing bakes into a stock forward: the module's plain attributes, and which are None."""
    plain = {k: repr(v) for k, v in module.__dict__.items() if _is_constant(k, v)}
    none = {k: "None" for k, v in own_parameters(module).items() if v is None}
    return tuple(sorted({**plain, **none}.items()))


def _is_constant(name: str, value: Any) -> bool:
    if name.startswith("_") and name != "_reversed_padding_repeated_twice":
        return False
    return name != "training" and (value is None or isinstance(value, (int, float, str, bool, tuple, list)))


def _frozen_norm_forward(base: type[nn.Module]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Normalise with the running statistics, in train mode too."""
        held = binding(self)
        if not self.training or (held is not None and held.active("running_mean") is not None):
            return base.forward(self, *args, **kwargs)
        self.training = False
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            self.training = True

    return forward


def _subclass(
    base: type[nn.Module], names: frozenset[str], forward: Callable[..., Any] | None, *, is_root: bool
) -> type[nn.Module]:
    how = forward if forward is None or hasattr(forward, "__lora_fx_source__") else "norm"
    key = (base, names, how, is_root)
    if key not in _classes:
        body: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce_ex,
            "register_parameter": register_parameter,
            "__delattr__": delattr_of(base),
            "_load_from_state_dict": loader_of(base),
        }
        if is_root:
            body.update(root.attributes(base))
        for name in names:
            body[name] = property(_weight_getter(name))
            body[name + W0_SUFFIX] = property(_base_getter(name))
            body[name + LORA_SUFFIX] = property(_parts_getter(name))
            body[name + TRANSPOSED_SUFFIX] = property(_transposed_parts_getter(name))
        if names:
            for kind in KINDS:
                body.update(kind.attributes(base))
        if forward is not None:
            body["forward"] = forward
        if issubclass(base, fx.GraphModule):
            # recompile() gives each class a __call__ that asks its base's: ours must not ask itself.
            body["__call__"] = nn.Module.__call__
            body.update({"__deepcopy__": deepcopy_graph, "__reduce_ex__": reduce_graph})
        if names and forward is not None:
            body["__setattr__"] = _setattr(base)
        _classes[key] = _new_class(base, (base,), body)
        _made.add(_classes[key])
    return _classes[key]


def _new_class(
    base: type[nn.Module], bases: tuple[type, ...], body: dict[str, Any], name: str | None = None
) -> type[nn.Module]:
    """Make a class by the base's own metaclass."""
    metaclass: Any = type(base)
    made: type[nn.Module] = metaclass(name or base.__name__, bases, body)
    return made


def _weight_getter(name: str) -> Callable[[nn.Module], Tensor | None]:
    def get(self: nn.Module) -> Tensor | None:
        try:
            frame = None if torch.compiler.is_compiling() else inspect.currentframe()
            reader = None if frame is None else frame.f_back
            weight = current_weight(self, name, reader)
            if weight is None or frame is None or is_own(self, weight):
                return weight
            return guarded(weight, reader, f"{name!r} of {own_class(self).__name__}")
        except AttributeError as error:
            # nn.Module.__getattr__ would answer next, with W0: silence where there is an error.
            raise RuntimeError(f"the adapted weight {name!r} cannot be computed: {error}") from error

    return get


def _base_getter(name: str) -> Callable[[nn.Module], Tensor]:
    def get(self: nn.Module) -> Tensor:
        return branch_base(self, name)

    return get


def _parts_getter(name: str) -> Callable[[nn.Module], LiveParts]:
    def get(self: nn.Module) -> LiveParts:
        return live_parts(self, name)

    return get


def _transposed_parts_getter(name: str) -> Callable[[nn.Module], LiveParts]:
    def get(self: nn.Module) -> LiveParts:
        return tuple(transposed(part) for part in live_parts(self, name))

    return get


def _setattr(base: type[nn.Module]) -> Callable[[nn.Module, str, Any], None]:
    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        """Set an attribute; one that the rewritten forward has baked in is baked in anew."""
        base.__setattr__(self, name, value)
        held = binding(self)
        if held is not None and held.branched and _is_constant(name, value):
            attach(self)

    return set_attribute


def _reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Copy and pickle as the module's own class, and adapt the copy anew."""
    del protocol
    held: Binding = self.__dict__[BINDING]
    own_state: Any = held.base_class.__getstate__
    state = own_state(self)
    return (_blank, (held.base_class,), dict(state))


class _Rebuilding:
    """Marks a copy that waits for its state."""


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = _new_class(base, (_Rebuilding, base), {"__setstate__": _set_state})
    return cls.__new__(cls)


def _set_state(self: nn.Module, state: dict[str, Any]) -> None:
    held: Binding = state[BINDING]
    self.__class__ = held.base_class
    held.base_class.__setstate__(self, state)  # type: ignore[no-untyped-call]
    # A copied instance-level forward is bound to the original: bind it anew.
    rebound, held.rebound = held.rebound, {}
    for attribute, value in rebound.items():
        self.__dict__[attribute] = _bound_to(self, value)
    attach(self)


def _bound_to(module: nn.Module, value: Any) -> Any:
    return types.MethodType(value.__func__, module) if isinstance(value, types.MethodType) else value


def _rebind(module: nn.Module, held: Binding, former: Any) -> None:
    """Point instance attributes that hold a forward of the class (accelerate's) at the one of now."""
    for attribute, value in _bound_forwards(module, held.base_class.forward):
        held.rebound[attribute] = value
    bound = {attribute for attribute, _ in _bound_forwards(module, former)} | set(held.rebound)
    for attribute in bound:
        if isinstance(module.__dict__.get(attribute), types.MethodType):
            module.__dict__[attribute] = types.MethodType(type(module).forward, module)


def _bound_forwards(module: nn.Module, function: Any) -> list[tuple[str, types.MethodType]]:
    """Return the instance attributes that hold this function, bound to the module."""
    return [
        (attribute, value)
        for attribute, value in module.__dict__.items()
        if isinstance(value, types.MethodType) and value.__self__ is module and value.__func__ is function
    ]
