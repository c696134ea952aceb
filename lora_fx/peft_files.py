"""peft's folders on disk: ``adapter_config.json`` and ``adapter_model.safetensors``. peft is not imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from lora_fx.errors import AdapterFileError, PeftFormatError
from lora_fx.files import atomic_write

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What every key of a file starts with: peft's two wrappers around the model."""


@dataclass(frozen=True)
class PeftFolder:
    """An adapter as peft keeps it: its configuration, and its tensors by the keys of the file."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def write(self, folder: str | Path) -> None:
        """Write both files, each whole or not at all; the folder is made where it is not there.

        Raises:
            AdapterFileError: the path is a file's.
        """
        target = Path(folder)
        if target.exists() and not target.is_dir():
            advice = "Name a folder: peft keeps two files in it."
            raise AdapterFileError(str(target), expected="a folder's path", got="a file", advice=advice)
        target.mkdir(parents=True, exist_ok=True)
        tensors = {
            key: tensor.detach().to("cpu").clone().contiguous() for key, tensor in self.tensors.items()
        }
        atomic_write(target / WEIGHTS, safetensors.torch.save(tensors, {"format": "pt"}))
        atomic_write(target / CONFIG, json.dumps(dict(self.config), indent=2, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: str | Path, adapter: str = "default") -> PeftFolder:
        """Read the adapter of this name, or the only one, from a folder that peft wrote.

        Raises:
            AdapterFileError: no adapter is there, several are, or a file is damaged.
            PeftFormatError: the weights are pickled.
        """
        place = find_adapter(Path(folder), adapter)
        try:
            config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise _damaged(place / CONFIG, str(error)) from error
        if not isinstance(config, dict):
            raise _damaged(place / CONFIG, type(config).__name__)
        weights = place / WEIGHTS
        if not weights.is_file():
            pickled = sorted(p.name for p in place.glob("adapter_model.*"))
            raise PeftFormatError(
                str(weights),
                expected="a safetensors file",
                got=", ".join(pickled) or "no such file",
                advice="Save it again in peft with safe_serialization=True; lora_fx never unpickles.",
            )
        try:
            return cls(config, safetensors.torch.load_file(weights))
        except safetensors.SafetensorError as error:
            raise _damaged(weights, str(error)) from error


def is_peft_folder(path: str | Path) -> bool:
    """Say whether a folder holds a peft adapter, itself or in a subfolder."""
    return Path(path).is_dir() and bool(_places(Path(path)))


def find_adapter(folder: Path, adapter: str = "default") -> Path:
    """Return where the adapter lies: peft keeps one that is not called "default" in a subfolder.

    Raises:
        AdapterFileError: no adapter is there, or several and none of this name.
    """
    places = _places(folder)
    if adapter in places:
        return places[adapter]
    if "default" in places:
        return places["default"]
    if len(places) == 1:
        return next(iter(places.values()))
    files = [path.name for path in sorted(folder.glob("*.safetensors"))]
    raise AdapterFileError(
        str(folder),
        expected=f"a file of lora_fx's, or a folder of peft's with {CONFIG}, in itself or in one subfolder",
        got=f"adapters {sorted(places)}" if places else f"a folder with {', '.join(files) or 'neither'}",
        advice=f"Pass the file itself: {folder / files[0]}."
        if files and not places
        else "Pass the adapter's own folder.",
    )


def _places(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    found = {"default": folder} if (folder / CONFIG).is_file() else {}
    return found | {p.name: p for p in sorted(folder.iterdir()) if (p / CONFIG).is_file()}


def _damaged(path: Path, got: str) -> AdapterFileError:
    return AdapterFileError(
        str(path),
        expected="a file that peft wrote",
        got=f"a damaged file ({got})",
        advice="Copy or save it again.",
    )
