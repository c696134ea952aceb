"""ONNX files on disk: read lazily, stripped of machine paths, and written whole or not at all.

A file is written under a temporary name in the same folder, synced and renamed. Weights outside the
file go to ``<name>.<first 12 digits of their SHA-256>.data``: the name says what is inside, so a crash
between the two renames leaves the old pair whole, and an overlay can never point at other bytes than
those it was made for.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import re
import secrets
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from lora_fx.errors import ExportError, NoOnnxFileError
from lora_fx.files import atomic_write, sync_folder
from lora_fx.passes.onnx_canonical import all_initializers, all_nodes
from lora_fx.passes.onnx_tensors import chunks, shape_of

INLINE_LIMIT = 32 << 20
"""Weights up to this many bytes in all stay in the .onnx file itself."""

ALWAYS_INLINE = 1024
_ALIGNMENTS = ((1 << 20, 4096), (0, 64))

Progress = Callable[[int], None]
"""Told the number of bytes written, tensor by tensor."""

Finish = Callable[[ir.Model, "DataFile | None"], None]
"""Completes a model's metadata after its weights are written: told the model and its data file."""


@dataclass(frozen=True)
class DataFile:
    """A file of weights beside an ONNX file: its name, size and SHA-256."""

    name: str
    size: int
    sha256: str


def load(path: str | Path) -> ir.Model:
    """Read a model; weights in other files stay there until they are asked for.

    Raises:
        NoOnnxFileError: there is no such file.
        ExportError: it is not an ONNX model.
    """
    require_file(path)
    try:
        return ir.load(str(path))
    except Exception as error:  # protobuf and onnx_ir raise classes of their own
        raise ExportError(
            str(path),
            expected="an ONNX model",
            got=f"{type(error).__name__}: {error}",
            advice="Pass the path of a .onnx file that export_onnx wrote, or any other ONNX model.",
        ) from error


def require_file(path: str | Path) -> None:
    """Refuse a path where no file is.

    Raises:
        NoOnnxFileError: there is nothing of this name.
        ExportError: it is a folder's.
    """
    place = Path(path)
    if place.is_dir():
        advice = "Name the file in it."
        raise ExportError(str(path), expected="an ONNX file", got="a folder", advice=advice)
    if not place.is_file():
        raise NoOnnxFileError(
            str(path), expected="an ONNX file", got="no such file", advice="Check the path."
        )


def strip(model: ir.Model) -> None:
    """Remove the exporter's notes (stack traces, source paths, class names) from a model, in place."""
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    model.doc_string = None
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        graph.metadata_props.clear()
        values: list[ir.Value] = [*graph.inputs, *all_initializers(graph)]
        for node in all_nodes(graph):
            node.metadata_props.clear()
            node.doc_string = None
            values += node.outputs
        for value in values:
            value.metadata_props.clear()
            value.doc_string = None


def weights_size(model: ir.Model) -> int:
    """Return the number of bytes of all initializers."""
    return sum(v.const_value.nbytes for v in all_initializers(model.graph) if v.const_value is not None)


def save(
    model: ir.Model, path: str | Path, *, external: bool | None = None, progress: Progress | None = None
) -> DataFile | None:
    """Write a model atomically; return its data file, if it has one.

    ``external`` None puts the weights into a data file when they are larger than ``INLINE_LIMIT``.
    The model is left as it was.
    """
    with draft(Path(path)) as made:
        data = made.write(model, external=external, progress=progress)
        made.publish()
    return data


@dataclass
class Draft:
    """A file that is written, and can be looked at, but does not yet bear its name."""

    final: Path
    path: Path
    data: DataFile | None = None
    published: bool = False

    def write(
        self,
        model: ir.Model,
        *,
        external: bool | None = None,
        progress: Progress | None = None,
        finish: Finish | None = None,
    ) -> DataFile | None:
        """Write a whole model, weights included, to the draft."""
        if external is None:
            external = weights_size(model) > INLINE_LIMIT
        outside = [v for v in all_initializers(model.graph) if _goes_out(v)] if external else []
        if outside:
            self.write_split(model, outside, progress=progress, finish=finish)
        else:
            with _inlined(model):
                if finish is not None:
                    finish(model, None)
                atomic_write(self.path, ir.to_proto(model).SerializeToString())
        return self.data

    def write_split(
        self,
        model: ir.Model,
        outside: Iterable[ir.Value],
        *,
        suffix: str = "data",
        progress: Progress | None = None,
        finish: Finish | None = None,
    ) -> DataFile:
        """Write the given initializers to a data file, and the rest of the model as it is.

        ``finish`` is called when the weights are written, to complete the model's metadata.
        """
        values = list(outside)
        before = [value.const_value for value in values]
        temporary, places, sha256 = _write_data(self.final, values, progress)
        data = DataFile(f"{self.final.name}.{sha256[:12]}.{suffix}", temporary.stat().st_size, sha256)
        try:
            for value, (offset, length) in zip(values, places, strict=True):
                tensor = value.const_value
                assert tensor is not None
                value.const_value = pointer(
                    tensor, data.name, offset=offset, length=length, folder=self.final.parent
                )
            if finish is not None:
                finish(model, data)
            serialised = ir.to_proto(model).SerializeToString()
        except BaseException:
            temporary.unlink()
            raise
        finally:
            for value, tensor in zip(values, before, strict=True):
                value.const_value = tensor
        temporary.replace(self.final.parent / data.name)
        atomic_write(self.path, serialised)
        self.data = data
        return data

    def publish(self) -> None:
        """Give the file its name, in the place of what bore it before."""
        self.path.replace(self.final)
        sync_folder(self.final.parent)
        self.published = True
        remove_stale(self.final, keep=None if self.data is None else self.data.name)

    def discard(self) -> None:
        """Remove the draft, and its data file unless another file uses it."""
        self.path.unlink(missing_ok=True)
        if self.data is not None:
            _remove_unused(self.final.parent / self.data.name, but=())


