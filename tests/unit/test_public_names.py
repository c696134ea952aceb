"""The public surface is frozen: adding or taking away a name is a decision, not an accident."""

from __future__ import annotations

import lora_fx

RECORDS = {
    "Audit",
    "AdapterFile",
    "Certificate",
    "Decision",
    "Latency",
    "Manifest",
    "Plan",
    "Report",
    "Site",
    "Trace",
}
POLICIES = {"Policy", "Rule", "Skip", "Train"}
ERRORS = {
    "AdapterFileError",
    "AdapterNameError",
    "AdapterValueError",
    "BaseMismatchError",
    "CertificateError",
    "CheckpointError",
    "ExportError",
    "InputError",
    "LoraFxError",
    "PeftFormatError",
    "PlanError",
    "PolicyError",
    "ProbeError",
    "ProviderError",
    "TraceError",
    "VerifyError",
    "WeightWriteError",
    "WrappedModelError",
}
FUNCTIONS = {
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
}


def test_public_names() -> None:
    assert set(lora_fx.__all__) == RECORDS | POLICIES | ERRORS | FUNCTIONS


def test_every_public_name_is_there_and_documented() -> None:
    for name in lora_fx.__all__:
        assert getattr(lora_fx, name).__doc__, name


def test_functions_are_functions_and_no_module_shadows_them() -> None:
    import types

    for name in FUNCTIONS:
        assert not isinstance(getattr(lora_fx, name), types.ModuleType), name


def test_errors_share_a_base_and_say_four_things() -> None:
    for name in ERRORS - {"LoraFxError"}:
        error = getattr(lora_fx, name)("here", expected="this", got="that", advice="Do so.")
        assert isinstance(error, lora_fx.LoraFxError)
        assert str(error) == "here: expected this; got that. Do so."
