"""What a node keeps of a tensor: shape, dtype, place in memory, and a few values where they are no floats."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lora_fx.passes.aliases import Geometry, unwrapped

VALUE_LIMIT = 2**18
"""The most elements of a tensor whose values a node keeps."""


def tensor_facts(tensor: Tensor, geometry: Geometry | None, memory: int | None) -> dict[str, Any]:
    """Return the entries of a node's meta that describe its value, which lies in its storage like this."""
    dtype = tensor.dtype
    facts: dict[str, Any] = {
        "shape": tuple(tensor.shape) if geometry is None else geometry.size,
        "dtype": dtype,
        "floating": dtype.is_floating_point or dtype.is_complex,
        "device": tensor.device,
    }
    if geometry is not None:
        facts.update(stride=geometry.stride, offset=geometry.offset, memory=memory)
    if not facts["floating"] and has_few_values(tensor):
        facts["value"] = tensor.detach().clone()
    return facts


def geometry_facts(geometry: Geometry, memory: int) -> dict[str, Any]:
    """Return the same entries for a view that is known by its geometry alone."""
    return {
        "shape": geometry.size,
        "dtype": geometry.dtype,
        "floating": geometry.dtype.is_floating_point or geometry.dtype.is_complex,
        "stride": geometry.stride,
        "offset": geometry.offset,
        "memory": memory,
    }


def has_few_values(tensor: Tensor) -> bool:
    """Say whether a tensor's values are at hand and few enough to keep."""
    if tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
        return False
    return tensor.numel() <= VALUE_LIMIT and unwrapped(tensor) is None
