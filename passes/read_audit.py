"""Audit a plan, an injected model, an adapter file, a peft folder or an exported ONNX file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lora_fx.adapter_file import AdapterFile
from lora_fx.audits import Audit, audit_plan
from lora_fx.errors import AdapterFileError, NoAdapterFileError
from lora_fx.passes.extent import deltas
from lora_fx.passes.switch import require
from lora_fx.peft_files import PeftFolder
from lora_fx.peft_outline import outline
from lora_fx.plans import Plan


def audit(target: nn.Module | Plan | str | Path) -> Audit:
    """Return what was adapted, why, in which form and by how much.

    Raises:
        AdapterNameError: a model without adapters.
        AdapterFileError: a file that is not there, or carries no plan.
        PeftFormatError: a peft folder that cannot be read, or not without its model.
    """
    if isinstance(target, Plan):
        return audit_plan(target)
    if isinstance(target, nn.Module):
        return _of_model(target)
    path = Path(target)
    if path.suffix == ".onnx":
        return _of_onnx(path)
    file = outline(PeftFolder.read(path)) if path.is_dir() else AdapterFile.read(path)
    return audit_plan(file.plan, file.deltas, path.resolve().name)


def _of_model(model: nn.Module) -> Audit:
    record, name = require(model, None)
    on_meta = any(p.device.type == "meta" for p in model.parameters())
    return audit_plan(
        record.plans[name], None if on_meta else deltas(model, name), f"model, adapter {name!r}"
    )


def _of_onnx(path: Path) -> Audit:
    from lora_fx.passes.onnx_files import load
    from lora_fx.passes.onnx_metadata import PLAN_KEY, read_changes
    from lora_fx.passes.switch_onnx import taken_text

    if not path.is_file():
        raise NoAdapterFileError(
            str(path), expected="an ONNX file", got="no such file", advice="Check the path."
        )
    model = load(path)
    metadata, taken = model.metadata_props, taken_text(model, path)
    if taken is not None:
        raise AdapterFileError(
            str(path),
            expected="a file that an adapter is folded into",
            got=f"one that takes adapters at run time and holds none: {taken}",
            advice="Audit an adapter's own .safetensors file.",
        )
    if PLAN_KEY not in metadata:
        raise AdapterFileError(
            str(path),
            expected="an ONNX file that lora_fx folded an adapter into",
            got="a file without a plan in its metadata (a base?)",
            advice="Pass a file that export_onnx or fold_onnx wrote from a model with adapters.",
        )
    extents = read_changes(metadata) or {}
    known = {name: e.delta / e.weight if e.weight else e.delta for name, e in extents.items()}
    return audit_plan(Plan.from_json(metadata[PLAN_KEY]), known, path.name)
