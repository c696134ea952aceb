"""The graph that ONNX Runtime makes of a file on the provider in use, for comparison."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_fx.errors import ProviderError
from lora_fx.passes import onnx_files, onnx_session
from lora_fx.passes.onnx_widen import holds_bfloat16, widen
from lora_fx.providers import Runtime

_WEIGHTS = "weights"
_LARGE = 1 << 20


@dataclass(frozen=True)
class Opened:
    """A session, and the graph that it runs after every optimisation (its weights are not kept)."""

    session: Any
    graph: ir.Model


def open_pair(base: Path, folded: Path, runtime: Runtime, notes: list[str]) -> tuple[Opened, Opened]:
    """Open a base and a folded file, both in the same way.

    Where the provider has no kernels for the bfloat16 of both, float32 twins of them are opened, and a
    note says so.

    Raises:
        Refused: the runtime refuses one of them.
    """
    try:
        return _open("base", base, runtime), _open("folded", folded, runtime)
    except Refused as error:
        models = onnx_files.load(base), onnx_files.load(folded)
        # A graph that is invalid stays so; only kernels may be missing.
        missing = "NOT_IMPLEMENTED" in str(error) and error.place == "the base file"
        if not missing or not all(holds_bfloat16(model) for model in models):
            raise
        notes.append(
            f"{runtime.first} has no kernels for this graph; float32 twins ran in its place ({error})"
        )
        with tempfile.TemporaryDirectory(prefix="lora_fx-") as folder:
            twins: list[Opened] = []
            for name, model in zip(("base", "folded"), models, strict=True):
                widen(model)
                onnx_files.save(model, Path(folder) / f"{name}.onnx")
                twins.append(_open(name, Path(folder) / f"{name}.onnx", runtime))
            return twins[0], twins[1]


class Refused(Exception):  # noqa: N818 - caught by the check that it becomes
    """The runtime refuses to open a file."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(reason)
        self.place = place


def _open(name: str, path: Path, runtime: Runtime) -> Opened:
    try:
        return open_optimised(path, runtime)
    except ProviderError:
        raise
    except Exception as error:  # onnxruntime's classes differ from version to version
        raise Refused(f"the {name} file", str(error).strip().splitlines()[0]) from error


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
