"""What a fold refuses before it writes: to write onto what it reads, and to fold into a folded file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from lora_fx.errors import BaseMismatchError, ExportError
from lora_fx.files import is_same
from lora_fx.passes.onnx_canonical import all_initializers
from lora_fx.passes.onnx_metadata import BASE_DATA_KEY, CHANGES_KEY, DATA_KEY, read_data


def refuse_onto(target: Path, source: Path, what: str) -> None:
    """Refuse to write a file in the place of one that it is made from.

    Raises:
        ExportError: both paths lead to the same file.
    """
    if is_same(target, source):
        raise ExportError(
            str(target),
            expected="a path of its own to write to",
            got=f"out is {what}, which would be lost",
            advice="Choose another path.",
        )


def refuse_onto_data(target: Path, base: ir.Model, folder: Path) -> None:
    """Refuse to write a file in the place of one that holds weights of the base.

    Raises:
        ExportError: the path is that of such a file.
    """
    for path in _data_paths(base, folder):
        refuse_onto(target, path, "a data file of the base")


def refuse_folded(base: ir.Model, path: Path) -> None:
    """Refuse a base that is a folded file.

    Raises:
        BaseMismatchError: its metadata say that an adapter is folded in.
    """
    if CHANGES_KEY in base.metadata_props:
        raise BaseMismatchError(
            str(path),
            expected="a base",
            got="a file that already has an adapter folded in",
            advice="Pass the base that it was made from.",
        )


def _data_paths(base: ir.Model, folder: Path) -> Iterable[Path]:
    tensors = (value.const_value for value in all_initializers(base.graph))
    yield from {Path(t.base_dir) / str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)}
    for key in (DATA_KEY, BASE_DATA_KEY):
        yield from (folder / file.name for file in read_data(base.metadata_props, key))
