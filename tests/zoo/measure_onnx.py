"""What ONNX asks of one model of the zoo: its base exported, a folded file derived, certificate and parity.

Where the base itself does not get through, the same is tried without this library (``torch.onnx.export``
and onnxruntime alone): what fails there too is upstream's, what does not is ours.
"""

from __future__ import annotations

import contextlib
import copy
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_fx
from lora_fx.errors import CertificateError, LoraFxError
from lora_fx.passes.onnx_inputs import random_like, split_inputs
from lora_fx.passes.onnx_parity import RuntimeFault, distance, feeds_for, run, torch_outputs
from lora_fx.passes.onnx_program import quiet, reason
from tests.zoo.catalogue import Built, build
from tests.zoo.measure import EVERYTHING, Row, Subject, randomise

LARGEST = 500_000_000
"""Parameters of the largest model that is exported: of a larger one the exporter holds many copies."""
UPSTREAM = 1e-3
"""An error on outputs at which onnxruntime, fed by torch's exporter alone, is wrong."""


def measure_onnx(name: str, *, tell: Callable[[Row], None] = lambda row: None) -> Row:
    """Return what the table says of one model's ONNX files."""
    row: Row = {"name": name, "seconds": {}, "failed": {}, "onnx": {}}
    subject = Subject(row, tell)
    built: Built | None = subject.stage("build", lambda: build(name))
    if built is None:
        return row
    model, inputs = built
    if hasattr(model, "set_experts_implementation"):  # transformers' own grouped product has no ONNX operator
        with contextlib.suppress(ValueError):
            model.set_experts_implementation("batched_mm")
    row["parameters"] = sum(p.numel() for p in model.parameters())
    if row["parameters"] > LARGEST:
        row["onnx"]["skipped"] = f"more than {LARGEST // 10**6}M parameters"
        tell(row)
        return row
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.onnx"
        if subject.stage("onnx_base", lambda: _base(model, inputs, base, row)) is None:
            subject.stage("upstream", lambda: _blame(model, inputs, row))
            return row
        subject.stage("onnx", lambda: _folded(model, inputs, base, row))
    return row


def _base(model: nn.Module, inputs: dict[str, Any], path: Path, row: Row) -> None:
    model.requires_grad_(False)
    certificate = lora_fx.export_onnx(model, path, inputs)
    row["onnx"].update(exported=True, base=certificate["parity"].detail, notes=list(certificate.notes))


def _folded(model: nn.Module, inputs: dict[str, Any], base: Path, row: Row) -> None:
    with torch.no_grad():
        lora_fx.inject(model, EVERYTHING, inputs, seed=0)
    randomise(model)
    try:
        certificate = lora_fx.export_onnx(model, base.with_name("folded.onnx"), inputs, base=base)
    except CertificateError as error:
        found = getattr(error, "certificate", None)
        row["onnx"]["checks"] = {} if found is None else {c.name: c.ok for c in found.checks}
        raise
    row["onnx"]["checks"] = {c.name: c.ok for c in certificate.checks}
    row["onnx"]["parity"] = certificate["parity"].detail
    measured = [item["folded"] for item in certificate["parity"].data.values()]
    if measured:  # not where random numbers drawn in the graph reach every output
        row["onnx"]["error"] = max(measured)


def _blame(model: nn.Module, inputs: dict[str, Any], row: Row) -> None:
    """Say in ``upstream`` what fails without this library too; raise where nothing does."""
    fault = upstream_fault(model, inputs)
    if fault is not None:
        row["onnx"]["upstream"] = fault
        return
    raise AssertionError("torch.onnx.export and onnxruntime alone get through: the fault is ours")


def upstream_fault(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """Return where torch's exporter or onnxruntime fails on a model by itself, or None where neither does."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "plain.onnx"
        try:
            with quiet():
                torch.onnx.export(model, (), path, kwargs=copy.deepcopy(inputs), dynamo=True, verbose=False)
        except Exception as error:  # noqa: BLE001 - whatever the exporter raises is its answer
            return _line(f"torch.onnx.export: {reason(error)}")
        try:
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - as above
            return _line(f"onnxruntime does not load torch.onnx.export's file: {error}")
        given = split_inputs(model, inputs)
        for what, case in (("the example", given), ("random", random_like(given, seed=0))):
            try:
                found = run(session, feeds_for(session, case))
            except (LoraFxError, RuntimeFault) as error:
                return _line(f"onnxruntime does not run torch.onnx.export's file on {what} inputs: {error}")
            error = distance(found, torch_outputs(model, case))
            if not error <= UPSTREAM:
                return f"torch.onnx.export's file computes something else on {what} inputs (by {error:.1e})"
    return None


def _line(text: str) -> str:
    return re.sub(r"/\S*/(site-packages/)?", "", " ".join(text.split()))[:300]
