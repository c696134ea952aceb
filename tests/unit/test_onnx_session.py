"""Providers: what is there is used, what is not there is an error and never a silent fall back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from lora_fx import providers
from lora_fx.errors import ExportError, ProviderError
from lora_fx.providers import CPU, CUDA, choose, require
from lora_fx.sessions import session


@pytest.fixture
def file(tmp_path: Path) -> Path:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    main (float[B,4] x) => (float[B,4] y) { y = Relu (x) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    return tmp_path / "a.onnx"


def test_auto_runs(file: Path) -> None:
    made = session(file)
    assert made.get_providers()[0] == choose().first
    (found,) = made.run(None, {"x": np.float32([[-1, 2, -3, 4]])})
    assert found.tolist() == [[0, 2, 0, 4]]


def test_short_and_long_names() -> None:
    assert choose("cpu").providers == choose([CPU]).providers == ((CPU, {}),)


def test_a_provider_that_is_not_there_is_an_error(file: Path) -> None:
    with pytest.raises(ProviderError, match="built with"):
        session(file, providers="ROCMExecutionProvider")


def test_cuda_without_a_device_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "DEVICE_FILES", ())
    with pytest.raises(ProviderError, match="CUDAExecutionProvider"):
        session(file, providers="cuda")
    assert choose("auto").first == CPU


def test_a_silent_fall_back_is_an_error(file: Path) -> None:
    fallen = onnxruntime.InferenceSession(str(file), providers=[CPU])
    with pytest.raises(ProviderError, match="fell back to CPUExecutionProvider"):
        require(fallen, providers.Runtime(((CUDA, {}), (CPU, {}))))


def test_cuda_has_tf32_off_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "why_missing", lambda name: None)
    assert choose("cuda").providers[0][1]["use_tf32"] == "0"
    assert choose([("cuda", {"use_tf32": 1})]).providers[0][1]["use_tf32"] == "1"
    assert choose("auto").first == CUDA


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such file"):
        session(tmp_path / "none.onnx")


def test_without_onnxruntime_the_package_imports_and_says_what_to_install() -> None:
    script = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "onnxruntime":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import lora_fx
from lora_fx.errors import ProviderError
from lora_fx.providers import choose
try:
    choose()
except ProviderError as error:
    assert "lora_fx[cpu]" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_importing_the_package_does_not_import_the_runtime() -> None:
    script = "import sys, lora_fx; assert not {'onnx', 'onnxruntime', 'onnxscript'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
