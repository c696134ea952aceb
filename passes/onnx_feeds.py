"""Inputs for an ONNX session when nobody gave any: random, of the types that the graph declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Feeds = Mapping[str, NDArray[Any]]

_DTYPES: Mapping[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def random_feeds(
    session: Any, *, seed: int, sizes: Mapping[str, int] | None = None
) -> dict[str, NDArray[Any]]:
    """Return random inputs for a session.

    A dynamic dimension takes its size from ``sizes``, by the symbol's name, or else 2 where it comes
    first and 16 elsewhere. Floats are normal; integers are 0 or 1, which are indices and mask values
    in any model; booleans are true.
    """
    random = np.random.default_rng(seed)
    feeds: dict[str, NDArray[Any]] = {}
    symbols: dict[str, int] = dict(sizes or {})
    for declared in session.get_inputs():
        shape = [
            dim if isinstance(dim, int) else symbols.setdefault(str(dim), 2 if axis == 0 else 16)
            for axis, dim in enumerate(declared.shape)
        ]
        feeds[declared.name] = _draw(random, _dtype(declared.type), shape)
    return feeds


def _dtype(declared: str) -> Any:
    if declared == "tensor(bfloat16)":
        from ml_dtypes import bfloat16

        return bfloat16
    if declared not in _DTYPES:
        raise TypeError(f"no random values of {declared}: pass inputs")
    return _DTYPES[declared]


def _draw(random: np.random.Generator, dtype: Any, shape: list[int]) -> NDArray[Any]:
    if dtype is np.bool_:
        return np.ones(shape, dtype)
    if np.issubdtype(dtype, np.integer):
        return random.integers(0, 2, shape).astype(dtype)
    return random.standard_normal(shape).astype(dtype)
