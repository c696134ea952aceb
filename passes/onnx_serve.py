"""Several adapters over one base file in one process: folded in memory, sharing the base's weights.

A session is opened on the base's own graph, in which the changed weights are given as values and all
others still point into the base's data file, which the runtime maps into memory. So a second adapter
reads no base weight again, and writes no file.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_fx.adapter_file import AdapterFile
from lora_fx.fingerprints import BaseCheck
from lora_fx.passes import onnx_files, onnx_session
from lora_fx.passes.fold_onnx import check_base
from lora_fx.passes.onnx_adapter import base_map
from lora_fx.passes.onnx_patch import Patch, find_patches
from lora_fx.passes.onnx_refusals import refuse_folded
from lora_fx.passes.onnx_tensors import from_torch, ort_value
from lora_fx.passes.weights import adapter_weights
from lora_fx.providers import Runtime

_KEPT = 8


@dataclass(frozen=True)
class _Base:
    """A base file as it was read once."""

    path: Path
    model: ir.Model


@functools.lru_cache(maxsize=_KEPT)
def _read(path: Path, stamp: tuple[int, int]) -> _Base:
    """Read a base; ``stamp`` is its size and time, so that a changed file is read again."""
    del stamp
    return _Base(path, onnx_files.load(path))


def adapted_session(
    path: Path,
    adapter: str | Path | AdapterFile,
    runtime: Runtime,
    *,
    threads: int | None = None,
    share_weights: bool = False,
    base_check: BaseCheck = "exact",
) -> Any:
    """Return a session of a base file with an adapter folded in, without writing a file.

    ``share_weights`` keeps the runtime from packing its own copy of the base's matrices: every session
    then uses the same memory, and small batches on a CPU are slower.

    Raises:
        ExportError: a weight lies in the base in a way that is not known.
        BaseMismatchError: the adapter was made for another base, or one is folded into this file already.
        AdapterFileError: the adapter file cannot be read.
        ProviderError: the provider asked for is not there.
    """
    file = adapter if isinstance(adapter, AdapterFile) else AdapterFile.read(adapter)
    status = path.stat()
    base = _read(path.resolve(), (status.st_size, status.st_mtime_ns))
    refuse_folded(base.model, path)
    mapping = base_map(base.model, file)
    check_base(base.model, mapping, file, path, base_check)
    patches = find_patches(base.model, mapping, adapter_weights(file)).require(str(path))
    values, serialised = _folded(base, patches)
    options = onnx_session.options(
        threads=threads,
        entries={
            "session.model_external_initializers_file_folder_path": str(base.path.parent),
            "session.disable_prepacking": "1" if share_weights else "0",
        },
    )
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    return onnx_session.open_session(serialised, runtime, session_options=options)


def _folded(base: _Base, patches: tuple[Patch, ...]) -> tuple[Mapping[str, Any], bytes]:
    """Return the changed weights that lie outside the graph, and the graph with the others."""
    initializers = base.model.graph.initializers
    values: dict[str, Any] = {}
    inline: dict[str, ir.TensorProtocol] = {}
    for patch in patches:
        new = patch.value()
        if isinstance(patch.base, ir.ExternalTensor):
            values[patch.initializer] = ort_value(new)
        else:
            inline[patch.initializer] = from_torch(new, patch.initializer)
    before = {name: initializers[name].const_value for name in inline}
    try:
        for name, tensor in inline.items():
            initializers[name].const_value = tensor
        return values, ir.to_proto(base.model).SerializeToString()
    finally:
        for name, held in before.items():
            initializers[name].const_value = held
