"""The recorder: a TorchFunctionMode that writes every torch call of a run down as a node of an fx graph."""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from lora_fx.kinds.names import canonical_op
from lora_fx.passes.aliases import Aliases, Geometry, geometry_of, unwrapped

VALUE_LIMIT = 2**18
"""The most elements of a non-floating tensor, or of a constant, whose values a node keeps."""

_PLAIN = (str, int, float, bool, complex, type(None), torch.dtype, torch.device)


def after(call: Any, old: Any) -> Any:
    """Stand for a tensor that a call wrote into without returning it (running statistics, say)."""
    del call
    return old


class Recorder(TorchFunctionMode):
    """Records one run of one model; use it as a context around the run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.holes: list[str] = []
        self._aliases = Aliases(self._emit)
        self._paths = _first_names(model)
        self._stack: list[str] = []
        self._thread = threading.get_ident()
        self._saved: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._raised: tuple[BaseException | None, str] = (sys.exc_info()[1], "")
        self._attributes = _tensor_attributes(model)
        for name, parameter in model.named_parameters():
            self._aliases.external(parameter, self._reader(name, parameter, parameter=name))
        for name, buffer in model.named_buffers():
            self._aliases.external(buffer, self._reader(name, buffer))

    @property
    def path(self) -> str:
        """The path of the innermost module whose forward is running."""
        return self._stack[-1] if self._stack else ""

    def __enter__(self) -> Self:
        """Start to record."""
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @contextmanager
    def following_modules(self) -> Generator[None]:
        """Inside, know which module's forward is running, also when one raises."""
        before = module_hooks.register_module_forward_pre_hook(self._push)
        behind = module_hooks.register_module_forward_hook(self._pop, always_call=True)
        try:
            yield
        finally:
            before.remove()
            behind.remove()

    def input(self, name: str, tensor: Tensor) -> None:
        """Enter one tensor of the example inputs as a placeholder."""
        node = self.graph.placeholder(name)
        self._aliases.external(tensor, lambda: node)
        self._describe(node, tensor, op="placeholder")

    def output(self, leaves: Mapping[str, Tensor]) -> None:
        """End the graph with what the model returned, by the way to each tensor."""
        read = {path: self._node(tensor, "the output") for path, tensor in leaves.items()}
        only = next(iter(read.values())) if list(read) == [""] else read
        node = self.graph.output(only)
        node.meta.update(op="output", module="")

    def raised_in(self, error: BaseException) -> str:
        """Return the path of the innermost module in which an error was raised."""
        return self._raised[1] if self._raised[0] is error else ""

    def restore_written(self) -> None:
        """Write back what the run changed in parameters, inputs and other tensors from outside."""
        with torch.no_grad():
            for tensor, version, value in self._saved.values():
                if _version(tensor) != version and tensor.device.type != "meta":
                    tensor.detach().copy_(value)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call and write it down."""
        del types
        kwargs = kwargs or {}
        given: list[Tensor] = []
        _collect(args, given)
        _collect(kwargs, given)
        op = _op_of(func)
        if _may_write(func, op, args, kwargs):
            self._save(given)
        versions = [_version(t) for t in given]
        result = func(*args, **kwargs)
        if op == "__set__":
            self._assigned(func, args)
            return result
        changed = [t for t, v in zip(given, versions, strict=True) if _version(t) != v]
        made: list[tuple[tuple[int, ...], Tensor]] = []
        _collect_paths(result, (), made)
        if made or changed:
            self._record(func, op, args, kwargs, _Outcome(made, changed, given))
        return result

    def _record(
        self, func: Any, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], outcome: _Outcome
    ) -> None:
        written = outcome.written(op, args, kwargs)
        if not written and len(outcome.made) == 1 and self._is_no_op(outcome):
            return
        kind, target, call_args = _spell(func, args)
        node = self.graph.create_node(kind, target, self._nodes(call_args, op), self._nodes(kwargs, op))
        node.meta.update(op=op, module=self.path)
        if written:
            node.meta["writes"] = tuple(n for t in written if (n := self._aliases.read(t)) is not None)
        returned: set[int] = set()
        for path, tensor in outcome.made:
            facts: dict[str, Any] = node.meta if not path else {}
            value = node if not path else self._element(node, path, facts)
            returned.add(id(tensor))
            if any(tensor is t for t in written):
                self._aliases.written(tensor, value)
            else:
                self._enter(tensor, value)
            facts.update(self._facts(tensor))
        for tensor in written:
            if id(tensor) not in returned:
                self._write_unreturned(node, tensor, op, alone=len(written) == 1 and not outcome.made)

    def _write_unreturned(self, node: fx.Node, tensor: Tensor, op: str, *, alone: bool) -> None:
        if alone:
            self._aliases.written(tensor, node)
            self._describe(node, tensor, op=op)
            return
        old, path, facts = self._aliases.read(tensor), self.path, self._facts(tensor)

        def make() -> fx.Node:
            made = self.graph.call_function(after, (node, old))
            made.meta.update(facts, op="after", module=path, writes=(old,))
            return made

        self._aliases.written(tensor, make)

    def _is_no_op(self, outcome: _Outcome) -> bool:
        """Whether a call returned its argument, untouched: ``contiguous``, ``to``, dropout in eval."""
        _, tensor = outcome.made[0]
        return any(tensor is t for t in outcome.given)

    def _assigned(self, func: Any, args: tuple[Any, ...]) -> None:
        if _descriptor_name(func) == "data" and len(args) == 2 and isinstance(args[1], Tensor):
            self._node(args[1], "data")
            self._aliases.moved(args[0], args[1])

    def _enter(self, tensor: Tensor, node: fx.Node | Callable[[], fx.Node]) -> None:
        self._aliases.result(tensor, node)
        inner = unwrapped(tensor)
        if inner is not None:
            self._enter(inner, node)

    def _element(
        self, node: fx.Node, path: tuple[int, ...], facts: Mapping[str, Any]
    ) -> Callable[[], fx.Node]:
        """Return a maker of the ``getitem`` calls that lead to an element of a call's result."""
        module = self.path
        made: list[fx.Node] = []

        def make() -> fx.Node:
            if not made:
                item = node
                for index in path:
                    item = self.graph.call_function(operator.getitem, (item, index))
                    item.meta.update(op="getitem", module=module)
                item.meta.update(facts)
                made.append(item)
            return made[0]

        return make

    def _nodes(self, value: Any, op: str) -> Any:
        """Replace the tensors inside an argument by the nodes that stand for their values now."""
        if isinstance(value, Tensor):
            return self._node(value, op)
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, tuple):
            return tuple(self._nodes(v, op) for v in value)
        if isinstance(value, list):
            return [self._nodes(v, op) for v in value]
        if isinstance(value, dict):
            return {k: self._nodes(v, op) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._nodes(v, op) for v in (value.start, value.stop, value.step)))
        return value

    def _node(self, tensor: Tensor, op: str) -> fx.Node:
        node = self._aliases.read(tensor)
        return self._hole(tensor, op) if node is None else node

    def _hole(self, tensor: Tensor, op: str) -> fx.Node:
        """Write down a tensor that is neither input nor parameter nor the result of a recorded call."""
        name = f"_constant_{len(self.holes)}"
        known = self._attributes.get(id(tensor))
        what = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        origin = f"the attribute {known!r}" if known else "of unknown origin"
        self.holes.append(f"{name}: {what}, {origin}, read by {op} in {self.path!r}")
        make = self._reader(name, tensor)
        self._aliases.external(tensor, make)
        node = make()
        if tensor.numel() <= VALUE_LIMIT:
            node.meta["value"] = tensor.detach()
        return node

    def _reader(self, name: str, tensor: Tensor, parameter: str | None = None) -> Callable[[], fx.Node]:
        made: list[fx.Node] = []

        def make() -> fx.Node:
            if not made:
                node = self.graph.create_node("get_attr", name)
                self._describe(node, tensor, op="get_attr")
                if parameter is not None:
                    node.meta["parameter"] = parameter
                made.append(node)
            return made[0]

        return make

    def _emit(self, target: object, args: tuple[object, ...], geometry: Geometry, memory: int) -> fx.Node:
        node = self.graph.create_node("call_function", cast("Any", target), cast("Any", args))
        node.meta.update(op=canonical_op(target), module=self.path, memory=memory)
        if target is torch.as_strided_scatter:
            node.meta["writes"] = (args[0],)
        _set_geometry(node, geometry)
        return node

    def _describe(self, node: fx.Node, tensor: Tensor, op: str) -> None:
        node.meta.update(op=op, module=self.path)
        node.meta.update(self._facts(tensor))

    def _facts(self, tensor: Tensor) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "shape": tuple(tensor.shape),
            "dtype": tensor.dtype,
            "floating": tensor.is_floating_point() or tensor.is_complex(),
            "device": tensor.device,
        }
        geometry = geometry_of(tensor)
        if geometry is not None:
            facts.update(stride=geometry.stride, offset=geometry.offset)
            facts["memory"] = self._aliases.memory(tensor)
        if not facts["floating"] and _has_values(tensor):
            facts["value"] = tensor.detach().clone()
        return facts

    def _save(self, given: list[Tensor]) -> None:
        """Keep the value of a tensor from outside the run before a call may write into it."""
        for tensor in given:
            held = self._aliases.held(tensor)
            if held is None and self._aliases.read(tensor) is None and unwrapped(tensor) is None:
                held = tensor
            if held is not None and id(held) not in self._saved:
                self._saved[id(held)] = (held, _version(held), held.detach().clone())

    def _push(self, module: nn.Module, args: Any) -> None:
        del args
        if threading.get_ident() == self._thread:
            self._stack.append(self._paths.get(id(module), self.path))

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args, output
        if threading.get_ident() == self._thread and self._stack:
            path, error = self._stack.pop(), sys.exc_info()[1]
            if error is not None and error is not self._raised[0]:
                self._raised = (error, path)


