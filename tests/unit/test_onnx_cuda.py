"""The CUDA provider: it is taken, computes what torch does without TF32, and runs one graph for both files.

Run with ``pytest -m gpu`` where there is a device; elsewhere each test says what is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.passes import onnx_files
from lora_fx.passes.onnx_feeds import random_feeds
from lora_fx.passes.onnx_parity import distance, run
from lora_fx.passes.onnx_tensors import ort_value
from lora_fx.providers import CUDA, why_missing
from tests.unit.onnx_models import Mixed, Recurrent, Tied, made

pytestmark = pytest.mark.gpu

PROVIDER, DEVICE = CUDA, "cuda"
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
IDS = torch.arange(14).reshape(2, 7)
FRAMES = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(3))
MODELS = {"mixed": (Mixed, IMAGE), "tied": (Tied, IDS), "recurrent": (Recurrent, FRAMES)}


@pytest.fixture(autouse=True)
def device() -> None:
    """Skip where the provider cannot be used, with the reason."""
    missing = why_missing(PROVIDER)
    if missing is not None:
        pytest.skip(missing)


def trained(model: nn.Module, inputs: Tensor, seed: int = 0) -> nn.Module:
    """Inject an adapter and give it random values."""
    lora_fx.inject(model.eval(), lora_fx.Policy(lora_fx.Rule(rank=2)), inputs, seed=seed)
    move(model, seed)
    return model


def move(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_fx.parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) * 0.2)


def outputs(session: Any, inputs: Tensor) -> list[Tensor]:
    return run(session, {session.get_inputs()[0].name: ort_value(inputs)})


def test_auto_takes_the_device(tmp_path: Path) -> None:
    lora_fx.export_onnx(made(Tied), tmp_path / "base.onnx", IDS)
    assert lora_fx.session(tmp_path / "base.onnx").get_providers()[0] == PROVIDER
    assert lora_fx.session(tmp_path / "base.onnx", providers="cpu").get_providers() == [
        "CPUExecutionProvider"
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("trained_on", ["cpu", "device"])
def test_the_certificate_holds_on_the_device(name: str, trained_on: str, tmp_path: Path) -> None:
    """Among its checks: parity with torch, and one graph for both files after the provider's optimisation."""
    build, inputs = MODELS[name]
    model = made(build)
    if trained_on == "device":
        model, inputs = model.to(DEVICE), inputs.to(DEVICE)
    trained(model, inputs)
    certificate = lora_fx.export_onnx(model, tmp_path / "task.onnx", inputs, base=tmp_path / "base.onnx")
    assert certificate.environment["provider"] == PROVIDER
    assert {"runtime-structure", "parity", "effect"} <= {check.name for check in certificate.checks}
    assert certificate.ok
    lora_fx.save_adapter(model, tmp_path / "task.safetensors")
    alone = lora_fx.certify(
        tmp_path / "base.onnx", tmp_path / "task.onnx", adapter=tmp_path / "task.safetensors"
    )
    assert alone.ok
    assert alone.environment["provider"] == PROVIDER


def test_parity_is_that_of_float32_and_not_of_tf32(tmp_path: Path) -> None:
    """Products of 512 terms tell the two apart by a factor of a hundred."""
    model, x = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)), torch.randn(64, 512)
    trained(model, x)
    lora_fx.export_onnx(model, tmp_path / "task.onnx", x)
    with lora_fx.folded(model), torch.no_grad():
        expected = model.double()(x.double())
    found = outputs(lora_fx.session(tmp_path / "task.onnx", providers=PROVIDER), x)
    assert distance(found, [expected]) < 2e-6
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        rounded = lora_fx.session(tmp_path / "task.onnx", providers=[(PROVIDER, {"use_tf32": "1"})])
        assert distance(outputs(rounded, x), [expected]) > 2e-5


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precisions(precision: str, tmp_path: Path) -> None:
    model = trained(made(Mixed).to(DEVICE), IMAGE.to(DEVICE))
    certificate = lora_fx.export_onnx(
        model, tmp_path / "task.onnx", IMAGE.to(DEVICE), precision=precision, min_retained=0.0
    )
    assert certificate.ok
    assert certificate.environment["provider"] == PROVIDER


def test_adapters_over_one_base_are_their_folded_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_files, "INLINE_LIMIT", 0)
    monkeypatch.setattr(onnx_files, "ALWAYS_INLINE", 64)
    base = tmp_path / "base.onnx"
    model = made(Mixed)
    lora_fx.export_onnx(model, base, IMAGE)
    trained(model, IMAGE)
    sessions: list[Any] = []
    for name, seed in (("a", 1), ("b", 2)):
        move(model, seed)
        lora_fx.save_adapter(model, tmp_path / f"{name}.safetensors")
        assert lora_fx.fold_onnx(base, tmp_path / f"{name}.safetensors", tmp_path / f"{name}.onnx").ok
        sessions.append(lora_fx.session(base, adapter=tmp_path / f"{name}.safetensors"))
    for name, session in zip(("a", "b"), sessions, strict=True):
        assert session.get_providers()[0] == PROVIDER
        expected = outputs(lora_fx.session(tmp_path / f"{name}.onnx"), IMAGE)
        assert distance(outputs(session, IMAGE), expected) < 1e-6
    assert distance(outputs(sessions[0], IMAGE), outputs(sessions[1], IMAGE)) > 1e-3


def test_latency_is_measured_on_the_device(tmp_path: Path) -> None:
    model = trained(made(Mixed), IMAGE)
    lora_fx.export_onnx(model, tmp_path / "task.onnx", IMAGE, base=tmp_path / "base.onnx")
    found = lora_fx.compare_latency(tmp_path / "base.onnx", tmp_path / "task.onnx", seconds=1.0, sets=2)
    assert found.provider == PROVIDER
    assert found.clock == "wall clock"
    assert found.rounds >= 32
    assert set(random_feeds(lora_fx.session(tmp_path / "base.onnx"), seed=0)) == {"image"}
