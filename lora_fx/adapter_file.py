"""The adapter file, format version 1: one ``.safetensors`` file, no pickle.

Tensors are named after the base weight that they change::

    <weight>/A  <weight>/B                  (r, in) and (out, r); (E, r, in) and (E, out, r) in stacks
    <weight>/<role>/A  <weight>/<role>/B    where only the rows of a role are adapted
    .../A_start  .../B_start                the frozen start, where the initialisation has one
    <weight>/magnitude                      DoRA's row norms, (out,)
    <parameter>/full                        a parameter trained in full, in its own shape
    <buffer>/buffer                         running statistics that moved, in their own shape

The header's metadata holds ``format`` ("lora_fx"), ``format_version``, ``plan`` (the Plan as JSON)
``fingerprints`` (base weight -> shape, dtype, SHA-256), ``deltas`` (weight -> |W - W0| / |W0|), where there
are some ``ties`` (parameter or buffer beside the sites -> its other names; a site has its own in the plan),
``checksum``: the SHA-256 of the JSON object, keys sorted, of every tensor's shape, dtype and SHA-256, and
``header_checksum``: that of the JSON object, keys sorted, of all the texts before. Both are checked at each
reading; a file without one is read all the same, as older versions wrote none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from lora_fx.errors import AdapterFileError, AdapterValueError, BaseMismatchError, NoAdapterFileError
from lora_fx.files import atomic_write
from lora_fx.fingerprints import BaseCheck, Fingerprint, checksum, differs
from lora_fx.kinds.base import LivePart, LiveParts, since_start
from lora_fx.kinds.effective import effective_band, effective_weight
from lora_fx.matrix import MatrixForm, row_count
from lora_fx.plans import Decision, Plan

FORMAT = "lora_fx"
FORMAT_VERSION = 1
FROZEN_STARTS = ("orthogonal", "pissa", "olora")
"""Initialisations whose first product is not zero, so that a frozen copy of it is taken off."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter outside of any model: its plan, the base it belongs to, its tensors.

    ``ties`` are the other names of trained parameters and buffers that are no sites.
    """

    plan: Plan
    fingerprints: Mapping[str, Fingerprint]
    tensors: Mapping[str, Tensor]
    deltas: Mapping[str, float] = field(default_factory=dict[str, float])
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])

    def write(self, path: str | Path) -> None:
        """Write the file: under a temporary name in the same folder, synced, renamed.

        Raises:
            AdapterValueError: the tensors are on the meta device and have no values.
            AdapterFileError: the path is a folder's.
        """
        if Path(path).is_dir():
            advice = 'Name a file in it; format="peft" writes a folder.'
            raise AdapterFileError(str(path), expected="a file's path", got="a folder", advice=advice)
        empty = [key for key, tensor in self.tensors.items() if tensor.device.type == "meta"]
        if empty:
            raise AdapterValueError(
                empty[0],
                expected="an adapter with values",
                got=f"{len(empty)} tensors on the meta device",
                advice="Materialise the model first; save an adapter before its model is offloaded.",
            )
        tensors = {k: t.detach().to("cpu").contiguous() for k, t in self.tensors.items()}
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "plan": self.plan.to_json(),
            "fingerprints": json.dumps({k: f.to_json() for k, f in self.fingerprints.items()}),
            "deltas": json.dumps(dict(self.deltas)),
            "checksum": checksum(tensors),
        }
        if self.ties:
            metadata["ties"] = json.dumps({name: list(names) for name, names in self.ties.items()})
        metadata["header_checksum"] = _header_checksum(metadata)
        atomic_write(Path(path), safetensors.torch.save(tensors, metadata))

    @classmethod
    def read(cls, path: str | Path) -> AdapterFile:
        """Read a file that ``write`` wrote.

        Raises:
            AdapterFileError: not there, damaged, not an adapter, or of another version.
            PlanError: the plan in it cannot be read.
        """
        metadata, tensors = _open(Path(path))
        if metadata.get("format") != FORMAT:
            raise _bad(path, f"format {metadata.get('format')!r}", "Pass a file that save_adapter wrote.")
        version = metadata.get("format_version")
        if version != str(FORMAT_VERSION):
            raise _bad(path, f"format_version {version}", "Read it with the lora_fx that wrote it.")
        if metadata.get("checksum") not in (None, checksum(tensors)):
            raise _bad(path, "tensors that differ from the file's checksum", "Copy or save it again.")
        if metadata.get("header_checksum") not in (None, _header_checksum(metadata)):
            got = "a plan or fingerprints that differ from the file's checksum"
            raise _bad(path, got, "It was changed after it was saved: copy or save it again.")
        try:
            prints = json.loads(metadata["fingerprints"])
            fingerprints = {k: Fingerprint.from_json(v) for k, v in prints.items()}
            plan = Plan.from_json(metadata["plan"])
            ties = {str(k): tuple(v) for k, v in json.loads(metadata.get("ties", "{}")).items()}
            deltas = {str(k): float(v) for k, v in json.loads(metadata["deltas"]).items()}
        except (KeyError, TypeError, ValueError) as error:
            raise _bad(path, f"a damaged header ({error})", "Save the adapter again.") from error
        found = cls(plan, fingerprints, tensors, deltas, ties)
        wanted = [*found.expected_shapes(), *(tensor_key(name, None, "buffer") for name in plan.buffers)]
        missing = [key for key in wanted if key not in tensors]
        if missing:
            raise _bad(path, f"no tensor {missing[0]!r}", "Save the adapter again.")
        return found

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor that the plan asks for."""
        shapes: dict[str, tuple[int, ...]] = {}
        for decision in self.plan.adapted:
            form = decision.site.form
            lead = () if form.experts is None else (form.experts,)
            for part in decision.parts:
                a = (*lead, part.rank, form.in_features)
                b = (*lead, row_count(part.rows, form), part.rank)
                starts = ("", "_start") if decision.init in FROZEN_STARTS else ("",)
                for start in starts:
                    shapes[tensor_key(decision.name, part.role, "A" + start)] = a
                    shapes[tensor_key(decision.name, part.role, "B" + start)] = b
            if decision.dora:
                shapes[tensor_key(decision.name, None, "magnitude")] = (*lead, form.out_features)
        full = {d.name: d.site.shape for d in self.plan.trained} | {e.name: e.shape for e in self.plan.extras}
        return shapes | {tensor_key(name, None, "full"): shape for name, shape in full.items()}

    def check_shapes(self) -> None:
        """Refuse tensors of other shapes than the plan says.

        Raises:
            AdapterFileError: there is one.
        """
        for key, shape in self.expected_shapes().items():
            found = tuple(self.tensors[key].shape)
            if found != shape:
                raise AdapterFileError(
                    key,
                    expected=f"shape {shape}",
                    got=f"{found}",
                    advice="The file is damaged: save it again.",
                )

    def check_base(self, weights: Mapping[str, Tensor], check: BaseCheck = "exact") -> None:
        """Refuse another base.

        Raises:
            BaseMismatchError: a weight is missing, or differs from its fingerprint.
        """
        wrong: list[str] = []
        for name, stored in self.fingerprints.items():
            gap = "not there" if name not in weights else differs(weights[name], stored, check)
            if gap is not None:
                wrong.append(f"{name}: {gap}")
        if wrong:
            raise BaseMismatchError(
                "the base model",
                expected="the base that the adapter was trained on",
                got=f"{len(wrong)} of {len(self.fingerprints)} weights differ ({'; '.join(wrong[:3])})",
                advice='Load that base, or pass base_check="values" (another precision) or "shape".',
            )

    def effective(self, name: str, base: Tensor) -> Tensor:
        """Return ``W`` for a base weight that the adapter changes, by its name in the plan."""
        value = self._whole(name)
        if value is not None:
            return value.to(base.dtype)
        return effective_weight(base, *self.low_rank(name))

    def effective_band(self, name: str, base: Tensor, start: int) -> Tensor | None:
        """Return ``W[start : start + n]`` from these entries of ``W0`` alone, or None where it needs more."""
        value = self._whole(name)
        if value is not None:
            return value[start : start + len(base)].to(base.dtype)
        form, parts, magnitude = self.low_rank(name)
        return effective_band(base, start, form, parts, magnitude)

    def _whole(self, name: str) -> Tensor | None:
        found = (self.tensors.get(tensor_key(name, None, whole)) for whole in ("full", "buffer"))
        return next((value for value in found if value is not None), None)

    def low_rank(self, name: str) -> tuple[MatrixForm, LiveParts, Tensor | None]:
        """Return an adapted weight's matrix form, its parts, and DoRA's magnitudes where it has them."""
        decision = self.plan[name]
        parts = tuple(p for part in decision.parts for p in self._parts(decision, part.role, part.rows))
        return decision.site.form, parts, self.tensors.get(tensor_key(decision.name, None, "magnitude"))

    def _parts(self, decision: Decision, role: str | None, rows: Any) -> LiveParts:
        def get(field: str) -> Tensor | None:
            return self.tensors.get(tensor_key(decision.name, role, field))

        start_a, start_b = get("A_start"), get("B_start")
        start = None if start_a is None or start_b is None else (start_a, start_b)
        a = self.tensors[tensor_key(decision.name, role, "A")]
        b = self.tensors[tensor_key(decision.name, role, "B")]
        return since_start(LivePart(a, b, decision.scale, rows), start)


