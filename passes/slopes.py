"""Gradients of a run, taken without leaving any behind, through any kind of checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.passes.examples import tensors_in

Slopes = list[Tensor | None]


def outputs_and_slopes(
    model: nn.Module, run: Callable[[], Any], wanted: Sequence[Tensor]
) -> tuple[list[Tensor], Slopes | None]:
    """Run once with gradients; return the float outputs and the slopes of an uneven sum of them.

    The slopes are with respect to ``wanted``, and None altogether where no output requires a gradient.
    """
    outputs, total = _run(run)
    if total is None:
        return outputs, None
    try:
        return outputs, _dense(torch.autograd.grad(total, list(wanted), allow_unused=True))
    except RuntimeError as error:
        if "checkpoint" not in str(error):
            raise
    # A reentrant checkpoint answers backward() alone, which leaves gradients on every leaf.
    outputs, total = _run(run)
    assert total is not None
    with _gradients_kept([*model.parameters(), *wanted, *_leaves(total)]):
        torch.autograd.backward(total)
        return outputs, _dense(None if t.grad is None else t.grad.clone() for t in wanted)


def _dense(slopes: Iterable[Tensor | None]) -> Slopes:
    """Spell out what a sparse embedding gives its own weight; products take no sparse operand everywhere."""
    return [s.to_dense() if s is not None and s.is_sparse else s for s in slopes]


def _run(run: Callable[[], Any]) -> tuple[list[Tensor], Tensor | None]:
    with torch.enable_grad():
        outputs = float_leaves(run())
        live = [o for o in outputs if o.requires_grad]
        parts = [(o * uneven(o)).sum().to(torch.float64) for o in live]
        total = torch.stack(parts).sum() if parts else None
    return [o.detach() for o in outputs], total


@contextmanager
def _gradients_kept(tensors: Sequence[Tensor]) -> Generator[None]:
    """Inside, these tensors have no gradients; afterwards those that they had."""
    kept = [(tensor, tensor.grad) for tensor in tensors]
    try:
        for tensor, _ in kept:
            tensor.grad = None
        yield
    finally:
        for tensor, gradient in kept:
            tensor.grad = gradient


def _leaves(total: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors of a result's graph: inputs of the model that require gradients, too."""
    waiting: list[Any] = [total.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions]


def uneven(output: Tensor) -> Tensor:
    """Uneven weights, so that no symmetry (a softmax's rows sum to one) hides a gradient."""
    steps = torch.arange(output.numel(), device=output.device, dtype=torch.float32)
    return torch.cos(steps * 0.7 + 0.3).reshape(output.shape).to(output.dtype)


def float_leaves(output: Any) -> list[Tensor]:
    """Return the float tensors of an output, in order, whatever holds them; complex ones as pairs."""
    leaves = [tensor for _, tensor in tensors_in(output)]
    found = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in leaves)
    return [t for t in found if t.is_floating_point()]
