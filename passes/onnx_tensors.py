"""ONNX tensors as torch tensors and back, without copies where there need be none.

Weights in a data file are read with plain reads, part by part, and never mapped: mapped pages count
as resident memory, and folding must work on models that are larger than it.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lora_fx.errors import ExportError
from lora_fx.providers import onnxruntime

TORCH: Mapping[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
CHUNK = 4 << 20
_START = 256


def can_hold_weights(tensor: ir.TensorProtocol | None) -> bool:
    """Whether a tensor's dtype is one that parameters have."""
    return tensor is not None and tensor.dtype in TORCH


def as_torch(tensor: ir.TensorProtocol) -> Tensor:
    """Return a float tensor of a model as a torch tensor; it may share memory, so do not write to it."""
    dtype = TORCH[tensor.dtype]
    shape = shape_of(tensor)
    if not tensor.nbytes:
        return torch.empty(shape, dtype=dtype)
    if isinstance(tensor, ir.ExternalTensor):
        content = bytearray(tensor.nbytes)
        filled = 0
        for part in chunks(tensor):
            content[filled : filled + len(part)] = part
            filled += len(part)
        return torch.frombuffer(content, dtype=dtype).reshape(shape)
    # A constant that the exporter folded may be a view: flipped, which torch cannot express either.
    array = np.ascontiguousarray(tensor.numpy()).reshape(shape)
    with warnings.catch_warnings():
        # Weights inside a protobuf are read-only, which torch cannot express.
        warnings.simplefilter("ignore", UserWarning)
        if dtype is torch.bfloat16:
            return torch.from_numpy(array.view("int16")).view(dtype).reshape(shape)
        return torch.from_numpy(array).reshape(shape)


def shape_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Return a tensor's shape as integers."""
    return tuple(int(size) for size in tensor.shape.numpy())


def chunks(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    """Yield a tensor's bytes in parts of ``CHUNK``; of one in a data file, without holding it whole."""
    if not isinstance(tensor, ir.ExternalTensor):
        whole = _bytes(tensor)
        for begin in range(0, len(whole), CHUNK):
            yield whole[begin : begin + CHUNK]
        return
    left = tensor.nbytes if tensor.length is None else tensor.length
    with data_path(tensor).open("rb") as file:
        file.seek(tensor.offset or 0)
        while left:
            part = file.read(min(CHUNK, left))
            if not part:
                raise _truncated(tensor)
            left -= len(part)
            yield part


def _bytes(tensor: ir.TensorProtocol) -> memoryview:
    """Return a tensor's bytes, of one that is computed when it is asked for without a second copy."""
    made = tensor.raw() if isinstance(tensor, ir.LazyTensor) else tensor
    if isinstance(getattr(made, "raw", None), Tensor):
        whole = made.raw.detach().cpu().contiguous()
        return memoryview(whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy())
    return memoryview(made.tobytes())


def data_path(tensor: ir.ExternalTensor) -> Path:
    """Return the file that a tensor lies in.

    Raises:
        ExportError: it does not lie beside or below the ONNX file, which the runtimes refuse too.
    """
    folder = Path(tensor.base_dir).resolve()
    path = (folder / str(tensor.location)).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise ExportError(
            f"initializer {tensor.name!r}",
            expected="a data file beside the ONNX file, or in a folder below it",
            got=f"{tensor.location}" + ("" if path.is_file() else ", which is not there"),
            advice="Keep an ONNX file together with its data files; an overlay needs its base's.",
        )
    return path


def _truncated(tensor: ir.ExternalTensor) -> ExportError:
    return ExportError(
        f"initializer {tensor.name!r}",
        expected=f"{tensor.nbytes} bytes at {tensor.offset} in {tensor.location}",
        got="a shorter file",
        advice="The data file was cut short or belongs to another ONNX file: write both again.",
    )


def sha256(tensor: ir.TensorProtocol) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    digest = hashlib.sha256()
    for part in chunks(tensor):
        digest.update(part)
    return digest.hexdigest()


def same_tensor(base: ir.TensorProtocol | None, other: ir.TensorProtocol | None) -> bool:
    """Whether two initializers hold the same bits; the same place in the same file needs no reading."""
    if base is None or other is None:
        return base is other
    if base.dtype != other.dtype or shape_of(base) != shape_of(other):
        return False
    if base.dtype == ir.DataType.STRING:
        return bool((base.numpy() == other.numpy()).all())
    if isinstance(base, ir.ExternalTensor) and isinstance(other, ir.ExternalTensor):
        places = [(data_path(tensor), tensor.offset, tensor.length) for tensor in (base, other)]
        if places[0] == places[1]:
            return True
    return all(a == b for a, b in itertools.zip_longest(chunks(base), chunks(other)))


def from_torch(tensor: Tensor, name: str) -> ir.TensorProtocol:
    """Return a torch tensor as ONNX sees it; it shares memory where it can."""
    from onnx_ir import tensor_adapters

    return tensor_adapters.TorchTensor(tensor.detach().cpu().contiguous(), name=name)


def ort_value(tensor: Tensor) -> Any:
    """Return a torch tensor as a value of ONNX Runtime, on the CPU."""
    value_of = onnxruntime().OrtValue
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        # Numpy knows no bfloat16, so its bits are given with their ONNX type.
        bits = tensor.view(torch.int16).numpy().view("uint16")
        return value_of.ortvalue_from_numpy_with_onnx_type(bits, int(ir.DataType.BFLOAT16))
    return value_of.ortvalue_from_numpy(tensor.numpy())


def dtype_name(tensor: ir.TensorProtocol) -> str:
    """Return torch's name for a tensor's dtype, as ``"float32"``."""
    return str(TORCH[tensor.dtype]).removeprefix("torch.")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits (nan equals itself, -0.0 is not 0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    ours, theirs = (tensor.contiguous().view(integer).view(-1) for tensor in (a, b))
    # Most tensors that differ do so at the start.
    return torch.equal(ours[:_START], theirs[:_START]) and torch.equal(ours, theirs)
