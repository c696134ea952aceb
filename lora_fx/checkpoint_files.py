"""Checkpoints on disk: one safetensors file, or a folder with one or with many and their index.

A safetensors file is a header (8 bytes of length, then JSON: of every tensor its dtype, shape and place) and
the tensors' bytes, without gaps. A file with other values of the same shapes and dtypes has the same
header, so that one is made from the other by copying all that does not change.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from lora_fx.errors import CheckpointError, NoCheckpointError

INDEX = ".safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".data")
"""How the names of files end that hold weights, or may: those of the base, which a folded copy has not."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CHUNK = 4 << 20

Progress = Callable[[int], None]
"""Told the number of bytes written, part by part."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: its key, dtype as safetensors calls it, shape, and its bytes' place."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    size: int

    def read(self) -> Tensor:
        """Return the tensor, read into memory of its own.

        Raises:
            CheckpointError: its dtype is none that a weight can be trained or folded in.
        """
        dtype = DTYPES.get(self.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.path.name}: {self.key}",
                expected=f"one of {', '.join(DTYPES)}",
                got=f"dtype {self.dtype}, of a quantised checkpoint",
                advice="Fold into the checkpoint that it was made from, and quantise again.",
            )
        content = bytearray(self.size)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            filled, view = 0, memoryview(content)
            while filled < self.size and (count := file.readinto(view[filled : filled + _CHUNK])):
                filled += count
        if filled < self.size:
            raise _damaged(self.path, "a file that became shorter")
        empty = torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(content, dtype=dtype).reshape(self.shape) if self.size else empty


@dataclass(frozen=True)
class Shard:
    """One safetensors file: the length of all before the first tensor, and its tensors as they lie."""

    path: Path
    header: int
    tensors: tuple[Stored, ...]

    @classmethod
    def read(cls, path: Path) -> Shard:
        """Read a file's header.

        Raises:
            CheckpointError: it is damaged, or no safetensors file.
        """
        try:
            # The library checks that the tensors fill the file, without gaps and overlaps.
            with safetensors.safe_open(path, framework="pt"):
                pass
        except safetensors.SafetensorError as error:
            raise _damaged(path, str(error)) from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries: dict[str, Any] = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        found = [
            Stored(key, e["dtype"], tuple(e["shape"]), path, 8 + length + begin, end - begin)
            for key, e in entries.items()
            for begin, end in (e["data_offsets"],)
        ]
        return cls(path, 8 + length, tuple(sorted(found, key=lambda stored: (stored.start, stored.size))))

    def copy_to(
        self, target: BinaryIO, changed: Callable[[Stored], Tensor | None], progress: Progress | None
    ) -> None:
        """Write the file anew, with other values where ``changed`` gives some; a tensor in memory at a time.

        Raises:
            CheckpointError: the file became shorter meanwhile.
        """
        with self.path.open("rb") as source:
            target.writelines(self._parts(source, self.header))
            for stored in self.tensors:
                for part in self._new_parts(source, stored, changed):
                    target.write(part)
                    if progress is not None:
                        progress(len(part))
                    del part  # it keeps its tensor in memory while the next one is made

    def _new_parts(
        self, source: BinaryIO, stored: Stored, changed: Callable[[Stored], Tensor | None]
    ) -> Iterator[bytes | memoryview]:
        value = changed(stored)
        if value is not None:
            yield from _parts_of(value, stored)
            return
        source.seek(stored.start)
        yield from self._parts(source, stored.size)

    def _parts(self, source: BinaryIO, size: int) -> Iterator[bytes]:
        while size:
            part = source.read(min(size, _CHUNK))
            if not part:
                raise _damaged(self.path, "a file that became shorter")
            size -= len(part)
            yield part


def _parts_of(value: Tensor, stored: Stored) -> Iterator[memoryview]:
    if tuple(value.shape) != stored.shape or value.dtype != DTYPES[stored.dtype]:
        raise RuntimeError(f"another shape or dtype for {stored.key}")
    whole = value.contiguous().flatten().view(torch.uint8).numpy().data
    for start in range(0, len(whole), _CHUNK):
        yield whole[start : start + _CHUNK]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its files of weights, and every tensor by its key.

    ``beside`` are the other files of its folder (configuration, tokenizer), ``left_out`` what else lies
    there and is not the checkpoint's: weights in other formats, folders. A single file has neither.
    """

    path: Path
    shards: tuple[Shard, ...]
    beside: tuple[Path, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, and not one file."""
        return self.path.is_dir()

    @property
    def tensors(self) -> dict[str, Stored]:
        """Every tensor by its key."""
        return {stored.key: stored for shard in self.shards for stored in shard.tensors}

    @classmethod
    def read(cls, path: str | Path) -> Checkpoint:
        """Find the files of a checkpoint, and read their headers.

        Raises:
            NoCheckpointError: there is no such file or folder.
            CheckpointError: a file is damaged or missing, or the folder has none or several checkpoints.
        """
        place = Path(path)
        if not place.exists():
            raise NoCheckpointError(
                str(path),
                expected="a .safetensors file, or a folder with some",
                got="no such file or folder",
                advice="Check the path.",
            )
        if not place.is_dir():
            return cls(place, (Shard.read(place),))
        index, names = _files(place)
        shards = tuple(Shard.read(place / name) for name in names)
        if index is not None:
            _check_index(index, shards)
        used = {place / name for name in names} | ({index} if index is not None else set())
        rest = sorted(file for file in place.iterdir() if file not in used)
        out = [file for file in rest if not file.is_file() or _holds_weights(file.name)]
        beside = [*(() if index is None else (index,)), *(file for file in rest if file not in out)]
        return cls(place, shards, tuple(beside), tuple(file.name for file in out))

    def write(
        self,
        folder: Path,
        changed: Callable[[Stored], Tensor | None],
        write_file: Callable[[Path], Any],
        progress: Progress | None,
    ) -> None:
        """Write a folder's copy, with other values where ``changed`` gives some, and the files beside."""
        for shard in self.shards:
            with write_file(folder / shard.path.name) as file:
                shard.copy_to(file, changed, progress)
        for path in self.beside:
            with path.open("rb") as source, write_file(folder / path.name) as file:
                shutil.copyfileobj(source, file)


def _files(folder: Path) -> tuple[Path | None, list[str]]:
    """Return a folder's index, if it has one, and the names of its safetensors files."""
    indices = sorted(folder.glob(f"*{INDEX}"))
    single = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors").is_file() and not indices:
        return None, ["model.safetensors"]
    if (folder / f"model{INDEX}") in indices:
        indices = [folder / f"model{INDEX}"]
    if len(indices) == 1:
        return indices[0], _indexed(indices[0])
    if len(single) == 1 and not indices:
        return None, [single[0].name]
    found = [path.name for path in (indices or single)]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    raise CheckpointError(
        str(folder),
        expected=f"model.safetensors, model{INDEX}, or one file of this kind",
        got=", ".join(found or pickled) or "no safetensors file",
        advice="Pass the file itself."
        if found
        else "Save it with save_pretrained, which writes safetensors; lora_fx never unpickles.",
    )


def _indexed(index: Path) -> list[str]:
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    """Return which file holds each tensor.

    Raises:
        CheckpointError: the index cannot be read, or names files that are not there or lie elsewhere.
    """
    try:
        found: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        held = {str(key): str(name) for key, name in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, f"{type(error).__name__}: {error}") from error
    for name in sorted(set(held.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise NoCheckpointError(
                str(index),
                expected="the files that the index names, beside it",
                got=f"{name}, which is not there",
                advice="Copy the checkpoint again, all of its files.",
            )
    return held


def _check_index(index: Path, shards: tuple[Shard, ...]) -> None:
    """Refuse an index that tells another place of some tensor than the files do.

    Raises:
        CheckpointError: it does.
    """
    told = set(_weight_map(index).items())
    held = {(stored.key, shard.path.name) for shard in shards for stored in shard.tensors}
    for wrong, where, got in (
        (told - held, "missing from", "that file without it"),
        (held - told, "not listed for", "it there all the same"),
    ):
        if wrong:
            key, name = min(wrong)
            raise CheckpointError(
                f"{index}: {key}",
                expected="an index that agrees with its files",
                got=f"{got}: {len(wrong)} tensors are {where} the file that is named, {key} in {name} first",
                advice="Copy or save the checkpoint again, all of its files.",
            )


def _holds_weights(name: str) -> bool:
    plain = name.removesuffix(".index.json")
    return any(plain.endswith(ending) for ending in WEIGHTS)


def _damaged(path: Path, got: str) -> CheckpointError:
    return CheckpointError(
        str(path), expected="a safetensors file, whole", got=got, advice="Copy or save it again."
    )
