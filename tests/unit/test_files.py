"""Atomic writes: the old content or all of the new."""

from __future__ import annotations

import os
import stat

import pytest

from lora_fx import files
from lora_fx.files import atomic_folder, atomic_write


def test_text_and_bytes(tmp_path):
    path = tmp_path / "a.bin"
    atomic_write(path, "ü")
    assert path.read_bytes() == "ü".encode()
    atomic_write(path, b"\x00\n\r")
    assert path.read_bytes() == b"\x00\n\r"
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.json"
    atomic_write(path, "old")

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", fail) if failing == "fsync" else patched.setattr(
            files.Path, "replace", fail
        )
        with pytest.raises(OSError, match="disk full"):
            atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(os.name != "posix", reason="permissions are posix")
def test_permissions_are_those_of_the_old_file_or_of_any_new_one(tmp_path):
    path, plain = tmp_path / "a", tmp_path / "b"
    atomic_write(path, "x")
    plain.write_text("x")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    path.chmod(0o640)
    atomic_write(path, "y")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_missing_folder_is_made(tmp_path):
    atomic_write(tmp_path / "no" / "such" / "a", "x")
    assert (tmp_path / "no" / "such" / "a").read_text() == "x"


@pytest.mark.skipif(os.name != "posix", reason="links")
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_may_be_named_by_a_link(tmp_path, there):
    place, link = tmp_path / "place", tmp_path / "link"
    if there:
        place.mkdir()
    link.symlink_to(place)
    with atomic_folder(link) as folder:
        (folder / "a").write_text("x")
    assert link.is_symlink()
    assert (place / "a").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "place"]
