"""Fold an adapter file into a base ONNX file: no torch model, no new export.

The result is an *overlay*: an ONNX file whose changed weights lie in a small file of their own, while
all others point into the base's data file, whose size and hash it records. With ``standalone`` it
holds everything. Either way weights pass through memory one at a time.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from lora_fx.adapter_file import AdapterFile
from lora_fx.certificates import Certificate
from lora_fx.errors import BaseMismatchError, ExportError
from lora_fx.fingerprints import BaseCheck, differs
from lora_fx.passes import onnx_files
from lora_fx.passes.certify import certify as prove
from lora_fx.passes.extent import Extent
from lora_fx.passes.onnx_adapter import base_map
from lora_fx.passes.onnx_canonical import canonical
from lora_fx.passes.onnx_files import DataFile, Draft
from lora_fx.passes.onnx_mapping import ParameterMap
from lora_fx.passes.onnx_metadata import data_files, lossy_notes, write_folded
from lora_fx.passes.onnx_patch import Patch, find_patches
from lora_fx.passes.onnx_refusals import refuse_folded, refuse_onto, refuse_onto_data
from lora_fx.passes.weights import adapter_weights
from lora_fx.progress import bytes_bar


def fold_onnx(
    base_onnx: str | Path,
    adapter: str | Path | AdapterFile,
    out: str | Path,
    *,
    standalone: bool = False,
    base_check: BaseCheck = "exact",
    certify: bool = True,
    progress: bool = False,
) -> Certificate:
    """Write the base file with an adapter folded in, and prove it.

    The base is one that ``export_onnx`` wrote, or any ONNX file in which the adapter's weights are
    found by their fingerprints. A base whose weights lie inside the file itself gives a standalone
    file too. ``progress`` shows a bar.

    Raises:
        ExportError: a weight lies in the base in a way that is not known, an overlay is not possible, or
            ``out`` is the base, its data or the adapter.
        BaseMismatchError: the adapter was made for another base, or one is folded into this file already.
        AdapterFileError: the adapter file cannot be read.
        CertificateError: the proof failed; nothing was written to ``out``.
    """
    base_path, target = Path(base_onnx), Path(out)
    refuse_onto(target, base_path, "the base")
    if isinstance(adapter, (str, Path)):
        refuse_onto(target, Path(adapter), "the adapter")
    file = adapter if isinstance(adapter, AdapterFile) else AdapterFile.read(adapter)
    model = onnx_files.load(base_path)
    refuse_folded(model, base_path)
    refuse_onto_data(target, model, base_path.parent)
    mapping = base_map(model, file)
    check_base(model, mapping, file, base_path, base_check)
    patches = find_patches(model, mapping, adapter_weights(file)).require(str(base_path))
    with onnx_files.draft(target) as draft:
        extents = _write(draft, model, patches, base_path, file, standalone=standalone, progress=progress)
        if certify:
            made = prove(base_path, draft.path, adapter=file, name=target.name).raise_for_failure()
        else:
            made = Certificate(base_path.name, target.name, (), {}, ("not certified, as asked",))
        draft.publish()
    return made.noted(*lossy_notes(extents))


def check_base(
    model: ir.Model, mapping: ParameterMap, file: AdapterFile, path: Path, check: BaseCheck = "exact"
) -> None:
    """Refuse an adapter that was made for another base.

    Raises:
        BaseMismatchError: a weight differs from the adapter's fingerprint of it.
    """
    wrong: list[str] = []
    for name, stored in file.fingerprints.items():
        placement = mapping.find(name)
        if placement is None or not placement.recipes:
            continue
        tensor = model.graph.initializers[placement.recipes[0].initializer].const_value
        assert tensor is not None
        gap = differs(placement.restored(tensor), stored, check)
        if gap is not None:
            wrong.append(f"{name}: {gap}")
    if wrong:
        raise BaseMismatchError(
            str(path),
            expected="the base that the adapter was trained on",
            got=f"{len(wrong)} of {len(file.fingerprints)} weights differ ({'; '.join(wrong[:3])})",
            advice='Export that base, or pass base_check="values" (trained on a copy in lower precision) or '
            '"shape".',
        )


def _write(
    draft: Draft,
    model: ir.Model,
    patches: tuple[Patch, ...],
    base_path: Path,
    file: AdapterFile,
    *,
    standalone: bool,
    progress: bool,
) -> dict[str, Extent]:
    """Write the folded model to the draft; return how much each weight was changed."""
    extents: dict[str, Extent] = {}
    digest = canonical(model).digest
    base_data = () if standalone else data_files(model, base_path.parent)
    beside = relative(base_path.parent, draft.final.parent) if base_data else Path()
    changed: list[ir.Value] = []
    for patch in patches:
        value = model.graph.initializers[patch.initializer]
        if isinstance(patch.base, ir.ExternalTensor):
            changed.append(value)
        value.const_value = patch.lazy(extents.__setitem__)

    def finish(written: ir.Model, data: DataFile | None) -> None:
        listed = [DataFile((beside / f.name).as_posix(), f.size, f.sha256) for f in base_data]
        plan = file.plan.to_json()
        write_folded(written, plan=plan, extents=extents, digest=digest, data=data, base_data=listed)

    with bytes_bar(sum(patch.base.nbytes for patch in patches), shown=progress) as told:
        if base_data and changed:
            with relocated(model, beside):
                draft.write_split(model, changed, suffix="overlay", progress=told, finish=finish)
        else:
            draft.write(model, progress=told, finish=finish)
    return extents


def relative(base: Path, folder: Path) -> Path:
    """Return where the base's data lies, as seen from the overlay's folder.

    Raises:
        ExportError: the overlay is not beside the base, nor above it.
    """
    base, folder = base.resolve(), folder.resolve()
    if not base.is_relative_to(folder):
        raise ExportError(
            str(folder),
            expected=f"the base's folder {base}, or one above it",
            got="another folder, from which the runtimes refuse to follow a path to the base's data",
            advice="Write the overlay beside its base, or pass standalone=True.",
        )
    return base.relative_to(folder)


@contextmanager
def relocated(model: ir.Model, beside: Path) -> Generator[None]:
    """Point unchanged weights to the base's data as it is seen from the overlay's folder."""
    before: list[tuple[ir.Value, ir.ExternalTensor]] = []
    if beside != Path():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                before.append((value, tensor))
                value.const_value = onnx_files.pointer(tensor, (beside / str(tensor.location)).as_posix())
    try:
        yield
    finally:
        for value, tensor in before:
            value.const_value = tensor
