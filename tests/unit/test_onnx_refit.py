"""The manifest of refittable names: exactly what changed, and enough to make the folded file of the base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from lora_fx import refit_manifest
from lora_fx.cli import main
from lora_fx.errors import ExportError
from lora_fx.passes import onnx_files
from lora_fx.passes.export_onnx import export_onnx
from lora_fx.passes.fold_onnx import fold_onnx
from lora_fx.passes.onnx_files import load
from lora_fx.passes.refit_manifest import refit_values
from tests.unit.onnx_adapters import adapter
from tests.unit.onnx_models import Mixed, made

NAMES = ("conv.weight", "qkv.weight", "head.weight")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with its weights in a data file, and an overlay over it."""
    folder = tmp_path_factory.mktemp("refit")
    model = made(Mixed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "INLINE_LIMIT", 0)
        patch.setattr(onnx_files, "ALWAYS_INLINE", 300)
        export_onnx(model, folder / "base.onnx", torch.randn(2, 3, 8, 8), certify=False)
        file = adapter(model, NAMES, full=("head.bias",))
        fold_onnx(folder / "base.onnx", file, folder / "task.onnx", certify=False)
    return folder / "base.onnx", folder / "task.onnx"


def test_it_lists_exactly_the_changed_initializers(pair: tuple[Path, Path]) -> None:
    manifest = refit_manifest(*pair)
    before, after = (load(path).graph.initializers for path in pair)
    contents = {name: (before[name].const_value, after[name].const_value) for name in before}
    changed = {n for n, (a, b) in contents.items() if a.tobytes() != b.tobytes()}  # type: ignore[union-attr]
    assert {weight.name for weight in manifest.weights} == changed
    assert len(changed) == len(NAMES) + 1
    assert sorted(([*weight.parameters.items()] for weight in manifest.weights), key=str) == [
        # The scale of the fused normalisation is computed from two parameters more.
        [("conv.weight", "row scale"), ("bn.weight", "opaque"), ("bn.running_var", "opaque")],
        [("head.bias", "identity")],
        [("head.weight", "identity")],
        [("qkv.weight", "transpose")],
    ]
    files = [path for path in pair[0].parent.iterdir() if path.name.startswith("base.onnx")]
    assert manifest.base_sha256 == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert len(files) == 2


def test_its_values_make_the_folded_file_of_the_base(pair: tuple[Path, Path]) -> None:
    manifest, values = refit_manifest(*pair), dict(refit_values(*pair))
    base, folded = (load(path) for path in pair)
    for weight in manifest.weights:
        value = values[weight.name]
        assert (value.shape, value.dtype.name, value.nbytes) == (weight.shape, "float32", weight.bytes)
        assert weight.dtype == "float"
        assert weight.sha256 == hashlib.sha256(value.tobytes()).hexdigest()
        base.graph.initializers[weight.name].const_value = ir.tensor(value, name=weight.name)
    written: list[bytes] = []
    for model in (base, folded):
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            value.const_value = ir.tensor(np.asarray(value.const_value.numpy()), name=value.name)
        proto = ir.to_proto(model)
        del proto.metadata_props[:]
        written.append(proto.SerializeToString(deterministic=True))
    assert written[0] == written[1]
    onnx.checker.check_model(onnx.load_from_string(written[0]))


def test_other_graphs_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = load(pair[1])
    other.graph.inputs[0].name = "picture"
    onnx_files.save(other, tmp_path / "other.onnx")
    with pytest.raises(ExportError, match=r"with other numbers.*picture"):
        refit_manifest(pair[0], tmp_path / "other.onnx")


def test_the_command_prints_it(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manifest", "--json", *map(str, pair)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["manifest_version"], said["base"]) == (1, "base.onnx")
    assert [weight["name"] for weight in said["weights"]] == [w.name for w in refit_manifest(*pair).weights]
    assert main(["manifest", *map(str, pair)]) == 0
    assert "4 initializers of base.onnx to refit" in capsys.readouterr().out
