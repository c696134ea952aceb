"""Export: a base ONNX file and folded ones derived from it, each proven before it gets its name."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.certificates import Certificate
from lora_fx.errors import ExportError
from lora_fx.passes.onnx_export_job import ExportJob, ExportOptions
from lora_fx.passes.onnx_inputs import split_inputs
from lora_fx.passes.onnx_metadata import refuse_lost
from lora_fx.passes.onnx_program import DynamicShapes
from lora_fx.passes.onnx_refusals import refuse_onto
from lora_fx.passes.onnx_subject import Inputs, Subject, subject_of
from lora_fx.passes.replaced import warn_replaced
from lora_fx.passes.runtime import injected
from lora_fx.passes.sharded import refuse_sharded

PRECISIONS: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def export_onnx(  # noqa: PLR0913 - each is a choice of its own
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    dynamic_shapes: DynamicShapes | None = None,
    opset: int | None = None,
    precision: str | None = None,
    base: str | Path | None = None,
    certify: bool = True,
    min_retained: float = 0.25,
) -> Certificate:
    """Fold the model's active adapter, export it to ONNX, and prove it against the base's export.

    A model without adapters is exported as a base. ``base`` is the base's ONNX file: used if it is
    there, made if it is not; without it the base is exported for the proof and not kept. Without
    ``dynamic_shapes`` the batch and the sequence may vary where the model allows it. ``precision``
    casts the folded weights once, and the inputs and outputs with them; a weight of whose change it
    keeps less than ``min_retained`` is refused, and one that loses a tenth is noted.

    Raises:
        AdapterValueError: the adapter holds NaN or infinity, or the precision rounds a change away.
        ExportError: the model cannot be translated, or ``path`` is ``base`` or its data.
        BaseMismatchError: ``base`` is another model's file, or has an adapter folded in already.
        CertificateError: the proof failed; nothing was written to ``path``.
        InputError: the model does not run on the example inputs.
        ProviderError: certify was asked for and onnxruntime is not installed.
        WrappedModelError: the model is sharded by ``fully_shard``.
    """
    refuse_sharded(model, "export_onnx", "Save the adapter here; load and export it unsharded.")
    if injected(model) is not None:
        warn_replaced(model)
    options = ExportOptions(dynamic_shapes, opset, _dtype(precision), certify)
    inputs = split_inputs(model, example_inputs)
    return export_subject(subject_of(model), path, inputs, options, base=base, min_retained=min_retained)


def export_subject(
    subject: Subject,
    path: str | Path,
    inputs: Inputs,
    options: ExportOptions,
    *,
    base: str | Path | None = None,
    min_retained: float = 0.25,
) -> Certificate:
    """Export what ``export_onnx`` exports, from the states of a model instead of an injected one."""
    job = ExportJob(subject, inputs, options)
    target = Path(path)
    if base is not None and subject.adapted:
        refuse_onto(target, Path(base), "the base")
    job.check_inputs()
    if not subject.adapted:
        return job.export_base(target, prove=options.certify)
    refuse_lost(job.extents(), least=min_retained)
    with _base_path(base, target) as base_path:
        made = not base_path.exists()
        if made:
            job.export_base(base_path, prove=False)
        certificate = job.export_folded(base_path, target, prove=options.certify)
    if made and base is not None:
        return certificate.noted(f"{base_path.name} was not there: it was exported first, and kept")
    return certificate


def _dtype(precision: str | None) -> torch.dtype | None:
    if precision is None:
        return None
    if precision not in PRECISIONS:
        raise ExportError(
            "precision", expected=f"one of {', '.join(PRECISIONS)}", got=repr(precision), advice="Pass one."
        )
    return PRECISIONS[precision]


@contextmanager
def _base_path(base: str | Path | None, target: Path) -> Generator[Path]:
    """Give the base's path, or one in a folder that is removed afterwards."""
    if base is not None:
        yield Path(base)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".lora_fx-", dir=target.parent) as folder:
        yield Path(folder) / "base.onnx"
