"""Fold an adapter file into a checkpoint on disk: no model is built, one weight is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora_fx.adapter_file import AdapterFile
from lora_fx.audits import Audit, audit_plan
from lora_fx.checkpoint_files import Checkpoint, Stored
from lora_fx.errors import CheckpointError, PeftFormatError
from lora_fx.files import atomic_file, atomic_folder, is_same
from lora_fx.fingerprints import BaseCheck, dtype_name
from lora_fx.passes.changes import not_finite, refuse_rounded_away
from lora_fx.passes.checkpoint_keys import Keys, find_keys
from lora_fx.passes.extent import Extent
from lora_fx.passes.new_values import changed_in_bands, new_value
from lora_fx.passes.weights import Weights, adapter_weights
from lora_fx.progress import bytes_bar


def fold_checkpoint(
    checkpoint: str | Path,
    adapter: str | Path | AdapterFile,
    target: str | Path,
    *,
    base_check: BaseCheck = "exact",
    min_retained: float = 0.25,
    progress: bool = False,
) -> Audit:
    """Write a checkpoint with an adapter folded in: a file for a file, a folder for a folder.

    A folder has ``model.safetensors``, or several files and their ``.safetensors.index.json``; its other
    files are copied, weights in other formats are not. Every weight holds the bits that ``fold`` gives
    it in the model, in the checkpoint's dtype, under the checkpoint's keys. The target appears when all is
    written. ``base_check`` and ``min_retained`` are those of ``load_adapter`` and ``fold``; ``progress``
    shows a bar. The audit tells what was changed by how much.

    Raises:
        CheckpointError: the checkpoint is not there or damaged, or the target is the checkpoint, or a folder
            that is not empty.
        BaseMismatchError: the adapter was made for another base.
        AdapterFileError: the adapter file cannot be read.
        AdapterValueError: the adapter holds NaN or infinity, or is rounded away by the checkpoint's dtype.
    """
    place = Path(target)
    file = adapter if isinstance(adapter, AdapterFile) else _read(Path(adapter), place)
    base = Checkpoint.read(checkpoint)
    _refuse_target(place, base)
    file.check_shapes()
    _refuse_not_finite(file)
    keys = find_keys(base, file, base_check)
    fold = _Fold(adapter_weights(file), keys.names)
    total = sum(stored.size for shard in base.shards for stored in shard.tensors)
    with bytes_bar(total, shown=progress) as told:
        if base.is_folder:
            with atomic_folder(place) as folder:
                base.write(folder, fold, atomic_file, told)
                fold.refuse_rounded_away(min_retained)
        else:
            with atomic_file(place) as out:
                base.shards[0].copy_to(out, fold, told)
                fold.refuse_rounded_away(min_retained)
    return _audit(file, fold.extents, keys, base, place)


class _Fold:
    """Gives every stored tensor's new value, and keeps how much each was changed."""

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        self.extents: dict[str, Extent] = {}
        self._dtypes: dict[str, str] = {}
        self._weights, self._names = weights, names

    def __call__(self, stored: Stored) -> Tensor | None:
        """Return ``W`` for a stored ``W0``, or None where it is left as it is.

        Raises:
            AdapterValueError: ``W`` overflows the dtype.
        """
        name = self._names.get(stored.key)
        if name is None:
            return None
        with torch.no_grad():
            weight = stored.read()
            if not changed_in_bands(self._weights, name, weight, self.extents.__setitem__):
                weight = new_value(self._weights, name, weight, self.extents.__setitem__)
        extent = self.extents[name]
        measured = math.isfinite(extent.delta) and math.isfinite(extent.retained)
        if not measured and not bool(weight.isfinite().all()) and bool(stored.read().isfinite().all()):
            raise not_finite(stored.key)
        self._dtypes[name] = dtype_name(weight)
        return weight

    def refuse_rounded_away(self, least: float) -> None:
        """Warn of deltas that the checkpoint's dtype rounds away, or refuse them, as ``fold`` does."""
        kept = ((n, self._dtypes[n], extent.retained) for n, extent in self.extents.items())
        refuse_rounded_away(kept, least)


def _read(adapter: Path, target: Path) -> AdapterFile:
    if adapter.is_dir():
        raise PeftFormatError(
            str(adapter),
            expected="a file that save_adapter wrote",
            got="a folder; a peft folder does not say how its weights are laid out, nor what its base is",
            advice="Load it into its model with load_adapter and save it with save_adapter.",
        )
    if is_same(adapter, target):
        raise _own_path(target, "the adapter")
    return AdapterFile.read(adapter)


def _refuse_target(target: Path, base: Checkpoint) -> None:
    if is_same(target, base.path):
        raise _own_path(target, "the checkpoint")
    if base.is_folder and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            str(target),
            expected="a new folder, or an empty one",
            got="a folder that holds something" if target.is_dir() else "a file",
            advice="Choose another path, or empty it first: nothing is written over.",
        )
    if not base.is_folder and target.is_dir():
        raise CheckpointError(
            str(target),
            expected="a file's path, because the checkpoint is a file",
            got="a folder",
            advice="Name a file in it.",
        )


def _own_path(target: Path, what: str) -> CheckpointError:
    return CheckpointError(
        str(target),
        expected="a path of its own to write to",
        got=f"the target is {what}, which would be lost",
        advice="Choose another path.",
    )


def _refuse_not_finite(file: AdapterFile) -> None:
    """Refuse an adapter that holds NaN or infinity.

    Raises:
        AdapterValueError: it does.
    """
    for key, tensor in file.tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise not_finite(key)


def _audit(
    file: AdapterFile, extents: Mapping[str, Extent], keys: Keys, base: Checkpoint, out: Path
) -> Audit:
    deltas = {name: e.delta / e.weight if e.weight else e.delta for name, e in extents.items()}
    audit = audit_plan(file.plan, deltas, out.name)
    notes = [] if keys.note is None else [keys.note]
    if base.left_out:
        notes.append(f"not copied, being no part of this checkpoint: {', '.join(base.left_out)}")
    return replace(audit, notes=(*audit.notes, *notes))
