"""The recorder: a TorchFunctionMode that writes every torch call of a run down as a node of an fx graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from lora_fx.kinds.names import canonical_op
from lora_fx.passes.aliases import Aliases, Geometry, geometry_of, unwrapped
from lora_fx.passes.attributes import tensor_attributes
from lora_fx.passes.calls import (
    PLAIN,
    Function,
    Outcome,
    changed_since,
    collect,
    collect_paths,
    may_write,
    read_function,
    schema_writes,
    spell,
    version_of,
    versions_of,
)
from lora_fx.passes.control import is_control, with_bodies
from lora_fx.passes.module_stack import ModuleStack
from lora_fx.passes.nodes import Nodes
from lora_fx.passes.parts import Parts
from lora_fx.passes.preserve import put_back
from lora_fx.passes.tensor_facts import VALUE_LIMIT, geometry_facts, tensor_facts


def after(call: Any, old: Any) -> Any:
    """Stand for a tensor that a call wrote into without returning it (running statistics, say)."""
    del call
    return old


class _Call(NamedTuple):
    function: Function
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recorder(TorchFunctionMode):
    """Records one run of one model; use it as a context around the run."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._nodes = Nodes(self.graph)
        self._functions: dict[Any, Function] = {}
        self.holes: list[str] = []
        self.unexplained = False
        """Whether a tensor turned up that no attribute holds: some call was not seen."""
        self._aliases = Aliases(self._emit)
        self.modules = ModuleStack(parts.modules)
        self._saved: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._depth = 0
        self._attributes = tensor_attributes(parts.modules)
        for name, parameter in parts.parameters.items():
            self._external(parameter, self._reader(name, parameter, parameter=name))
        for name, buffer in parts.buffers.items():
            self._external(buffer, self._reader(name, buffer))

    def __enter__(self) -> Self:
        """Start to record."""
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def input(self, name: str, tensor: Tensor) -> None:
        """Enter one tensor of the example inputs as a placeholder."""
        node = self.graph.placeholder(name)
        self._external(tensor, lambda: node)
        self._describe(node, tensor, op="placeholder")

    def output(self, leaves: Mapping[str, Tensor]) -> None:
        """End the graph with what the model returned, by the way to each tensor."""
        read = {path: self._read(tensor, "the output") for path, tensor in leaves.items()}
        only = next(iter(read.values())) if list(read) == [""] else read
        node = self.graph.output(only)
        node.meta.update(op="output", module="")

    def restore_written(self) -> None:
        """Write back what the run changed in parameters, inputs and other tensors from outside."""
        with torch.no_grad():
            for tensor, version, value in self._saved.values():
                if tensor.device.type != "meta" and _changed(tensor, version, value):
                    put_back(tensor if tensor.shape != value.shape else tensor.detach(), value)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call and write it down."""
        del types
        kwargs = kwargs or {}
        if self._depth:
            return func(*args, **kwargs)
        inner = is_control(func)
        if inner:
            args = with_bodies(args, self._inside)
        function = self._function(func)
        given: list[Tensor] = []
        collect(args, given)
        if kwargs:
            collect(kwargs, given)
        if may_write(function, args, kwargs):
            self._save(given)
        versions = versions_of(given)
        self._depth += 1  # what the call calls in turn is its own affair
        try:
            result = func(*args, **kwargs)
        finally:
            self._depth -= 1
        if function.op == "__set__":
            self._assigned(function, args)
            return result
        changed = changed_since(given, versions)
        made: list[tuple[tuple[int, ...], Tensor]] = []
        collect_paths(result, (), made)
        outcome = Outcome(made, changed, given)
        if inner and all(self._aliases.read(tensor) is not None for _, tensor in made):
            return result  # written down by what its bodies called
        written = outcome.written(function, args, kwargs)
        if written or (made and not outcome.untouched):
            self._record(_Call(function, args, kwargs), outcome, written)
        return result

    def _inside(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """Return the body of a control operator so that what it calls is written down when it is run."""

        def run(*args: Any) -> Any:
            depth, self._depth = self._depth, 0
            try:
                with self:
                    return body(*args)
            finally:
                self._depth = depth

        return run

    def lower(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation below the level of torch functions, and write it down if no call covers it."""
        if self._depth:
            return func(*args, **kwargs)
        given: list[Tensor] = []
        collect((args, kwargs), given)
        written = schema_writes(func, args, kwargs)
        if written:
            self._save(written)
        self._depth += 1  # what the call calls in turn is its own affair
        try:
            result = func(*args, **kwargs)
        finally:
            self._depth -= 1
        made: list[tuple[tuple[int, ...], Tensor]] = []
        collect_paths(result, (), made)
        outcome = Outcome(made, written, given)
        if written or (made and not outcome.untouched):
            self._record(_Call(self._function(func), args, kwargs), outcome, written)
        return result

    def _function(self, func: Any) -> Function:
        """Return what is known of a function, read at its first call."""
        known = self._functions.get(func)
        if known is None:
            known = self._functions[func] = read_function(func)
        return known

    def _record(self, call: _Call, outcome: Outcome, written: list[Tensor]) -> None:
        function, args, kwargs = call
        op, module = function.op, self.modules.path
        kind, target, call_args = spell(function, args)
        positional = self._read(call_args, op)  # first: what is read makes nodes, in this order
        node = self._nodes.call(kind, target, positional, self._read(kwargs, op) if kwargs else {})
        node.meta.update(op=op, module=module)
        if written:
            node.meta["writes"] = tuple(n for t in written if (n := self._aliases.read(t)) is not None)
        for path, tensor in outcome.made:
            facts: dict[str, Any] = node.meta if not path else {}
            value = node if not path else self._element(node, path, facts)
            geometry = geometry_of(tensor)
            if written and any(tensor is t for t in written):
                self._aliases.written(tensor, value)
                memory = self._aliases.memory(tensor)
            else:
                memory = self._enter(tensor, value, geometry)
            facts.update(tensor_facts(tensor, geometry, memory))
        for tensor in written:
            if not any(tensor is t for _, t in outcome.made):
                self._write_unreturned(node, tensor, op, alone=len(written) == 1 and not outcome.made)

    def _write_unreturned(self, node: fx.Node, tensor: Tensor, op: str, *, alone: bool) -> None:
        if alone:
            self._aliases.written(tensor, node)
            self._describe(node, tensor, op=op)
            return
        old, path, facts = self._aliases.read(tensor), self.modules.path, self._facts(tensor)

        def make() -> fx.Node:
            made = self.graph.call_function(after, (node, old))
            made.meta.update(facts, op="after", module=path, writes=(old,))
            return made

        self._aliases.written(tensor, make)

    def _assigned(self, function: Function, args: tuple[Any, ...]) -> None:
        if function.attribute == "data" and len(args) == 2 and isinstance(args[1], Tensor):
            self._read(args[1], "data")
            self._aliases.moved(args[0], args[1])

    def _external(self, tensor: Tensor, make: Callable[[], fx.Node]) -> None:
        self._aliases.enter(tensor, make, geometry_of(tensor), held=tensor)

    def _enter(
        self, tensor: Tensor, node: fx.Node | Callable[[], fx.Node], geometry: Geometry | None
    ) -> int | None:
        memory = self._aliases.enter(tensor, node, geometry)
        inner = unwrapped(tensor)
        if inner is not None:
            self._enter(inner, node, geometry_of(inner))
        return memory

    def _element(
        self, node: fx.Node, path: tuple[int, ...], facts: Mapping[str, Any]
    ) -> Callable[[], fx.Node]:
        """Return a maker of the ``getitem`` calls that lead to an element of a call's result."""
        module = self.modules.path
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

    def _read(self, value: Any, op: str) -> Any:
        """Replace the tensors inside an argument by the nodes that stand for their values now."""
        if type(value) in PLAIN:
            return value
        if isinstance(value, Tensor):
            node = self._aliases.read(value)
            return self._hole(value, op) if node is None else node
        if isinstance(value, tuple):
            return tuple([v if type(v) in PLAIN else self._read(v, op) for v in value])
        if isinstance(value, list):
            return [self._read(v, op) for v in value]
        if isinstance(value, dict):
            return {k: self._read(v, op) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._read(v, op) for v in (value.start, value.stop, value.step)))
        return value

    def _hole(self, tensor: Tensor, op: str) -> fx.Node:
        """Write down a tensor that is neither input nor parameter nor the result of a recorded call."""
        name = f"_constant_{len(self.holes)}"
        known = self._attributes.get(id(tensor))
        self.unexplained |= known is None
        what = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        origin = f"the attribute {known!r}" if known else "of unknown origin"
        self.holes.append(f"{name}: {what}, {origin}, read by {op} in {self.modules.path!r}")
        make = self._reader(name, tensor)
        self._external(tensor, make)
        node = make()
        node.meta["unexplained"] = known is None
        if known is not None:
            node.meta["attribute"] = known
        if tensor.numel() <= VALUE_LIMIT:
            node.meta["value"] = tensor.detach()
        return node

    def _reader(self, name: str, tensor: Tensor, parameter: str | None = None) -> Callable[[], fx.Node]:
        made: list[fx.Node] = []

        def make() -> fx.Node:
            if not made:
                node = self._nodes.attribute(name)
                self._describe(node, tensor, op="get_attr")
                if parameter is not None:
                    node.meta["parameter"] = parameter
                made.append(node)
            return made[0]

        return make

    def _emit(self, target: object, args: tuple[object, ...], geometry: Geometry, memory: int) -> fx.Node:
        node = self._nodes.call("call_function", target, args, {})
        node.meta.update(geometry_facts(geometry, memory), op=canonical_op(target), module=self.modules.path)
        if target is torch.as_strided_scatter:
            node.meta["writes"] = (args[0],)
        return node

    def _describe(self, node: fx.Node, tensor: Tensor, op: str) -> None:
        node.meta.update(op=op, module=self.modules.path)
        node.meta.update(self._facts(tensor))

    def _facts(self, tensor: Tensor) -> dict[str, Any]:
        return tensor_facts(tensor, geometry_of(tensor), self._aliases.memory(tensor))

    def _save(self, given: list[Tensor]) -> None:
        """Keep the value of a tensor from outside the run before a call may write into it."""
        for tensor in given:
            held = self._aliases.held(tensor)
            if held is None and self._aliases.read(tensor) is None and unwrapped(tensor) is None:
                held = tensor
            if held is not None and id(held) not in self._saved:
                self._saved[id(held)] = (held, version_of(held), held.detach().clone())


def _changed(tensor: Tensor, version: int, value: Tensor) -> bool:
    """Say whether a tensor was written into: by its version, which writes through ``.data`` pass by."""
    if version_of(tensor) != version:
        return True
    plainly = tensor.layout is torch.strided and not isinstance(tensor, FakeTensor)
    return plainly and not torch.equal(tensor, value)
