"""Fingerprints of base weights: what tells one base model from another of equal shapes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from lora_fx.errors import AdapterFileError

if TYPE_CHECKING:
    from torch import Tensor

_PART = 1 << 22
"""Elements of a weight that are copied at a time."""

BaseCheck = Literal["exact", "values", "shape"]


@dataclass(frozen=True)
class Fingerprint:
    """Shape, dtype and SHA-256 of a weight's bytes (row-major, little-endian)."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data, read back by ``from_json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Fingerprint:
        """Read what ``to_json`` wrote."""
        return cls(tuple(data["shape"]), data["dtype"], data["sha256"])


def dtype_name(tensor: Tensor) -> str:
    """Return ``"float32"`` for ``torch.float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Return the fingerprint of a weight; one on the meta device has an empty hash."""
    import torch

    shape = tuple(tensor.shape)
    if tensor.device.type == "meta":
        return Fingerprint(shape, dtype_name(tensor), "")
    digest = hashlib.sha256()
    held = tensor.detach().to("cpu")
    # A transposed weight is laid out row by row in parts, and never copied as a whole.
    step = 1 if not shape else len(held) if held.is_contiguous() else max(1, _PART // max(1, held[0].numel()))
    for part in (held,) if not shape or not len(held) else torch.split(held, step):
        # Not flatten(): one number alone may keep any stride, and bytes ask for one of 1.
        digest.update(part.contiguous().as_strided((part.numel(),), (1,)).view(torch.uint8).numpy().data)
    return Fingerprint(shape, dtype_name(tensor), digest.hexdigest())


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, shapes, dtypes and values of tensors, in the order of their names."""
    described = {key: fingerprint(tensor).to_json() for key, tensor in tensors.items()}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def differs(weight: Tensor, stored: Fingerprint, check: BaseCheck) -> str | None:
    """Say how a weight differs from a stored fingerprint; None: it does not.

    ``exact``: shape, dtype and every bit; ``values``: the weight, cast to the stored dtype, has the
    stored bits (trained on a half-precision copy, folded into the original); ``shape``: shape alone.

    Raises:
        AdapterFileError: another word than these.
    """
    import torch

    if check not in get_args(BaseCheck):
        raise AdapterFileError(
            "base_check",
            expected="one of " + ", ".join(repr(word) for word in get_args(BaseCheck)),
            got=repr(check),
            advice="Name one of them.",
        )
    if tuple(weight.shape) != stored.shape:
        return f"shape {tuple(weight.shape)}, not {stored.shape}"
    if check == "shape" or not stored.sha256:
        return None
    if check == "values":
        weight = weight.detach().to(getattr(torch, stored.dtype))
    found = fingerprint(weight)
    if found.dtype != stored.dtype:
        return f"dtype {found.dtype}, not {stored.dtype}"
    return None if found.sha256 == stored.sha256 else "other values"
