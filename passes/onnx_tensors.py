"""ONNX tensors as torch tensors and back, without copies where there need be none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

_TORCH: Mapping[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
FROM_TORCH: Mapping[torch.dtype, ir.DataType] = {dtype: onnx for onnx, dtype in _TORCH.items()}


def can_hold_weights(tensor: ir.TensorProtocol | None) -> bool:
    """Whether a tensor's dtype is one that parameters have."""
    return tensor is not None and tensor.dtype in _TORCH


def as_torch(tensor: ir.TensorProtocol) -> Tensor:
    """Return a float tensor of a model as a torch tensor; it may share memory, so do not write to it."""
    dtype = _TORCH[tensor.dtype]
    shape = tuple(int(size) for size in tensor.shape.numpy())
    if not tensor.nbytes:
        return torch.empty(shape, dtype=dtype)
    array = tensor.numpy()
    with warnings.catch_warnings():
        # Memory-mapped weights are read-only, which torch cannot express.
        warnings.simplefilter("ignore", UserWarning)
        if dtype is torch.bfloat16:
            return torch.from_numpy(array.view("int16")).view(dtype).reshape(shape)
        return torch.from_numpy(array).reshape(shape)


def from_torch(tensor: Tensor, name: str) -> ir.TensorProtocol:
    """Return a torch tensor as ONNX sees it; it shares memory where it can."""
    from onnx_ir import tensor_adapters

    return tensor_adapters.TorchTensor(tensor.detach().cpu().contiguous(), name=name)


def dtype_name(tensor: ir.TensorProtocol) -> str:
    """Return torch's name for a tensor's dtype, as ``"float32"``."""
    return str(_TORCH[tensor.dtype]).removeprefix("torch.")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits (nan equals itself, -0.0 is not 0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