def tensor_key(weight: str, role: str | None, field: str) -> str:
    """Return a tensor's name in the file: ``weight/A`` or ``weight/q/A``."""
    return f"{weight}/{field}" if role is None else f"{weight}/{role}/{field}"


def _header_checksum(metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of what a header says, whatever other programs have added to it."""
    names = ("format", "format_version", "plan", "fingerprints", "deltas", "ties", "checksum")
    said = {name: metadata[name] for name in names if name in metadata}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _open(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    expected = f"a lora_fx adapter, format_version {FORMAT_VERSION}"
    if path.is_dir():
        advice = (
            "Name the file in it. A peft folder is read by load_adapter alone: load it into its model, and "
            "save it with save_adapter."
        )
        raise AdapterFileError(str(path), expected=expected, got="a folder", advice=advice)
    if not path.is_file():
        raise NoAdapterFileError(str(path), expected=expected, got="no such file", advice="Check the path.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        advice = "Pass a file that save_adapter wrote; if this is one, copy or save it again."
        raise _bad(path, f"a file that is damaged, or no safetensors file ({error})", advice) from error


def _bad(path: str | Path, got: str, advice: str) -> AdapterFileError:
    return AdapterFileError(
        str(path), expected=f"a lora_fx adapter, format_version {FORMAT_VERSION}", got=got, advice=advice
    )
