"""Example inputs for export: in the forward's own order, with the dimensions that may vary."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_fx.errors import InputError
from lora_fx.passes.examples import read_examples
from lora_fx.passes.onnx_subject import Inputs


def split_inputs(model: nn.Module, example_inputs: Any) -> Inputs:
    """Return example inputs as ``(args, kwargs)``, keyword arguments in the forward's order.

    Raises:
        InputError: they do not fit the forward's signature.
    """
    examples = read_examples(model, example_inputs)
    try:
        bound = inspect.signature(model.forward).bind(*examples.args, **examples.kwargs)
    except TypeError as error:
        raise InputError(
            "example_inputs",
            expected=f"what {type(model).__name__}.forward takes",
            got=str(error),
            advice="Pass a tensor, a tuple of positional arguments, a mapping of keyword arguments, or both.",
        ) from error
    return bound.args, dict(bound.kwargs)


def tensors(inputs: Inputs) -> list[Tensor]:
    """Return the tensors among the inputs, in the order of the graph's inputs."""
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def map_tensors(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Return the inputs with every tensor replaced."""
    args, kwargs = pytree.tree_map(
        lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, (tuple(inputs[0]), dict(inputs[1]))
    )
    return args, kwargs


def batch_size(inputs: Inputs) -> int | None:
    """Return the size that most tensors have in dimension 0, or None where no tensor has one."""
    sizes = [tensor.shape[0] for tensor in tensors(inputs) if tensor.dim()]
    return max(sizes, key=sizes.count) if sizes else None


def with_batch(inputs: Inputs, size: int, only: Container[int] | None = None) -> Inputs:
    """Return the inputs with the batch repeated or cut to ``size``; ``only``: at these positions."""
    batch = batch_size(inputs)
    positions = iter(range(len(tensors(inputs))))

    def resize(tensor: Tensor) -> Tensor:
        position = next(positions)
        if not tensor.dim() or tensor.shape[0] != batch or not batch:
            return tensor
        if only is not None and position not in only:
            return tensor
        return tensor.repeat(-(-size // batch), *[1] * (tensor.dim() - 1))[:size].contiguous()

    return map_tensors(inputs, resize)


Axes = frozenset[tuple[int, int]]
"""Dimensions that may vary: (position among the inputs' tensors, axis)."""


def varying(inputs: Inputs, *, sequence: bool) -> Axes:
    """Return the dimensions to ask for: the batch, wherever dimension 0 has its size.

    With ``sequence`` also dimension 1 of tensors of two or three (ids, masks, features over time), but
    no image's height and width.
    """
    batch = batch_size(inputs)
    found: set[tuple[int, int]] = set()
    for position, tensor in enumerate(tensors(inputs)):
        if tensor.dim() and tensor.shape[0] == batch:
            found.add((position, 0))
        if sequence and tensor.dim() in (2, 3):
            found.add((position, 1))
    return frozenset(found)


def with_length(inputs: Inputs, axes: Axes) -> Inputs:
    """Return the inputs with another size of every varying axis but the batch: one less, or twice one."""
    positions = iter(range(len(tensors(inputs))))

    def resize(tensor: Tensor) -> Tensor:
        position = next(positions)
        for axis in range(1, tensor.dim()):
            if (position, axis) in axes:
                size = tensor.shape[axis]
                tensor = tensor.narrow(axis, 0, size - 1) if size > 1 else torch.cat([tensor, tensor], axis)
        return tensor.contiguous()

    return map_tensors(inputs, resize)


def random_like(inputs: Inputs, *, seed: int) -> Inputs:
    """Return other inputs of the same shapes and kinds.

    Floats are normal with the example's mean and deviation; integers and booleans are drawn from the
    example's own values, so that they stay valid as indices and masks.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        if tensor.is_floating_point():
            wide = tensor.detach().to("cpu", torch.float64)
            spread = float(wide.std(correction=0)) or 1.0
            made = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * spread + wide.mean()
            return made.to(tensor.device, tensor.dtype)
        flat = tensor.detach().reshape(-1)
        index = torch.randint(len(flat), (len(flat),), generator=generator)
        return flat[index.to(flat.device)].reshape(tensor.shape)

    return map_tensors(inputs, draw)
