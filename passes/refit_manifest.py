"""What a runtime that refits engines needs of a folded file: names in the base, and the new values.

A TensorRT engine built from the *base* file with the REFIT flag takes the folded weights by name, and keeps
the tactics that were timed for it, where a rebuilt engine times them anew. The ONNX parser names weights
after the file's initializers, so these are the names of ``refit_manifest``::

    config.set_flag(trt.BuilderFlag.REFIT)                      # when the base's engine is built
    manifest = lora_fx.refit_manifest("base.onnx", "task.onnx")
    refitter, held = trt.Refitter(engine, logger), dict(refit_values("base.onnx", "task.onnx"))
    for name, value in held.items():                            # numpy; keep them until the refit is done
        assert refitter.set_named_weights(name, value)          # False: no such weight, or another count
    assert refitter.refit_cuda_engine(), refitter.get_missing_weights()

This was written from NVIDIA's documentation and has not been run here, for lack of a GPU. Its documentation
also says: a weight that an engine joined with others asks for those too (``get_missing_weights``: give the
base's values), and TensorRT 11.3 may drop a bias of a Gemm in engines built with REFIT.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_fx.errors import ExportError
from lora_fx.manifests import Manifest, Refit
from lora_fx.passes import onnx_files
from lora_fx.passes.onnx_canonical import all_initializers
from lora_fx.passes.onnx_diff import compare
from lora_fx.passes.onnx_files import file_sha256
from lora_fx.passes.onnx_metadata import read_map
from lora_fx.passes.onnx_tensors import data_path, same_tensor, sha256, shape_of

Pair = tuple[ir.Value, ir.Value]


def refit_manifest(base_onnx: str | Path, folded_onnx: str | Path) -> Manifest:
    """Return which initializers of the base a folded file or an overlay changes, and to what.

    Raises:
        ExportError: a file is no ONNX model, or the two differ in more than numbers.
    """
    base, pairs = _changed(Path(base_onnx), Path(folded_onnx))
    held = _parameters(base)
    weights = tuple(_refit(ours, theirs, held.get(ours.name or "", {})) for ours, theirs in pairs)
    tensors = (value.const_value for value in all_initializers(base.graph))
    data = {data_path(tensor) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    files = (Path(base_onnx), *sorted(data))
    hashes = {path.name: file_sha256(path) for path in files}
    return Manifest(Path(base_onnx).name, Path(folded_onnx).name, hashes, weights)


def refit_values(base_onnx: str | Path, folded_onnx: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield the base's name and the folded value, as a numpy array, of each initializer to refit.

    Raises:
        ExportError: a file is no ONNX model, or the two differ in more than numbers.
    """
    for ours, theirs in _changed(Path(base_onnx), Path(folded_onnx))[1]:
        assert theirs.const_value is not None
        yield ours.name or "", theirs.const_value.numpy()


def _changed(base_path: Path, folded_path: Path) -> tuple[ir.Model, list[Pair]]:
    base, folded = onnx_files.load(base_path), onnx_files.load(folded_path)
    comparison = compare(base, folded)
    if comparison.difference is not None:
        raise ExportError(
            str(folded_path),
            expected=f"the graph of {base_path.name} with other numbers",
            got=str(comparison.difference),
            advice="Pass a base and a file that was folded from it.",
        )
    pairs = [(b, o) for b, o in comparison.pairs if not same_tensor(b.const_value, o.const_value)]
    order = {name: position for position, name in enumerate(base.graph.initializers)}
    return base, sorted(pairs, key=lambda pair: order.get(pair[0].name or "", len(order)))


def _parameters(base: ir.Model) -> dict[str, dict[str, str]]:
    """Return the parameters in each initializer, and how they lie there."""
    mapping = read_map(base)
    found: dict[str, dict[str, str]] = {}
    for name, placement in (mapping.placements if mapping is not None else {}).items():
        for recipe in placement.recipes:
            found.setdefault(recipe.initializer, {})[name] = recipe.label
        for initializer in placement.opaque:
            found.setdefault(initializer, {}).setdefault(name, "opaque")
    return found


def _refit(ours: ir.Value, theirs: ir.Value, parameters: dict[str, str]) -> Refit:
    tensor = theirs.const_value
    assert tensor is not None
    return Refit(
        ours.name or "",
        theirs.name or "",
        parameters,
        shape_of(tensor),
        tensor.dtype.name.lower(),
        tensor.nbytes,
        sha256(tensor),
    )