@contextmanager
def draft(path: Path) -> Generator[Draft]:
    """Give a draft of a file; unless it is published, nothing of it is left.

    Raises:
        ExportError: the path is a folder's.
    """
    if path.is_dir():
        advice = "Name a file in it."
        raise ExportError(str(path), expected="a file's path to write to", got="a folder", advice=advice)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Draft(path, path.parent / f".{path.stem}.{secrets.token_hex(6)}.draft.onnx")
    try:
        yield made
    finally:
        if not made.published:
            made.discard()


def pointer(
    tensor: ir.TensorProtocol,
    location: str,
    *,
    offset: int | None = None,
    length: int | None = None,
    folder: Path | None = None,
) -> ir.ExternalTensor:
    """Return a tensor of the same shape and dtype that lies in a data file."""
    if isinstance(tensor, ir.ExternalTensor) and offset is None:
        offset, length, folder = tensor.offset, tensor.length, Path(tensor.base_dir)
    return ir.ExternalTensor(
        location,
        offset,
        length,
        tensor.dtype,
        shape=ir.Shape(shape_of(tensor)),
        name=tensor.name or "",
        base_dir=folder or Path(),
    )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_stale(path: Path, *, keep: str | None) -> None:
    """Remove data files of earlier versions of this ONNX file that no other one in the folder uses."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{12}\.(data|overlay)")
    for stale in path.parent.iterdir():
        if stale.name != keep and pattern.fullmatch(stale.name):
            _remove_unused(stale, but=(path,))


def _remove_unused(data: Path, *, but: tuple[Path, ...]) -> None:
    """Remove a data file unless an ONNX file beside it, other than ``but``, mentions it."""
    others = (path for path in data.parent.glob("*.onnx") if path not in but)
    if not any(_mentions(other, data.name.encode()) for other in others):
        data.unlink(missing_ok=True)


def _mentions(path: Path, text: bytes) -> bool:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return view.find(text) >= 0


def _goes_out(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes > ALWAYS_INLINE


def _write_data(
    path: Path, values: list[ir.Value], progress: Progress | None
) -> tuple[Path, list[tuple[int, int]], str]:
    """Write tensors one after the other, large ones on page boundaries, hashing on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    places: list[tuple[int, int]] = []
    digest = hashlib.sha256()
    offset = 0
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.data.tmp"
    try:
        with temporary.open("xb") as file:
            for value in values:
                tensor = value.const_value
                assert tensor is not None
                step = next(step for size, step in _ALIGNMENTS if tensor.nbytes >= size)
                padding = -offset % step
                for part in itertools.chain([b"\0" * padding], chunks(tensor)):
                    file.write(part)
                    digest.update(part)
                places.append((offset + padding, tensor.nbytes))
                offset += padding + tensor.nbytes
                if progress is not None:
                    progress(tensor.nbytes)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary, places, digest.hexdigest()


@contextmanager
def _inlined(model: ir.Model) -> Generator[None]:
    """Hold every weight in memory, so that it is written into the file itself."""
    kinds = (ir.ExternalTensor, ir.LazyTensor)
    outside = [v for v in all_initializers(model.graph) if isinstance(v.const_value, kinds)]
    before = [value.const_value for value in outside]
    try:
        for value in outside:
            tensor = value.const_value
            assert tensor is not None
            content = ir.TensorProtoTensor(_raw_proto(tensor, value.name or ""))
            value.const_value = content
        yield
    finally:
        for value, tensor in zip(outside, before, strict=True):
            value.const_value = tensor


def _raw_proto(tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
    proto = onnx.TensorProto(data_type=int(tensor.dtype), dims=shape_of(tensor), name=name)
    proto.raw_data = b"".join(chunks(tensor))
    return proto
