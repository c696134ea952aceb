"""The graph that ONNX Runtime makes of a file on the provider in use, for comparison."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_fx.passes import onnx_session
from lora_fx.providers import Runtime

_WEIGHTS = "weights"


@dataclass(frozen=True)
class Opened:
    """A session, and the graph that it runs after every optimisation (its weights are not kept)."""

    session: Any
    graph: ir.Model


def open_optimised(path: Path, runtime: Runtime, *, threads: int | None = None) -> Opened:
    """Open a session and read back the optimised graph that it runs."""
    with tempfile.TemporaryDirectory(prefix="lora_fx-") as folder:
        target = Path(folder) / "optimised.onnx"
        options = onnx_session.options(
            threads=threads,
            entries={
                "session.optimized_model_external_initializers_file_name": _WEIGHTS,
                "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
            },
        )
        options.optimized_model_filepath = str(target)
        session = onnx_session.open_session(path, runtime, session_options=options)
        graph = ir.load(str(target))
        for value in graph.graph.initializers.values():
            # Small ones are read now; large ones are floats, of which only the shape counts.
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and not tensor.dtype.is_floating_point():
                value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)
        return Opened(session, graph)
