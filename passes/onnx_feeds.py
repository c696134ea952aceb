"""Inputs for an ONNX session when nobody gave any: random, of the types that the graph declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import InputError
from lora_fx.passes.onnx_parity import RuntimeFault, run
from lora_fx.passes.onnx_tensors import ort_value
from lora_fx.providers import onnxruntime

LENGTH = 16
"""The size of open dimensions that come second or later."""
OTHER_LENGTHS = (8, 4, 2, 1, 64, 224)
"""Sizes that are tried where that is not accepted."""

Feeds = Mapping[str, Any]
"""The runtime's own values by input name."""

_DTYPES: Mapping[str, torch.dtype] = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


def runnable_feeds(session: Any, *, seed: int) -> dict[str, Any]:
    """Return random inputs of sizes that the session runs with, or of the first tried if with none.

    A dimension that a graph leaves open may have bounds that it does not declare: a table of positions.

    Raises:
        InputError: an input is of a type that no values are made for.
    """
    first = random_feeds(session, seed=seed)
    if _runs(session, first) or all(isinstance(n, int) for item in session.get_inputs() for n in item.shape):
        return first
    others = (random_feeds(session, seed=seed, length=length) for length in OTHER_LENGTHS)
    return next((feeds for feeds in others if _runs(session, feeds)), first)


def _runs(session: Any, feeds: Feeds) -> bool:
    options = onnxruntime().RunOptions()
    options.log_severity_level = 4  # a refusal is an answer here, and no error to be told
    try:
        run(session, feeds, options)
    except RuntimeFault:
        return False
    return True


def random_feeds(
    session: Any, *, seed: int, sizes: Mapping[str, int] | None = None, length: int = LENGTH
) -> dict[str, Any]:
    """Return random inputs for a session.

    A varying dimension takes its size from ``sizes``, by the symbol's name, or else 2 where it comes
    first and ``length`` elsewhere. Floats are normal; integers are 0 or 1, which are indices and mask values
    in any model; booleans are true.

    Raises:
        InputError: an input is of a type that no values are made for.
    """
    generator = torch.Generator().manual_seed(seed)
    symbols: dict[str, int] = dict(sizes or {})
    feeds: dict[str, Any] = {}
    for declared in session.get_inputs():
        shape = [
            dim if isinstance(dim, int) else symbols.setdefault(str(dim), 2 if axis == 0 else length)
            for axis, dim in enumerate(declared.shape)
        ]
        feeds[declared.name] = ort_value(_draw(declared.name, declared.type, shape, generator))
    return feeds


def _draw(name: str, declared: str, shape: list[int], generator: torch.Generator) -> Tensor:
    if declared not in _DTYPES:
        raise InputError(
            f"input {name!r}", expected="a tensor of numbers", got=declared, advice="Pass inputs of your own."
        )
    dtype = _DTYPES[declared]
    if dtype is torch.bool:
        return torch.ones(shape, dtype=dtype)
    if not dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)