class _Outcome:
    """What one call returned, which of its arguments changed, and all of its arguments."""

    def __init__(
        self,
        made: list[tuple[tuple[int, ...], Tensor]],
        changed: list[Tensor],
        given: list[Tensor],
    ) -> None:
        self.made = made
        self.changed = changed
        self.given = given

    def written(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the arguments that the call wrote into; views of them share their version."""
        named: list[Tensor] = []
        _collect(kwargs.get("out"), named)
        if named:
            return named
        in_place = (op.endswith("_") and not op.endswith("__")) or op == "setitem"
        if in_place and args and isinstance(args[0], Tensor):
            return [args[0]]
        returned = [t for t in self.changed if any(t is r for _, r in self.made)]
        return list({id(t): t for t in returned or self.changed}.values())


def _first_names(model: nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


def _tensor_attributes(model: nn.Module) -> dict[int, str]:
    """Return the names of tensors that modules hold as plain attributes, or in lists and dictionaries."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key in {"_parameters", "_buffers", "_modules"}:
                continue
            inside: list[Tensor] = []
            _collect(value, inside)
            name = f"{path}.{key}" if path else key
            for index, tensor in enumerate(inside):
                found.setdefault(id(tensor), name if tensor is value else f"{name}[{index}]")
    return found


def _collect(value: Any, into: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        into.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, into)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, into)
    elif isinstance(value, slice):
        _collect((value.start, value.stop, value.step), into)


