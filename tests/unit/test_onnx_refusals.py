"""A fold never writes onto what it reads, and never folds into a folded file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.cli import main
from lora_fx.errors import BaseMismatchError, CertificateError, ExportError, InputError
from lora_fx.passes import onnx_files
from lora_fx.passes.onnx_program import reason

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    lora_fx.inject(made, lora_fx.Policy(lora_fx.Rule(rank=2)), X)
    with torch.no_grad():
        for parameter in lora_fx.parameters(made):
            parameter.normal_(std=0.3)
    return made


@pytest.fixture(scope="module")
def files(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base whose weights lie in a data file, an adapter, and a folded file."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "INLINE_LIMIT", 0)
        patch.setattr(onnx_files, "ALWAYS_INLINE", 16)
        lora_fx.save_adapter(model, folder / "a.safetensors")
        lora_fx.export_onnx(model, folder / "folded.onnx", X, base=folder / "base.onnx", certify=False)
    (folder / "link.onnx").symlink_to(folder / "base.onnx")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("out", ["base.onnx", "link.onnx", "*.data", "a.safetensors"])
def test_nothing_is_folded_onto_what_it_is_made_from(files: Path, out: str) -> None:
    before = hashes(files)
    target = next(files.glob(out if out != "*.data" else "base.onnx.*.data"))
    with pytest.raises(ExportError, match=r"out is .*Choose another path"):
        lora_fx.fold_onnx(files / "base.onnx", files / "a.safetensors", target)
    assert hashes(files) == before


@pytest.mark.parametrize("out", ["base.onnx", "link.onnx", "base.onnx.*.data"])
def test_nothing_is_exported_onto_its_base(model: nn.Module, files: Path, out: str) -> None:
    before = hashes(files)
    with pytest.raises(ExportError, match=r"out is .*Choose another path"):
        lora_fx.export_onnx(model, next(files.glob(out)), X, base=files / "base.onnx")
    assert hashes(files) == before


def test_a_base_yet_to_be_made_is_not_the_target(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(ExportError, match="out is the base"):
        lora_fx.export_onnx(model, tmp_path / "b.onnx", X, base=tmp_path / "sub" / ".." / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_the_command_line_refuses_too(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = hashes(files)
    base = str(files / "base.onnx")
    assert main(["fold", base, str(files / "a.safetensors"), base]) == 2
    assert "out is the base" in capsys.readouterr().err
    assert hashes(files) == before


def test_a_folded_file_is_no_base(model: nn.Module, files: Path, tmp_path: Path) -> None:
    folded, adapter = files / "folded.onnx", files / "a.safetensors"
    text = "already has an adapter folded in. Pass the base"
    with pytest.raises(BaseMismatchError, match=text):
        lora_fx.fold_onnx(folded, adapter, tmp_path / "out.onnx")
    with pytest.raises(BaseMismatchError, match=text):
        lora_fx.export_onnx(model, tmp_path / "out.onnx", X, base=folded)
    with pytest.raises(BaseMismatchError, match=text):
        lora_fx.session(folded, adapter=adapter)
    assert not list(tmp_path.iterdir())


def test_two_equal_files_are_said_to_be_equal_in_a_whole_sentence(files: Path) -> None:
    check = lora_fx.certify(files / "base.onnx", files / "base.onnx")["changed"]
    assert not check.ok
    assert check.detail.endswith("initializers differ")


def test_a_certificate_says_of_what_it_is(model: nn.Module, files: Path, tmp_path: Path) -> None:
    made = lora_fx.certify(files / "base.onnx", files / "folded.onnx")
    assert "Certificate of folded.onnx against base.onnx, no adapter given: holds" in str(made)
    made = lora_fx.certify(files / "base.onnx", files / "folded.onnx", adapter=files / "a.safetensors")
    assert "Certificate of folded.onnx against base.onnx: holds" in str(made)
    with lora_fx.disable_adapter(model):
        made = lora_fx.export_onnx(model, tmp_path / "own.onnx", X)
    assert "Export of own.onnx: holds" in str(made)


def test_a_base_that_is_made_on_the_way_is_noted(model: nn.Module, tmp_path: Path) -> None:
    for there in (False, True):
        made = lora_fx.export_onnx(model, tmp_path / "task.onnx", X, base=tmp_path / "base.onnx")
        assert any("base.onnx was not there" in note for note in made.notes) is not there


def test_an_adapter_that_was_never_trained(files: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    lora_fx.inject(fresh, lora_fx.Policy(lora_fx.Rule(rank=2)), X)
    with pytest.raises(CertificateError, match=r"got it changes no weight: train it first\. Do"):
        lora_fx.export_onnx(fresh, tmp_path / "task.onnx", X, base=files / "base.onnx")


def test_an_exporters_error_without_words() -> None:
    assert reason(KeyError()) == "KeyError"


@pytest.mark.parametrize("precision", [None, "bfloat16"])
@pytest.mark.parametrize("base", ["base.onnx", "none.onnx"])
def test_inputs_that_the_model_does_not_run_on(
    model: nn.Module, files: Path, base: str, precision: str | None
) -> None:
    before = hashes(files)
    with pytest.raises(InputError, match="RuntimeError in '0'"):
        lora_fx.export_onnx(
            model, files / "bad.onnx", torch.randn(2, 7), base=files / base, precision=precision
        )
    assert hashes(files) == before
