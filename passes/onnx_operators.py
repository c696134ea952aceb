"""Operators that torch's exporter has no translation for, by such as ONNX has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def translations() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Return what ``torch.onnx.export`` takes as ``custom_translation_table``."""
    from onnxscript import opset18

    op: Any = opset18

    def is_all_true(mask: Any) -> Any:
        """Say whether every element is true: models that check their inputs ask this (transformers')."""
        return op.Cast(op.ReduceMin(op.Cast(mask, to=7), keepdims=0), to=9)

    return {torch.ops.aten._is_all_true.default: is_all_true}