def _collect_paths(value: Any, path: tuple[int, ...], into: list[tuple[tuple[int, ...], Tensor]]) -> None:
    if isinstance(value, Tensor):
        into.append((path, value))
    elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        for index, item in enumerate(value):
            _collect_paths(item, (*path, index), into)


def _version(tensor: Tensor) -> int:
    # Inference tensors keep no version: what writes into them is told by the operation's name.
    return -1 if tensor.is_inference() else tensor._version


def _op_of(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return _descriptor_name(func)
    return "__set__" if name == "__set__" else canonical_op(func)


def _descriptor_name(func: Any) -> str:
    descriptor = getattr(func, "__self__", None)
    name = getattr(descriptor, "__name__", None) or getattr(
        getattr(descriptor, "fget", None), "__name__", "attribute"
    )
    return str(name)


def _may_write(func: Any, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if op.endswith("_") or op == "setitem" or "out" in kwargs or kwargs.get("inplace"):
        return True
    if op in {"embedding", "embedding_bag"}:
        return kwargs.get("max_norm") is not None or any(isinstance(a, float) for a in args)
    if any(a is True for a in args):  # F.relu(x, True)
        return True
    schema = getattr(func, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _spell(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Return the node kind, target and arguments for a call."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return "call_function", getattr, (args[0], _descriptor_name(func))
    if name == "__getitem__":
        return "call_function", operator.getitem, args
    if name == "__setitem__":
        return "call_function", operator.setitem, args
    if name == "__rmatmul__":
        return "call_function", torch.matmul, (args[1], args[0])
    if args and isinstance(args[0], Tensor) and getattr(torch.Tensor, name, None) is func:
        return "call_method", name, args
    return "call_function", func, args


def _set_geometry(node: fx.Node, geometry: Geometry) -> None:
    node.meta.update(
        shape=geometry.size,
        dtype=geometry.dtype,
        floating=geometry.dtype.is_floating_point or geometry.dtype.is_complex,
        stride=geometry.stride,
        offset=geometry.offset,
    )


def _has_values(tensor: Tensor) -> bool:
    if tensor.device.type == "meta" or type(tensor).__name__ == "FakeTensor":
        return False
    return tensor.numel() <= VALUE_LIMIT and unwrapped(tensor) is None
