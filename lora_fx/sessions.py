"""Sessions: an ONNX file in ONNX Runtime, on the provider that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_fx.errors import ExportError
from lora_fx.passes import onnx_session
from lora_fx.providers import Providers, choose


def session(path: str | Path, *, providers: Providers = "auto", threads: int | None = None) -> Any:
    """Return an ``onnxruntime.InferenceSession`` of a file.

    ``providers`` is ``"auto"`` (CUDA where there is a device, else the CPU), ``"cuda"``, ``"tensorrt"``,
    ``"cpu"``, or onnxruntime's own names and options, in order of preference.

    Raises:
        ExportError: there is no such file.
        ProviderError: the provider asked for is not there, or the runtime fell back from it.
    """
    if not Path(path).is_file():
        raise ExportError(str(path), expected="an ONNX file", got="no such file", advice="Check the path.")
    return onnx_session.open_session(path, choose(providers), threads=threads)
