"""LoRA as a compiler pass: adapt any PyTorch model from its own dataflow, and prove the result."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_fx.adapter_file import AdapterFile
from lora_fx.api import (
    disable_adapter,
    fold,
    folded,
    inject,
    load_adapter,
    parameters,
    plan,
    save_adapter,
    set_adapter,
    trace,
    unload,
    verify,
)
from lora_fx.audits import Audit
from lora_fx.certificates import Certificate
from lora_fx.errors import (
    AdapterFileError,
    AdapterNameError,
    AdapterValueError,
    BaseMismatchError,
    CertificateError,
    CheckpointError,
    ExportError,
    InputError,
    LoraFxError,
    PeftFormatError,
    PlanError,
    PolicyError,
    ProbeError,
    ProviderError,
    TraceError,
    VerifyError,
    WeightWriteError,
    WrappedModelError,
)
from lora_fx.latencies import Latency
from lora_fx.manifests import Manifest
from lora_fx.passes.fold_checkpoint import fold_checkpoint
from lora_fx.passes.read_audit import audit
from lora_fx.passes.show import show_forward
from lora_fx.passes.trace import Trace
from lora_fx.plans import Decision, Plan
from lora_fx.policy import Policy, Rule, Skip, Train
from lora_fx.reports import Report
from lora_fx.sites import Site

if TYPE_CHECKING:
    from lora_fx.passes.certify import certify
    from lora_fx.passes.compare_latency import compare_latency
    from lora_fx.passes.export_onnx import export_onnx
    from lora_fx.passes.fold_onnx import fold_onnx
    from lora_fx.passes.refit_manifest import refit_manifest
    from lora_fx.passes.switch_onnx import pack_adapter, switch_onnx
    from lora_fx.sessions import session

__version__ = "0.1.0.dev0"

_LAZY = {
    "certify": "lora_fx.passes.certify",
    "compare_latency": "lora_fx.passes.compare_latency",
    "export_onnx": "lora_fx.passes.export_onnx",
    "fold_onnx": "lora_fx.passes.fold_onnx",
    "pack_adapter": "lora_fx.passes.switch_onnx",
    "refit_manifest": "lora_fx.passes.refit_manifest",
    "session": "lora_fx.sessions",
    "switch_onnx": "lora_fx.passes.switch_onnx",
}
"""What needs onnx or onnxruntime, imported at first use: training does without them."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lora_fx' has no attribute {name!r}")


__all__ = [
    "AdapterFile",
    "AdapterFileError",
    "AdapterNameError",
    "AdapterValueError",
    "Audit",
    "BaseMismatchError",
    "Certificate",
    "CertificateError",
    "CheckpointError",
    "Decision",
    "ExportError",
    "InputError",
    "Latency",
    "LoraFxError",
    "Manifest",
    "PeftFormatError",
    "Plan",
    "PlanError",
    "Policy",
    "PolicyError",
    "ProbeError",
    "ProviderError",
    "Report",
    "Rule",
    "Site",
    "Skip",
    "Trace",
    "TraceError",
    "Train",
    "VerifyError",
    "WeightWriteError",
    "WrappedModelError",
    "audit",
    "certify",
    "compare_latency",
    "disable_adapter",
    "export_onnx",
    "fold",
    "fold_checkpoint",
    "fold_onnx",
    "folded",
    "inject",
    "load_adapter",
    "pack_adapter",
    "parameters",
    "plan",
    "refit_manifest",
    "save_adapter",
    "session",
    "set_adapter",
    "show_forward",
    "switch_onnx",
    "trace",
    "unload",
    "verify",
]
