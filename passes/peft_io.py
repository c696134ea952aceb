"""Between a model and a peft folder."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lora_fx.adapter_file import AdapterFile
from lora_fx.notices import warn_user
from lora_fx.passes.peft_layout import layout
from lora_fx.passes.sharded import whole
from lora_fx.peft_files import PeftFolder
from lora_fx.peft_folder import to_peft
from lora_fx.peft_import import from_peft


def read_peft(model: nn.Module, folder: str | Path, adapter: str) -> AdapterFile:
    """Read a peft folder as an adapter file for this model, and warn of what nothing proves.

    Raises:
        PeftFormatError: it holds what lora_fx cannot represent.
        AdapterFileError: it is damaged, or does not fit the model.
    """
    file = from_peft(PeftFolder.read(folder, adapter), layout(model))
    for note in file.plan.notes:
        warn_user(note)
    return file


def as_peft(model: nn.Module, file: AdapterFile) -> PeftFolder:
    """Return an adapter of the model as a peft folder.

    Raises:
        PeftFormatError: something of it has no counterpart in peft's format.
    """
    made = to_peft(file, layout(model))
    return PeftFolder(made.config, {key: whole(tensor) for key, tensor in made.tensors.items()})


def folder_of(path: str | Path, adapter: str) -> Path:
    """Return where peft keeps an adapter: one that is not called "default" in a subfolder."""
    return Path(path) if adapter == "default" else Path(path) / adapter
