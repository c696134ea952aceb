"""Providers: what is there is used, what is not there is an error and never a silent fall back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from lora_fx import providers
from lora_fx.errors import BaseMismatchError, ExportError, ProviderError
from lora_fx.passes import onnx_files
from lora_fx.passes.export_onnx import export_onnx
from lora_fx.passes.fold_onnx import fold_onnx
from lora_fx.providers import CPU, CUDA, choose, require
from lora_fx.sessions import session
from tests.unit.onnx_adapters import adapter
from tests.unit.onnx_models import Mixed, made


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


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base with its weights in a data file, two adapters, and each folded into a file of its own."""
    folder = tmp_path_factory.mktemp("served")
    model = made(Mixed)
    names = ("conv.weight", "qkv.weight", "o.weight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "INLINE_LIMIT", 0)
        patch.setattr(onnx_files, "ALWAYS_INLINE", 300)
        export_onnx(model, folder / "base.onnx", torch.randn(2, 3, 8, 8))
        for seed in (1, 2):
            file = adapter(model, names, full=("head.bias",), seed=seed)
            file.write(folder / f"{seed}.safetensors")
            fold_onnx(folder / "base.onnx", file, folder / f"{seed}.onnx")
    return folder / "base.onnx", [folder / "1.safetensors", folder / "2.safetensors"]


@pytest.mark.parametrize("share_weights", [False, True])
def test_adapters_over_one_base_are_their_folded_files(
    served: tuple[Path, list[Path]], share_weights: bool
) -> None:
    base, adapters = served
    image = {"image": np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)}
    sessions = [session(base, adapter=file, share_weights=share_weights) for file in adapters]
    plain = session(base, share_weights=share_weights).run(None, image)[0]
    found = [each.run(None, image)[0] for each in (*sessions, sessions[0])]
    for output, file in zip(found, adapters, strict=False):
        expected = session(file.with_suffix(".onnx"), share_weights=share_weights).run(None, image)[0]
        assert (output == expected).all()
        assert np.abs(output - plain).max() > 1e-3
    assert (found[0] == found[2]).all()
    assert not (found[0] == found[1]).all()


def test_an_adapter_over_another_base_is_refused(served: tuple[Path, list[Path]], tmp_path: Path) -> None:
    other = adapter(made(Mixed, seed=5), ("o.weight",))
    with pytest.raises(BaseMismatchError, match=r"o\.weight"):
        session(served[0], adapter=other)


def test_an_overlay_without_its_base_is_refused(served: tuple[Path, list[Path]], tmp_path: Path) -> None:
    overlay = served[0].parent / "1.onnx"
    for file in served[0].parent.glob("1.onnx*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert session(overlay).get_inputs()
    with pytest.raises(BaseMismatchError, match="no such file"):
        session(tmp_path / "1.onnx")


def test_a_precision_without_kernels_is_named(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    main (bfloat16[2,2] x) => (bfloat16[2,2] y) { y = MatMul (x, x) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "b.onnx")
    with pytest.raises(
        ProviderError, match=r"b\.onnx: expected operators.*NOT_IMPLEMENTED.*float32 or float16"
    ):
        session(tmp_path / "b.onnx", providers="cpu")
