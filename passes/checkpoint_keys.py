"""Under which keys a checkpoint holds the weights that an adapter changes.

A key is a weight's qualified name, or one of its tied ones. A checkpoint of a model that holds the adapted
one as a part (``bert.encoder...`` for ``encoder...``), or the reverse, differs by a prefix: it is taken
where every weight is found that way and their fingerprints prove it, and never by the names alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lora_fx.adapter_file import AdapterFile
from lora_fx.checkpoint_files import Checkpoint
from lora_fx.errors import BaseMismatchError
from lora_fx.fingerprints import BaseCheck, differs


@dataclass(frozen=True)
class Keys:
    """The keys of every changed weight, by its name in the plan; ``note`` says how, where it was no name."""

    of: Mapping[str, tuple[str, ...]]
    note: str | None = None

    @property
    def names(self) -> dict[str, str]:
        """The name in the plan of every key that changes."""
        return {key: name for name, keys in self.of.items() for key in keys}


def find_keys(checkpoint: Checkpoint, file: AdapterFile, check: BaseCheck = "exact") -> Keys:
    """Return where the checkpoint holds the adapter's weights, proven to be its base.

    Raises:
        BaseMismatchError: a weight is missing, has another shape, or differs from its fingerprint.
    """
    names, held = changed_names(file), checkpoint.tensors
    found = {name: tuple(key for key in own if key in held) for name, own in names.items()}
    missing = [name for name, keys in found.items() if not keys]
    if not missing:
        _refuse_other(checkpoint, found, file, check)
        return Keys(found)
    moved = dict(_under_a_prefix(names, checkpoint))
    provable = check != "shape" and names.keys() <= file.fingerprints.keys()
    proven = {
        how: keys for how, keys in moved.items() if provable and not _gaps(checkpoint, keys, file, check)
    }
    if len(proven) != 1:
        raise _missing(checkpoint, missing, len(names), tuple(moved), tuple(proven))
    [(how, keys)] = proven.items()
    return Keys(keys, f"the checkpoint's keys are the adapter's {how}; the fingerprints agree")


def changed_names(file: AdapterFile) -> dict[str, tuple[str, ...]]:
    """Return every name of each parameter and buffer that an adapter file changes, by the plan's own."""
    plan = file.plan
    sites = {d.name: tuple(dict.fromkeys((d.name, *d.site.names))) for d in (*plan.adapted, *plan.trained)}
    beside = (*(extra.name for extra in plan.extras), *plan.buffers)
    return sites | {name: (name, *file.ties.get(name, ())) for name in beside}


def _under_a_prefix(
    names: Mapping[str, tuple[str, ...]], checkpoint: Checkpoint
) -> Iterator[tuple[str, dict[str, tuple[str, ...]]]]:
    """Yield every prefix, put before or taken off all names, under which none is missing."""
    held = checkpoint.tensors
    first = next(iter(names.values()))
    before = {key.removesuffix(name) for key in held for name in first if key.endswith(f".{name}")}
    after = {name.removesuffix(key) for key in held for name in first if name.endswith(f".{key}")}
    for prefix in sorted(before):
        keys = {n: tuple(prefix + each for each in own if prefix + each in held) for n, own in names.items()}
        if all(keys.values()):
            yield f"with {prefix!r} before", keys
    for prefix in sorted(after):
        cut = {
            n: tuple(
                each.removeprefix(prefix)
                for each in own
                if each.startswith(prefix) and each.removeprefix(prefix) in held
            )
            for n, own in names.items()
        }
        if all(cut.values()):
            yield f"without {prefix!r}", cut


def _refuse_other(
    checkpoint: Checkpoint, keys: Mapping[str, tuple[str, ...]], file: AdapterFile, check: BaseCheck
) -> None:
    wrong = _gaps(checkpoint, keys, file, check)
    if wrong:
        raise BaseMismatchError(
            str(checkpoint.path),
            expected="the base that the adapter was trained on",
            got=f"{len(wrong)} of {sum(map(len, keys.values()))} weights differ ({'; '.join(wrong[:3])})",
            advice='Pass that base, or base_check="values" (trained in another precision) or "shape".',
        )


def _gaps(
    checkpoint: Checkpoint, keys: Mapping[str, tuple[str, ...]], file: AdapterFile, check: BaseCheck
) -> list[str]:
    """Say of every weight that is not the adapter's base what differs; one is in memory at a time."""
    found: list[str] = []
    tensors, shapes = checkpoint.tensors, _shapes(file)
    for name, own in keys.items():
        stored = file.fingerprints.get(name)
        for key in own:
            shape = tensors[key].shape
            if shape != shapes[name]:
                found.append(f"{key}: shape {shape}, not {shapes[name]}")
            elif stored is not None and check != "shape":
                gap = differs(tensors[key].read(), stored, check)
                found += [] if gap is None else [f"{key}: {gap}"]
    return found


def _shapes(file: AdapterFile) -> dict[str, tuple[int, ...]]:
    plan = file.plan
    sites = {d.name: d.site.shape for d in (*plan.adapted, *plan.trained)}
    buffers = {name: tuple(file.tensors[f"{name}/buffer"].shape) for name in plan.buffers}
    return sites | {extra.name: extra.shape for extra in plan.extras} | buffers


def _missing(
    checkpoint: Checkpoint, missing: list[str], count: int, moved: tuple[str, ...], proven: tuple[str, ...]
) -> BaseMismatchError:
    """Return the error that names what the checkpoint lacks, and what is nearest to it."""
    near = difflib.get_close_matches(missing[0], checkpoint.tensors, n=1, cutoff=0.0)
    got = f"{len(missing)} of {count} not there ({', '.join(missing[:3])})"
    got += f"; the nearest key to the first is {near[0]}" if near else ""
    if proven:
        got += f"; they are there more than once: {', '.join(proven)}"
    elif moved:
        got += f"; names fit {' or '.join(moved)}, but no fingerprint proves it"
    return BaseMismatchError(
        str(checkpoint.path),
        expected="the weights that the adapter changes, under the model's own names",
        got=got,
        advice="Pass the checkpoint of the model that was adapted; one that its library saves under other "
        "names is folded by loading the model: load_adapter, fold, and saving it.",
    )
