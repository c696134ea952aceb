"""Thirty models of the zoo that stand for the rest, on every test run; all of them by ``make zoo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.zoo.measure import measure
from tests.zoo.run import rows
from tests.zoo.table import joined, table

# name: the least share of what full fine-tuning moves that must be adapted
QUICK = {
    "transformers/gpt2": 1.0,
    "transformers/llama": 1.0,
    "transformers/mixtral": 0.95,
    "transformers/gpt_neox": 1.0,
    "transformers/bloom": 1.0,
    "transformers/phi3": 1.0,
    "transformers/gemma2": 1.0,
    "transformers/mamba": 0.9,
    "transformers/bert": 1.0,
    "transformers/roberta": 1.0,
    "transformers/deberta-v2": 0.98,
    "transformers/xlnet": 0.9,
    "transformers/funnel": 0.9,
    "transformers/longformer": 0.98,
    "transformers/albert": 1.0,
    "transformers/t5": 0.98,
    "transformers/bart": 1.0,
    "transformers/whisper": 0.8,
    "transformers/wav2vec2": 0.95,
    "transformers/clip": 0.95,
    "transformers/vit": 0.95,
    "transformers/swinv2": 0.95,
    "transformers/segformer": 0.98,
    "transformers/convnext": 0.98,
    "transformers/blip": 0.95,
    "transformers/yolos": 0.2,
    "torchvision/squeezenet1_1": 1.0,
    "timm/test_vit": 0.95,
    "timm/test_byobnet": 0.98,
    "timm/test_efficientnet": 0.98,
}


@pytest.mark.zoo
@pytest.mark.parametrize("name", QUICK)
def test_model(name: str) -> None:
    row = measure(name)
    assert not row["failed"], json.dumps(row["failed"], indent=1)
    assert row["holes"] == 0
    assert row["share"] >= QUICK[name], row["shortfall"]
    assert row["comparisons"] > 0


def test_a_failed_row_is_red(tmp_path: Path) -> None:
    good = {
        "name": "timm/good",
        "seconds": dict.fromkeys(
            ("build", "forward", "trace", "inject", "fold", "step", "roundtrip", "verify"), 0.5
        ),
        "failed": {},
        "share": 1.0,
        "sites": 3,
        "forms": {"branch": 3},
    }
    bad = {**good, "name": "timm/bad", "failed": {"fold": "AssertionError: injected and folded differ"}}
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(map(json.dumps, (good, bad, {**bad, "name": "timm/late"})))
    )
    text = table(joined(rows(tmp_path / "rows.jsonl")))
    assert "green up to fold, round trip and verify | 1 of 3" in text
    assert text.count("**red**") == 2
    assert "timm/late, fold: AssertionError" in text


def test_a_row_held_to_rounding_says_so() -> None:
    stages = ("build", "forward", "trace", "inject", "fold", "step", "roundtrip", "verify")
    row = {"name": "a", "seconds": dict.fromkeys(stages, 0.5), "failed": {}, "share": 1.0, "sites": 3}
    text = table([{**row, "forms": {"branch": 3}, "rounding": {"fold": [4e-9, 7e-10]}}])
    assert "| ok | ok r | ok |" in text
    assert "* a: fold differs by 4.0e-09, allowed 7.0e-10" in text


def test_recording_of_tiny_configurations_is_told_apart() -> None:
    def row(name: str, recording: float) -> dict[str, Any]:
        seconds = {"forward": 0.5, "trace": recording}
        return {"name": name, "seconds": seconds, "failed": {}, "share": 1.0}

    names = {"timm/a": 1.0, "timm/b": 1.5, "torchvision/a": 2.0, "transformers/a": 9.0, "diffusers/a": 10.0}
    text = table([row(name, recording) for name, recording in names.items()])
    assert "of models at their own size (see below) | 3.0 (3 models) |" in text
    assert "of tiny configurations (see below) | 19.0 (2 models) |" in text
    assert "of models at their own size (see below) | – |" in table([row("transformers/a", 9.0)])


def test_onnx_rows_say_whose_fault_a_failure_is() -> None:
    stages = dict.fromkeys(
        ("build", "forward", "trace", "inject", "fold", "step", "roundtrip", "verify"), 0.5
    )
    plain = {"seconds": stages, "failed": {}, "share": 1.0, "sites": 3, "forms": {"branch": 3}}
    files = {"seconds": {"onnx_base": 1.0}, "failed": {}}
    good = {**files, "onnx": {"exported": True, "error": 2e-7}}
    theirs = {**files, "failed": {"onnx_base": "ExportError"}, "onnx": {"upstream": "torch.onnx.export: no"}}
    ours = {**files, "failed": {"onnx": "CertificateError: structure"}, "onnx": {"exported": True}}
    found = [{**plain, "name": n} for n in ("a", "b", "c", "d")]
    found += [{**good, "name": "a"}, {**theirs, "name": "b"}, {**ours, "name": "c"}]
    text = table(joined(found))
    assert "exported here, folded and certified | 1 |" in text
    assert "* b, upstream: torch.onnx.export: no" in text
    assert "* c, onnx: CertificateError: structure" in text
    assert text.count("**red**") == 1


def test_an_unknown_model_fails_at_build() -> None:
    assert "build" in measure("transformers/no such model")["failed"]
