"""What lora_fx writes into an ONNX file's metadata, and reads back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_fx.errors import AdapterValueError
from lora_fx.passes.extent import Extent
from lora_fx.passes.onnx_canonical import all_initializers
from lora_fx.passes.onnx_files import DataFile, file_sha256
from lora_fx.passes.onnx_mapping import MAPPING_KEY, ParameterMap
from lora_fx.passes.onnx_tensors import data_path

PLAN_KEY = "lora_fx.plan"
CHANGES_KEY = "lora_fx.changes"
DIGEST_KEY = "lora_fx.base_digest"
DATA_KEY = "lora_fx.data"
BASE_DATA_KEY = "lora_fx.base_data"


def lossy_notes(extents: Mapping[str, Extent], *, least: float = 0.9) -> list[str]:
    """Say which weights lose more than a tenth of their change to the precision that they are stored in."""
    return [
        f"{name}: {1 - extent.retained:.0%} of the change is lost to the precision it is stored in"
        for name, extent in extents.items()
        if extent.retained < least
    ]


def refuse_lost(extents: Mapping[str, Extent], *, least: float) -> None:
    """Refuse a precision that keeps less than ``least`` of a change.

    Raises:
        AdapterValueError: it does so for some weight.
    """
    lost = sorted((e.retained, name) for name, e in extents.items() if e.retained < least)
    if lost:
        retained, name = lost[0]
        raise AdapterValueError(
            name,
            expected=f"at least {least:.0%} of the change to survive the precision of the file",
            got=f"{retained:.0%}, and too little of {len(lost)} weights in all",
            advice="Export in float32 or float16, or pass min_retained=0 to accept the loss.",
        )


def write_base(model: ir.Model, mapping: ParameterMap, data: DataFile | None) -> None:
    """Note in a base file how its initializers hold the parameters, and what its data file is."""
    model.metadata_props[MAPPING_KEY] = mapping.to_json()
    write_data(model, DATA_KEY, [] if data is None else [data])


def read_map(model: ir.Model) -> ParameterMap | None:
    """Return the map that a base file carries, or None."""
    text = model.metadata_props.get(MAPPING_KEY)
    return None if text is None else ParameterMap.from_json(text)


def write_data(model: ir.Model, key: str, files: Iterable[DataFile]) -> None:
    """Note names, sizes and hashes of data files."""
    listed = [vars(file) for file in files]
    model.metadata_props.pop(key, None)
    if listed:
        model.metadata_props[key] = json.dumps(listed)


def read_data(metadata: Mapping[str, str], key: str) -> tuple[DataFile, ...]:
    """Return the data files noted under a key."""
    return tuple(DataFile(**item) for item in json.loads(metadata.get(key, "[]")))


def data_files(model: ir.Model, folder: Path) -> tuple[DataFile, ...]:
    """Return a base's data files, from its metadata or, in a file of another make, by hashing them."""
    noted = read_data(model.metadata_props, DATA_KEY)
    tensors = (value.const_value for value in all_initializers(model.graph))
    paths = {data_path(tensor) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    known = {(folder / file.name).resolve() for file in noted}
    if paths <= known:
        return noted
    root = folder.resolve()
    return tuple(
        DataFile(path.relative_to(root).as_posix(), path.stat().st_size, file_sha256(path))
        for path in sorted(paths)
    )


def write_folded(
    model: ir.Model,
    *,
    plan: str | None,
    extents: Mapping[str, Extent],
    digest: str,
    data: DataFile | None,
    base_data: Iterable[DataFile] = (),
) -> None:
    """Note in a folded file what was changed, by how much, its base's structure, and its data files."""
    model.metadata_props.pop(MAPPING_KEY, None)
    write_data(model, DATA_KEY, [] if data is None else [data])
    write_data(model, BASE_DATA_KEY, base_data)
    if plan is not None:
        model.metadata_props[PLAN_KEY] = plan
    model.metadata_props[CHANGES_KEY] = json.dumps({name: vars(extent) for name, extent in extents.items()})
    model.metadata_props[DIGEST_KEY] = digest


def read_changes(metadata: Mapping[str, str]) -> dict[str, Extent] | None:
    """Return how much each weight was changed, by qualified name, or None in a file without adapters."""
    text = metadata.get(CHANGES_KEY)
    if text is None:
        return None
    data: dict[str, Any] = json.loads(text)
    return {name: Extent(**extent) for name, extent in data.items()}
