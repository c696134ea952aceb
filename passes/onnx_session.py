"""Opening ONNX Runtime sessions with the providers that were chosen, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_fx.providers import Runtime, onnxruntime, require


def options(*, threads: int | None = None, entries: Mapping[str, str] | None = None) -> Any:
    """Return session options: every optimisation, errors only in the log, so many threads (None: all)."""
    made = onnxruntime().SessionOptions()
    made.graph_optimization_level = onnxruntime().GraphOptimizationLevel.ORT_ENABLE_ALL
    made.log_severity_level = 3
    if threads is not None:
        made.intra_op_num_threads = threads
        made.inter_op_num_threads = 1
    for key, value in (entries or {}).items():
        made.add_session_config_entry(key, value)
    return made


def open_session(
    model: str | Path | bytes,
    runtime: Runtime,
    *,
    threads: int | None = None,
    session_options: Any = None,
) -> Any:
    """Return an ``onnxruntime.InferenceSession`` of a file or of serialised bytes.

    Raises:
        ProviderError: the runtime fell back from the provider that was asked for.
    """
    made = onnxruntime().InferenceSession(
        model if isinstance(model, bytes) else str(model),
        sess_options=session_options if session_options is not None else options(threads=threads),
        providers=[name for name, _ in runtime.providers],
        provider_options=[dict(given) for _, given in runtime.providers],
    )
    require(made, runtime)
    return made
