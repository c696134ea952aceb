"""Files on disk: written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file so that a reader sees the old content or all of the new, never a part.

    The folder is made where it is not there. The data goes to a temporary name in it, reaches the disk,
    and is then renamed over ``path``; text is written as UTF-8. If anything fails, the temporary file is
    removed and ``path`` is as it was.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    with atomic_file(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Generator[BinaryIO]:
    """Give a file to write part by part, which takes its name, as in ``atomic_write``, when all went well.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    # Opened like any new file, so that it gets the permissions that a new file gets here.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Generator[Path]:
    """Give an empty folder to fill, which takes its name when all went well; else nothing of it is left.

    An empty folder of this name is replaced, one that holds anything is an error; a link keeps leading to
    the folder. The files in it must have reached the disk before.

    Raises:
        OSError: the folder cannot be made, or is there already and not empty.
    """
    target = Path(path).resolve()  # no folder can be renamed over a link
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(target.parent)


def _temporary(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"


def is_same(one: Path, other: Path) -> bool:
    """Say whether two paths lead to one file or folder, also through links."""
    if one.resolve() == other.resolve():
        return True
    return one.exists() and other.exists() and one.samefile(other)


def sync_folder(folder: Path) -> None:
    """Make the renaming itself durable, where the system can open a folder."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
