"""Inputs that need not be saved: what their producer saved is enough to make them again.

A linear with a frozen weight saves nothing, but the gradient of A needs its input x. Most x come out
of a normalisation, an activation or a product whose *operands* autograd has saved already. Then x is
not saved but made again in the backward, by the very kernel that made it (bit-equal)::

    layer norm  x = LN(_saved_input; _saved_weight, _saved_bias)       gelu, silu, ...  x = f(_saved_self)
    product     x = _saved_self * _saved_other                         and views, copies, casts of these

Every consumer's backward runs before its producer's, which is what frees the operands. The one thing
lost: a gradient with respect to adapters alone, after the producer's part of the graph was freed.

x is saved as usual where the producer is unknown or saves x itself (ReLU: then saving is free), under
checkpointing and offloading (hooks hold the operands), and where another part of the program may
free the operands' memory between the passes (sharded weights).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Make = Callable[[], Tensor]
_MISSING = object()
_PLAIN = frozenset({Tensor, nn.Parameter})
_DEPTH = 6


@dataclass
class _Switch:
    on: bool = True


_switch = _Switch()
_known: dict[int, tuple[weakref.ref[Tensor], float | None]] = {}


@contextmanager
def remake_inputs(on: bool = True) -> Generator[None]:
    """Make inputs again in the backward (the default), or save them all: less work, more memory."""
    before = _switch.on
    _switch.on = on
    try:
        yield
    finally:
        _switch.on = before


def remember_norms(model: nn.Module) -> None:
    """Note a model's one-dimensional parameters, and with each the epsilon of its normalisation."""
    for module in model.modules():
        eps = module.__dict__.get("eps")
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.dim() <= 1:
                _known[id(parameter)] = (weakref.ref(parameter, _forget(id(parameter))), eps)


def _forget(key: int) -> Callable[[Any], object]:
    return lambda _: _known.pop(key, None)


class Remade:
    """An input that is made again on demand; siblings with the same input share one.

    ``uses`` consumers will ask once per backward; the value is dropped after the last of them. ``fresh``
    says that making it allocates it: then the last consumer may write to its memory.
    """

    def __init__(self, make: Make, *, fresh: bool) -> None:
        self._make = make
        self._fresh = fresh
        self._uses = 0
        self._left = 0
        self._value: Tensor | None = None

    def claim(self) -> Remade:
        """Count one more consumer."""
        self._uses += 1
        self._left = self._uses
        return self

    def get(self) -> tuple[Tensor, bool]:
        """Return x, made by the first consumer to ask and kept for the others; and whether it is spare.

        What is spare is nobody else's: the caller may write to it.
        """
        if torch.is_grad_enabled():
            return self._made(), False
        value = self._made() if self._value is None else self._value
        self._left -= 1
        last = self._left <= 0
        self._value = None if last else value
        if last:
            self._left = self._uses
        return value, last and self._fresh

    def _made(self) -> Tensor:
        try:
            return self._make()
        except RuntimeError as error:
            raise RuntimeError(
                "The input of an adapted layer cannot be made again, because what its producer saved is "
                "gone (a second backward without retain_graph=True, or an in-place change). Run the "
                "forward inside lora_fx's remake_inputs(False) to save inputs instead."
            ) from error


_recent: list[tuple[weakref.ref[Tensor], int, weakref.ref[Remade]]] = []


def remade(x: Tensor) -> Remade | None:
    """Return a way to make ``x`` again from what its producer saved, or None: then save it."""
    node = x.grad_fn
    if node is None or not _switch.on:
        return None
    if _recent:
        tensor, version, held = _recent[0]
        found = held()
        if found is not None and tensor() is x and version == x._version:
            return found.claim()
    plan = _Plan()
    make = None if x.output_nr else plan.make(node)
    if make is None or (plan.hooked and not _same(make, x)):
        return None
    result = Remade(make, fresh=plan.fresh)
    _recent[:] = [(weakref.ref(x), x._version, weakref.ref(result))]
    return result.claim()


def _same(make: Make, x: Tensor) -> bool:
    """Hooks may have saved something else than the operand itself: look whether x comes out."""
    with torch.no_grad():
        made = make()
        return made.dtype == x.dtype and made.shape == x.shape and torch.equal(made, x)


@dataclass
class _Plan:
    """One walk back from x to saved operands; ``hooked`` says that hooks hold some of them.

    ``fresh`` is whether x is computed anew, and no operand itself: set by the rule nearest to x last.
    """

    hooked: bool = False
    fresh: bool = False

    def make(self, node: Any, depth: int = _DEPTH) -> Make | None:
        """The node's output, made again; None where no rule can."""
        rule = _RULES.get(node.name())
        return None if rule is None or depth == 0 else rule(self, node, depth)

    def source(self, node: Any, depth: int, index: int = 0) -> Make | None:
        """One input of a node, made by its own producer."""
        before, output = node.next_functions[index]
        return None if before is None or output else self.make(before, depth - 1)

    def saved(self, node: Any, name: str) -> Make | None:
        """A tensor that the node saved, read when asked for; None where it may not be read."""
        raw = getattr(node, f"_raw_saved_{name}", None)
        hook = getattr(raw, "unpack_hook", _MISSING)
        if raw is None or hook is _MISSING:
            return None
        held = raw.data
        if hook is None:
            return (lambda: getattr(node, f"_saved_{name}")) if _stays(held) else None
        # What hooks hold is used only where it is plainly a tensor: most bear one unpacking, not two.
        if getattr(hook, "__module__", "") == "torch.utils.checkpoint" or type(held) not in _PLAIN:
            return None
        if not _stays(held):
            return None
        self.hooked = True
        return lambda: raw.data


