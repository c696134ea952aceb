"""Run a piece of the recorded graph again on random values, and push a gradient through it.

Which output rows of a weight feed a value is a fact about the calls between them, however they
reshape, split, interleave, rotate or normalise. For ``y = x W^T`` and a value ``t = f(y)``, the rows
that feed ``t`` are ``{i : d(c . t) / d y_i != 0}`` for a random cotangent ``c``: exact but for chance,
which a second draw rules out. Everything runs in float32 on the CPU, whatever the run was; recorded
values that are not floating (masks, indices) are kept, writes in place go to clones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from lora_fx.kinds.base import shape_of
from lora_fx.passes.flow import is_floating
from lora_fx.passes.op_groups import BOUNDS, CASTS, DETACHES

_CPU = torch.device("cpu")
_LEFT_OUT = frozenset({"out", "non_blocking", "pin_memory"})
_MOVES = frozenset({"cpu", "cuda", "pin_memory"})
_EMPTY = frozenset({"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "resize_"})


@dataclass(frozen=True)
class Segment:
    """The calls that lie between some leaves and a target; ``live`` are those that depend on a leaf.

    ``severed`` names the calls through which gradients go by some arguments only.
    """

    target: fx.Node
    leaves: tuple[fx.Node, ...]
    live: tuple[fx.Node, ...]
    severed: Mapping[fx.Node, tuple[fx.Node, ...]]


def segment_between(
    target: fx.Node,
    leaves: Iterable[fx.Node],
    order: Mapping[fx.Node, int],
    *,
    cut: Iterable[fx.Node] = (),
    severed: Mapping[fx.Node, tuple[fx.Node, ...]] | None = None,
) -> Segment:
    """Collect what depends on a leaf and is needed for the target.

    Nothing is followed through the nodes of ``cut``, and through those of ``severed`` only by the
    arguments named there.
    """
    severed = severed or {}
    leaves = tuple(sorted(set(leaves), key=order.__getitem__))
    ends = {*leaves, *cut}
    first = min((order[leaf] for leaf in leaves), default=0)
    needed, stack = {target}, [target]
    while stack:
        here = stack.pop()
        if here in ends:
            continue
        for source in _followed(here, severed):
            if source not in needed and order[source] >= first:
                needed.add(source)
                stack.append(source)
    live: dict[fx.Node, None] = dict.fromkeys(leaves)
    for node in sorted(needed - ends, key=order.__getitem__):
        # A recorded value that is not floating is kept: no gradient flows through it.
        if is_floating(node) and any(n in live for n in _followed(node, severed)):
            live[node] = None
    return Segment(target, leaves, tuple(node for node in live if node not in leaves), severed)


def passes_all(segment: Segment, kept: frozenset[str]) -> set[fx.Node] | None:
    """Return the leaves that reach the target, where all calls between are of ``kept``; else None."""
    if any(node.meta.get("op") not in kept or "shape" not in node.meta for node in segment.live):
        return None
    inside = {*segment.live, *segment.leaves}
    seen, stack = {segment.target}, [segment.target]
    while stack:
        fresh = [n for n in _followed(stack.pop(), segment.severed) if n in inside and n not in seen]
        seen.update(fresh)
        stack.extend(n for n in fresh if n not in segment.leaves)
    return seen & set(segment.leaves)


def _followed(node: fx.Node, severed: Mapping[fx.Node, tuple[fx.Node, ...]]) -> list[fx.Node]:
    return list(severed.get(node, node.all_input_nodes))


class Replay:
    """One run of a segment on one draw of random values."""

    def __init__(self, segment: Segment, seed: int) -> None:
        """Draw the leaves and run the segment."""
        self._generator = torch.Generator().manual_seed(seed)
        self._severed = segment.severed
        self._values: dict[fx.Node, Any] = {}
        with torch.inference_mode(mode=False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.leaves = tuple(self.random(leaf).requires_grad_() for leaf in segment.leaves)
            self._values.update(zip(segment.leaves, self.leaves, strict=True))
            for node in segment.live:
                self._values[node] = self._call(node)
            self.target: Any = self.value(segment.target)

    def gradients(self, part: tuple[int, int, int] | None = None) -> tuple[Tensor, ...]:
        """Return the gradient of ``c . target`` in each leaf for a random ``c``.

        ``part``, as (dimension, start, stop), lets only that part of the target count.
        """
        target = self.target
        cotangent = self._draw(tuple(target.shape), target.dtype) if isinstance(target, Tensor) else None
        if cotangent is not None and part is not None:
            kept = torch.zeros_like(cotangent)
            kept.narrow(part[0], part[1], part[2] - part[1]).fill_(1)
            cotangent = cotangent * kept
        return self.pulled_back(cotangent)

    def pulled_back(self, cotangent: Tensor | None) -> tuple[Tensor, ...]:
        """Return the gradient of ``cotangent . target`` in each leaf."""
        target = self.target
        if cotangent is None or not isinstance(target, Tensor) or not target.requires_grad:
            return tuple(torch.zeros_like(leaf) for leaf in self.leaves)
        return tuple(
            torch.autograd.grad(
                target, self.leaves, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )

    def value(self, node: fx.Node) -> Any:
        """Return a node's value: computed, recorded, or drawn."""
        if node not in self._values:
            self._values[node] = self._leaf(node)
        return self._values[node]

    def random(self, node: fx.Node) -> Tensor:
        """Draw a value for a floating node, laid out in memory as it was in the run."""
        shape, stride = shape_of(node), node.meta.get("stride")
        dtype = node.meta.get("dtype", torch.float32)
        drawn = self._draw(shape, torch.complex64 if dtype.is_complex else torch.float32)
        if node.op == "get_attr":
            drawn = drawn.abs().to(drawn.dtype)  # a running variance must not be negative
        if stride is None or 0 in stride or 0 in shape or len(stride) != len(shape):
            return drawn
        span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if tuple(stride) == tuple(drawn.stride()) or span > 4 * math.prod(shape):
            return drawn
        return torch.empty_strided(shape, stride, dtype=drawn.dtype).copy_(drawn)

    def _draw(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Draw away from zero, so that nothing divides by it and nothing vanishes."""
        size = torch.rand(shape, generator=self._generator) + 0.5
        sign = torch.randint(0, 2, shape, generator=self._generator) * 2.0 - 1.0
        return (size * sign).to(dtype)

    def _leaf(self, node: fx.Node) -> Any:
        """A node that depends on no leaf: recorded, drawn, or for want of both computed."""
        recorded = node.meta.get("value")
        if isinstance(recorded, Tensor) and recorded.device.type != "meta":
            value = recorded.detach().clone() if recorded.is_inference() else recorded.detach()
            return value.float().cpu() if value.is_floating_point() else value.to(_CPU)
        if "shape" in node.meta and is_floating(node):
            return self.random(node)
        if node.op in {"placeholder", "get_attr"}:
            return torch.zeros(shape_of(node), dtype=node.meta.get("dtype", torch.int64))
        return self._call(node)

    def _call(self, node: fx.Node) -> Any:
        op = node.meta.get("op", "")
        if op in DETACHES or op in _MOVES:
            value = self._argument(node, node.all_input_nodes[0])
            return _leaking(value) if op in DETACHES else value
        arguments: Any = map_arg((node.args, node.kwargs), lambda source: self._argument(node, source))
        args = tuple(_portable(a) for a in arguments[0])
        kwargs = {k: _portable(v) for k, v in arguments[1].items() if k not in _LEFT_OUT}
        if op in CASTS and isinstance(args[0], Tensor):
            return _cast(args[0], node)
        if op in BOUNDS and not any(_bends(a) for a in (*args[1:], *kwargs.values())):
            return args[0]
        if op == "setitem" or op.endswith("_") or "writes" in node.meta:
            args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        if op == "as_strided_scatter":
            return _scattered(*args)
        result = _apply(node, args, kwargs)
        if op in _EMPTY and isinstance(result, Tensor):
            return torch.zeros_like(result)
        return args[0] if op == "setitem" else result

    def _argument(self, node: fx.Node, source: fx.Node) -> Any:
        """Return the value of one argument, without its gradient where the call is severed there."""
        value, kept = self.value(source), self._severed.get(node)
        if kept is None or source in kept or not isinstance(value, Tensor):
            return value
        return value.detach()


def _bends(bound: Any) -> bool:
    return isinstance(bound, Tensor) and bound.requires_grad


def _leaking(value: Tensor) -> Tensor:
    """Let part of a gradient through a detach, so that a straight-through estimator does not cancel."""
    return value.detach() + 0.37 * (value - value.detach()) if value.is_floating_point() else value


def _scattered(base: Tensor, source: Tensor, *where: Any) -> Tensor:
    """Write into a clone: torch 2.13's own gradient of as_strided_scatter keeps what it should drop."""
    result = base.clone()
    result.as_strided(*where).copy_(source)
    return result


def _apply(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _portable(value: Any) -> Any:
    """Replace devices by the CPU and floating types by those of the replay."""
    if isinstance(value, torch.device):
        return _CPU
    if isinstance(value, str) and value.split(":")[0] in {"cuda", "meta", "mps", "xpu", "cpu"}:
        return "cpu"
    if isinstance(value, torch.dtype):
        return _replayed(value)
    return value


def _replayed(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex64
    return torch.float32 if dtype.is_floating_point else dtype


def _cast(value: Tensor, node: fx.Node) -> Tensor:
    """A cast keeps floating values floating; where it ends in integers the recorded dtype says so."""
    dtype = node.meta.get("dtype")
    return value if dtype is None else value.to(_replayed(dtype))


def structure(segment: Segment) -> tuple[Any, ...]:
    """Return a hashable text of a segment: equal structures have equal gradients' supports."""
    numbers: dict[fx.Node, int] = {}

    def number(node: fx.Node) -> Any:
        known = numbers.get(node)
        if known is None:
            numbers[node] = known = len(numbers)
            return (known, _describe(node))
        return known

    body: list[Any] = [tuple(number(leaf) for leaf in segment.leaves)]
    for node in segment.live:
        args = tuple(_plain(a, number) for a in node.args)
        kwargs = tuple((k, _plain(v, number)) for k, v in node.kwargs.items())
        body.append((str(node.target), args, kwargs))
        numbers[node] = len(numbers)
    return (*body, numbers.get(segment.target))


def _describe(node: fx.Node) -> Any:
    value = node.meta.get("value")
    content: Any = None
    if isinstance(value, Tensor) and value.device.type != "meta":
        content = hash(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return (shape_of(node), node.meta.get("stride"), str(node.meta.get("dtype")), content)


def _plain(value: Any, number: Any) -> Any:
    if isinstance(value, fx.Node):
        return number(value)
    if isinstance(value, (tuple, list)):
        return tuple(_plain(v, number) for v in value)
    if isinstance(value, dict):
        return tuple((k, _plain(v, number)) for k, v in value.items())
    if isinstance(value, slice):
        return ("slice", _plain(value.start, number), _plain(value.stop, number), _plain(value.step, number))
    return repr(value)
