"""The graph that ONNX Runtime makes of a file on the provider in use, for comparison."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_fx.passes import onnx_session
from lora_fx.providers import Runtime

_WEIGHTS = "weights"
_LARGE = 1 << 20


@dataclass(frozen=True)
class Opened:
    """A session, and the graph that it runs after every optimisation (its weights are not kept)."""

    session: Any
    graph: ir.Model


def open_optimised(path: Path, runtime: Runtime, *, threads: int | None = None) -> Opened:
    """Open a session and read back the optimised graph that it runs.

    Of initializers of a mebibyte and more the graph keeps dtype and shape alone.
    """
    with tempfile.TemporaryDirectory(prefix="lora_fx-") as folder:
        if os.name == "posix":
            # The runtime writes its weights beside the graph; nobody reads them, so they go nowhere.
            (Path(folder) / _WEIGHTS).symlink_to(os.devnull)
        target = Path(folder) / "optimised.onnx"
        options = onnx_session.options(
            threads=threads,
            entries={
                # Two sessions and torch take turns here; threads that spin would slow each other.
                "session.intra_op.allow_spinning": "0",
                "session.optimized_model_external_initializers_file_name": _WEIGHTS,
                "session.optimized_model_external_initializers_min_size_in_bytes": str(_LARGE),
            },
        )
        options.optimized_model_filepath = str(target)
        session = onnx_session.open_session(path, runtime, session_options=options)
        return Opened(session, ir.load(str(target)))