def _stays(held: Tensor | None) -> bool:
    """Say whether a saved operand keeps its memory: activations do, a sharded model's weights do not."""
    if type(held) is not nn.Parameter:
        return held is not None
    known = _known.get(id(held))
    return known is not None and known[0]() is held


_Rule = Callable[[_Plan, Any, int], Make | None]


def _from_saved(name: str, function: Callable[..., Tensor] | None = None, *options: str) -> _Rule:
    """A rule for ``x = function(saved tensor, options saved beside it)``; no function: x itself."""

    def rule(plan: _Plan, node: Any, depth: int) -> Make | None:
        del depth
        operand = plan.saved(node, name)
        plan.fresh = function is not None
        if operand is None or function is None:
            return operand
        values = {option: getattr(node, f"_saved_{option}") for option in options}
        apply = function
        return lambda: apply(operand(), **values)

    return rule


def _product(plan: _Plan, node: Any, depth: int) -> Make | None:
    """``x = self * other``: an operand that is not saved is made by its own producer."""
    left = plan.saved(node, "self") or plan.source(node, depth, 0)
    right = None if left is None else plan.saved(node, "other") or plan.source(node, depth, 1)
    plan.fresh = True
    return None if left is None or right is None else lambda: left() * right()


def _layer_norm(plan: _Plan, node: Any, depth: int) -> Make | None:
    """The epsilon is not saved: it is known by the weight, where the model was looked through."""
    del depth
    operand, weight = plan.saved(node, "input"), plan.saved(node, "weight")
    if operand is None or weight is None:
        return None
    eps, axes = _epsilon(weight()), node._saved_normalized_shape
    bias = plan.saved(node, "bias") or (_nothing if node._raw_saved_bias.data is None else None)
    if eps is None or bias is None:
        return None
    plan.fresh = True
    return lambda: F.layer_norm(operand(), axes, weight(), bias(), eps)


def _epsilon(weight: Tensor) -> float | None:
    known = _known.get(id(weight))
    return None if known is None else known[1]


def _nothing() -> None:
    return None


def _reshaped(plan: _Plan, node: Any, depth: int) -> Make | None:
    source, shape = plan.source(node, depth), tuple(node._input_metadata[0].shape)
    return None if source is None else lambda: source().reshape(shape)


def _transposed(plan: _Plan, node: Any, depth: int) -> Make | None:
    source, first, second = plan.source(node, depth), node._saved_dim0, node._saved_dim1
    return None if source is None else lambda: source().transpose(_signed(first), _signed(second))


def _permuted(plan: _Plan, node: Any, depth: int) -> Make | None:
    source, dims = plan.source(node, depth), [_signed(d) for d in node._saved_dims]
    return None if source is None else lambda: source().permute(dims)


def _signed(dim: int) -> int:
    """Autograd shows negative dimensions as unsigned 64-bit numbers."""
    return dim - 2**64 if dim >= 2**63 else dim


def _cast(plan: _Plan, node: Any, depth: int) -> Make | None:
    source, dtype = plan.source(node, depth), node._input_metadata[0].dtype
    return None if source is None else lambda: source().to(dtype)


def _copied(plan: _Plan, node: Any, depth: int) -> Make | None:
    return plan.source(node, depth)


_RULES: dict[str, _Rule] = {
    "NativeLayerNormBackward0": _layer_norm,
    "GeluBackward0": _from_saved("self", F.gelu, "approximate"),
    "SiluBackward0": _from_saved("self", F.silu),
    "MishBackward0": _from_saved("self", F.mish),
    "HardswishBackward0": _from_saved("self", F.hardswish),
    "MulBackward0": _product,
    "ReluBackward0": _from_saved("result"),
    "SigmoidBackward0": _from_saved("result"),
    "TanhBackward0": _from_saved("result"),
    "SoftmaxBackward0": _from_saved("result"),
    "ScaledDotProductFlashAttentionForCpuBackward0": _from_saved("output"),
    "ScaledDotProductFlashAttentionBackward0": _from_saved("output"),
    "ScaledDotProductEfficientAttentionBackward0": _from_saved("output"),
    "ScaledDotProductCudnnAttentionBackward0": _from_saved("output"),
    "ViewBackward0": _reshaped,
    "ReshapeAliasBackward0": _reshaped,
    "UnsafeViewBackward0": _reshaped,
    "TransposeBackward0": _transposed,
    "PermuteBackward0": _permuted,
    "ToCopyBackward0": _cast,
    "CloneBackward0": _copied,
}
